"""Every model is saved as what it is, and stays as it was."""

import os

import pytest
import torch
import transformers as T
from folders import ENOSPC, holds, raising, weights
from pruned import logits, shrunk, uneven
from tiny import tiny_batch, tiny_model
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from hf_prune import WeightMagnitudeConfig, apply_mask, current_mask, prune, save_pretrained, shrink
from hf_prune.errors import SaveError

pytestmark = pytest.mark.usefixtures("remote_code_stays_in")


class Scorer(T.BertPreTrainedModel):
    """A model of a user."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = T.BertModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.bert(input_ids, attention_mask).last_hidden_state[:, 0]
        return T.modeling_outputs.SequenceClassifierOutput(logits=self.score(hidden))


class TestTheModelInMemory:
    def test_nothing_about_it_changes(self, tmp_path):
        model = shrunk("bert")
        model.train()
        model.bert.embeddings.eval()
        model.classifier.weight.requires_grad = False
        model(**tiny_batch("bert"), labels=torch.tensor([0, 1, 0])).loss.backward()
        modes = [module.training for module in model.modules()]
        grads = [parameter.grad for parameter in model.parameters()]
        values, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
        for options in ({}, {"standalone": True}):
            save_pretrained(model, tmp_path / "out", **options)
            assert [module.training for module in model.modules()] == modes
            assert torch.equal(torch.get_rng_state(), random)
            assert all(a is b for a, b in zip([p.grad for p in model.parameters()], grads, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
            assert not hasattr(model.config, "auto_map")
        assert not model.classifier.weight.requires_grad

    def test_a_failed_save_changes_nothing(self, folder, monkeypatch):
        model = tiny_model("bert")
        apply_mask(model, uneven(model, drop=False))
        mask, expected = current_mask(model), logits(model, tiny_batch("bert"))
        model.train()
        monkeypatch.setattr(os, "fsync", raising(ENOSPC))
        with pytest.raises(SaveError):
            save_pretrained(model, folder)
        assert model.training and current_mask(model) == mask
        assert torch.equal(logits(model, tiny_batch("bert")), expected)

    def test_tuples_instead_of_outputs(self, tmp_path):
        model = shrunk("bert", return_dict=False)
        save_pretrained(model, tmp_path)
        assert holds(tmp_path, model)

    def test_a_head_of_a_user(self, tmp_path):
        model = Scorer(tiny_model("bert").config)
        shrink(model, uneven(model))
        save_pretrained(model, tmp_path / "out")
        assert holds(tmp_path / "out", model)
        # Where only transformers is there, nobody knows that class
        with pytest.raises(SaveError, match="Scorer"):
            save_pretrained(model, tmp_path / "standalone", standalone=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(
        "cls",
        [
            T.BertModel,
            T.BertForMaskedLM,
            T.BertForPreTraining,
            T.BertForNextSentencePrediction,
            T.BertLMHeadModel,
            T.BertForMultipleChoice,
            T.BertForTokenClassification,
            T.BertForQuestionAnswering,
            T.BertForSequenceClassification,
        ],
    )
    def test_every_head_of_bert(self, tmp_path, cls):
        model = cls(tiny_model("bert").config).eval()
        shrink(model, uneven(model))
        save_pretrained(model, tmp_path, standalone=True)
        assert holds(tmp_path, model)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_a_classifier_that_has_no_padding_token(self, tmp_path, name):
        model = shrunk(name, T.AutoModelForSequenceClassification, pad_token_id=None)
        save_pretrained(model, tmp_path)
        assert holds(tmp_path, model)

    def test_options_of_the_stock_method(self, tmp_path, new):
        save_pretrained(new, tmp_path / "other rank", is_main_process=False)
        assert not list(tmp_path.rglob("*.safetensors"))
        state = {key: value + 1 for key, value in new.state_dict().items()}
        save_pretrained(new, tmp_path / "given", state_dict=dict(state))
        found = weights(tmp_path / "given")
        assert all(torch.equal(found[key], state[key]) for key in found)
        with pytest.raises(SaveError, match="push_to_hub"):
            save_pretrained(new, tmp_path / "pushed", push_to_hub=True)
        assert not (tmp_path / "pushed").exists()


@pytest.mark.parametrize("how", ["pruned", "dense"])
def test_a_model_from_gguf_is_saved_as_what_it_is(how, tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = T.GgufConfig()
    model.hf_quantizer, model.is_quantized = GgufHfQuantizer(model.config.quantization_config), True
    model.quantization_method = "gguf"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "stock")
    if how == "pruned":
        prune(model, WeightMagnitudeConfig(sparsity=0.5))
    save_pretrained(model, tmp_path / "out")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert not model.is_quantized and "quantization_config" not in again.config.to_dict()
    T.Trainer(model, T.TrainingArguments(tmp_path / "trainer", report_to="none"))  # does not refuse it
