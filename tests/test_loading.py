"""What was saved loads with plain from_pretrained, under every head and option."""

import copy
import json
import pickle

import pytest
import torch
import transformers as T
from folders import holds
from pruned import SOME, equal, logits, shapes, shrunk, uneven
from tiny import FAMILIES, auto, tiny_batch, tiny_model

from hf_prune import (
    AutoPrunableModelForSequenceClassification,
    MagnitudeConfig,
    PruningMask,
    apply_mask,
    prunable,
    prunable_units,
    save_pretrained,
    shrink,
)

FEW = ["bert", "deberta-v2", "gpt2", "phi3", "t5", "bart"]


def stripped(model):
    """The weights by name, whatever the class calls what holds them."""
    return {key.removeprefix("transformer.").removeprefix("model."): x for key, x in model.state_dict().items()}


def aligned(model):
    """Loaded weights lie where the file has them: at other addresses kernels may sum in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


class TestRoundTrip:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_plain_from_pretrained(self, tmp_path, name):
        model, batch = shrunk(name), tiny_batch(name, padded=True)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert again.num_parameters() == model.num_parameters() < tiny_model(name).num_parameters()
        assert equal(again, model)
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)
        assert torch.equal(logits(aligned(again), batch), logits(aligned(model), batch))
        for key, module in again.named_modules():
            mine = vars(model.get_submodule(key))
            assert {k: v for k, v in vars(module).items() if type(v) is int} == {
                k: v for k, v in mine.items() if type(v) is int
            }, key

    @pytest.mark.parametrize("name", ["bert", "phi3", "bart"])
    def test_the_stock_method_saves_it_too(self, tmp_path, name):
        model = shrunk(name)
        model.save_pretrained(tmp_path / "first")
        again = auto(name).from_pretrained(tmp_path / "first")
        again.save_pretrained(tmp_path / "second")
        assert holds(tmp_path / "second", model)

    @pytest.mark.parametrize("name", FEW)
    def test_saved_again(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path / "first")
        again = auto(name).from_pretrained(tmp_path / "first")
        save_pretrained(again, tmp_path / "second")
        save_pretrained(again, tmp_path / "first")  # over what it was loaded from
        for folder in ("first", "second"):
            assert holds(tmp_path / folder, model)
        first, second = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("first", "second"))
        assert first == second

    @pytest.mark.parametrize("name", FEW)
    def test_pruned_again(self, tmp_path, name):
        save_pretrained(shrunk(name, drop=False), tmp_path)
        model, batch = auto(name).from_pretrained(tmp_path), tiny_batch(name)
        apply_mask(model, uneven(model, drop=True))
        masked = logits(model, batch)
        before = model.num_parameters()
        shrink(model)
        assert model.num_parameters() < before
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again, batch), masked, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", ["bert", "llama", "modernbert", "vit", "bart"])
    def test_layers_that_lost_everything(self, tmp_path, name):
        model, batch = tiny_model(name), tiny_batch(name)
        units = prunable_units(model)
        empty = [g for g in units.of_kind("heads", "neurons") if g.layer == 1]
        apply_mask(model, PruningMask({g.name: torch.zeros(g.size, dtype=torch.bool) for g in empty}, units))
        masked = logits(model, batch)
        save_pretrained(shrink(model), tmp_path)
        torch.testing.assert_close(logits(auto(name).from_pretrained(tmp_path), batch), masked, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
    @pytest.mark.parametrize("name", ["bert", "phi3", "t5"])
    def test_device_maps(self, tmp_path, name, options):
        model, batch = shrunk(name), tiny_batch(name)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path, **options)
        assert equal(again, model)
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
    def test_a_larger_vocabulary(self, tmp_path, name):
        model, batch = shrunk(name), tiny_batch(name)
        model.resize_token_embeddings(120)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path)
        assert equal(again, model) and again.config.vocab_size == 120
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("name", ["bert", "gpt_neox", "llama"])
    def test_shards(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
        assert equal(auto(name).from_pretrained(tmp_path), model)

    def test_variants(self, tmp_path):
        model = shrunk("bert").half()
        save_pretrained(model, tmp_path, variant="fp16")
        assert (tmp_path / "model.fp16.safetensors").exists()
        again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        assert equal(again, model)
        save_pretrained(model, tmp_path, variant="fp16", max_shard_size="20KB")
        again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        assert equal(again, model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "t5/gated", "whisper"])
    def test_half_precision(self, tmp_path, name, dtype):
        model = shrunk(name).to(dtype)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path, dtype="auto")
        assert again.dtype == dtype
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        wide = auto(name).from_pretrained(tmp_path, dtype=torch.float32)
        assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), wide.parameters(), strict=True))

    @pytest.mark.parametrize("name", ["bert", "phi3", "t5"])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("wrap", [lambda model: model, prunable], ids=["stock", "prunable"])
    def test_copies(self, tmp_path, name, duplicate, wrap):
        model, batch = wrap(shrunk(name)), tiny_batch(name)
        other = duplicate(model)
        assert type(other) is type(model)
        assert torch.equal(logits(other, batch), logits(model, batch))
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not equal(other, model)
        save_pretrained(other, tmp_path)
        assert equal(auto(name).from_pretrained(tmp_path), other)

    def test_a_pickled_prunable_model_keeps_its_mask_and_result(self):
        model = prunable(tiny_model("bert"))
        result = model.prune(MagnitudeConfig(budget={"params": 0.7}))
        other = pickle.loads(pickle.dumps(model))
        assert other.pruning_result.mask == result.mask
        batch = tiny_batch("bert")
        assert torch.equal(logits(other, batch), logits(model, batch))
        assert torch.equal(logits(other.shrink(), batch), logits(model.shrink(), batch))

    def test_the_prunable_auto_class(self, tmp_path):
        model = prunable(shrunk("bert"))
        model.save_pretrained(tmp_path)
        again = AutoPrunableModelForSequenceClassification.from_pretrained(tmp_path)
        assert type(again).__name__ == "BertForSequenceClassification" and type(again) is type(model)
        again.prune(MagnitudeConfig(budget={"params": 0.9}))
        again.shrink().save_pretrained(tmp_path)
        assert equal(T.AutoModelForSequenceClassification.from_pretrained(tmp_path), again)
        assert type(T.AutoModelForSequenceClassification.from_pretrained(tmp_path)) is T.BertForSequenceClassification


class TestOtherHeads:
    @pytest.mark.parametrize("name", SOME)
    def test_without_a_head(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path)
        base = T.AutoModel.from_pretrained(tmp_path)
        mine, theirs = model.base_model.state_dict(), base.state_dict()
        assert theirs.keys() <= mine.keys() | {"pooler.dense.weight", "pooler.dense.bias"}
        assert len(theirs) > 10
        assert all(torch.equal(theirs[key], mine[key]) for key in theirs.keys() & mine.keys())

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("bert", T.AutoModelForTokenClassification),
            ("bert", T.AutoModelForMaskedLM),
            ("bert", T.AutoModelForQuestionAnswering),
            ("distilbert", T.AutoModelForTokenClassification),
            ("deberta-v2", T.AutoModelForTokenClassification),
            ("gpt2", T.AutoModelForSequenceClassification),
            ("gpt_neox", T.AutoModelForTokenClassification),
            ("llama", T.AutoModelForSequenceClassification),
            ("phi3", T.AutoModelForSequenceClassification),
            ("bart", T.AutoModelForSequenceClassification),
            ("t5", T.AutoModelForQuestionAnswering),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_another_head(self, tmp_path, name, other):
        model = shrunk(name)
        save_pretrained(model, tmp_path / "first")
        again = other.from_pretrained(tmp_path / "first")
        batch = {key: value for key, value in tiny_batch(name).items() if key in ("input_ids", "attention_mask")}
        if name == "bart":  # its classifier reads the state at the end token
            batch["input_ids"][:, -1] = 2
        assert torch.isfinite(logits(again, batch)).all()
        mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
        shared = [key for key in theirs if key in mine and "classifier" not in key and "head" not in key]
        assert len(shared) > 10
        assert all(torch.equal(mine[key], theirs[key]) for key in shared)
        save_pretrained(again, tmp_path / "second")
        assert holds(tmp_path / "second", again)

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("t5", T.T5EncoderModel),
            ("t5", T.T5ForTokenClassification),
            ("bart", T.BartForCausalLM),
            ("marian", T.MarianForCausalLM),
            ("whisper", T.WhisperForCausalLM),
            ("whisper", T.WhisperForAudioClassification),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_one_stack_of_an_encoder_decoder(self, tmp_path, name, cls):
        model = shrunk(name)
        save_pretrained(model, tmp_path / "full")
        half = cls.from_pretrained(tmp_path / "full")
        mine, theirs = stripped(model), stripped(half)
        # Which embeddings a decoder alone finds in a full checkpoint is up to transformers
        common = [key for key in theirs if key in mine and "embed_tokens" not in key and "lm_head" not in key]
        assert len(common) > 10
        assert all(torch.equal(theirs[key], mine[key]) for key in common)
        if cls is T.T5EncoderModel:
            batch = tiny_batch("t5")
            with torch.no_grad():
                expected = model.encoder(batch["input_ids"], batch["attention_mask"])[0]
            assert torch.equal(logits(half, {key: batch[key] for key in ("input_ids", "attention_mask")}), expected)
        # The other stack is gone, its entries in the layout may be there still: either method saves it
        half.save_pretrained(tmp_path / "stock")
        assert holds(tmp_path / "stock", half)
        save_pretrained(half, tmp_path / "ours")
        assert holds(tmp_path / "ours", half)
        shrink(half, uneven(half, drop=False))
        save_pretrained(half, tmp_path / "pruned")
        assert holds(tmp_path / "pruned", half)

    def test_a_model_made_of_two(self, tmp_path):
        save_pretrained(shrunk("bert", T.AutoModel), tmp_path / "bert")
        pair = T.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "bert", tmp_path / "bert")
        pair.config.decoder_start_token_id, pair.config.pad_token_id = 1, 0
        assert shapes(pair.encoder) == shapes(shrunk("bert", T.AutoModel))
        pair.save_pretrained(tmp_path / "pair")
        assert equal(T.EncoderDecoderModel.from_pretrained(tmp_path / "pair"), pair)

    @pytest.mark.parametrize("name", FEW)
    def test_from_config_has_the_shapes_and_fresh_weights(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path)
        fresh = auto(name).from_config(T.AutoConfig.from_pretrained(tmp_path))
        assert shapes(fresh) == shapes(model)
        assert torch.isfinite(logits(fresh, tiny_batch(name))).all()
        assert not equal(fresh, model)
