"""What people do with a model that they loaded: generate, train, tune."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from folders import holds, tokenizer
from pruned import equal, logits, shrunk, uneven
from safetensors.torch import load_file
from tiny import DECODERS, SEQ2SEQ, auto, tiny_batch, tiny_model

from hf_prune import apply_mask, prunable, save_pretrained
from hf_prune.errors import SaveError


def generated(model, batch, **options):
    torch.manual_seed(0)
    arguments = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
    with torch.no_grad():
        return model.generate(**arguments, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, **options)


class TestGenerate:
    @pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
    def test_every_cache_gives_the_same_tokens(self, tmp_path, name):
        model, batch = shrunk(name, seed=5), tiny_batch(name)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path).eval()
        expected = generated(model, batch, use_cache=False)
        assert len(expected.unique()) > 1
        for which in (model, again):
            assert torch.equal(generated(which, batch, use_cache=False), expected)
            assert torch.equal(generated(which, batch), expected)
        assert torch.equal(generated(again, batch, cache_implementation="static"), expected)

    @pytest.mark.parametrize("name", ["llama", "phi3", "bart"])
    def test_beams(self, name):
        model, batch = shrunk(name), tiny_batch(name)
        arguments = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
        tokens = [
            model.generate(**arguments, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*tokens)


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)  # the same dropout
    model(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestTraining:
    @pytest.mark.parametrize("name", ["bert", "deberta-v2", "vit"])
    def test_gradient_checkpointing(self, tmp_path, name):
        save_pretrained(shrunk(name), tmp_path)
        model, batch = auto(name).from_pretrained(tmp_path).train(), tiny_batch(name)
        expected = gradients(model, batch)
        model.gradient_checkpointing_enable()
        found = gradients(model, batch)
        assert found.keys() == expected.keys() and len(found) > 20
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5)

    def test_torch_compile(self, tmp_path):
        save_pretrained(shrunk("bert"), tmp_path)
        model, batch = T.AutoModelForSequenceClassification.from_pretrained(tmp_path), tiny_batch("bert")
        expected = logits(model, batch)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("wrap", [lambda model: model, prunable], ids=["stock", "prunable"])
    def test_trainer(self, tmp_path, wrap):
        save_pretrained(shrunk("bert"), tmp_path / "pruned")
        model = wrap(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned"))
        rows = [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2}
            for index, ids in enumerate(torch.randint(3, 99, (8, 7)))
        ]

        def trainer(of, steps):
            options = T.TrainingArguments(
                str(tmp_path / "runs"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
                save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", save_total_limit=3,
            )  # fmt: skip
            return T.Trainer(of, options, train_dataset=rows, eval_dataset=rows)

        run = trainer(model, 2)
        run.train()
        best = Path(run.state.best_model_checkpoint)
        loaded = T.AutoModelForSequenceClassification.from_pretrained(best)
        assert type(loaded) is T.BertForSequenceClassification
        assert equal(loaded, model)
        assert not equal(loaded, shrunk("bert"))
        run.save_model(str(tmp_path / "final"))
        assert equal(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), model)
        # A run that was interrupted goes on from the checkpoint of its first step
        other = wrap(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned"))
        more = trainer(other, 3)
        more.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
        assert more.state.global_step == 3
        save_pretrained(other, tmp_path / "final")
        assert equal(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), other)

    def test_a_masked_model_is_never_shrunk_by_a_checkpoint_of_the_trainer(self, tmp_path):
        """Trainer passes the weights explicitly: they are stored as they are, dense."""
        model = prunable(tiny_model("bert"))
        apply_mask(model, uneven(model, drop=False))
        state = model.state_dict()
        model.save_pretrained(tmp_path, state_dict=dict(state))
        found = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(found[key], state[key]) for key in found)

    def test_pipeline(self, tmp_path):
        model, words = shrunk("bert"), tokenizer()
        save_pretrained(model, tmp_path, processing_class=words)
        pipe = T.pipeline("text-classification", model=str(tmp_path), device="cpu")
        found = pipe("very good film", top_k=None)
        expected = logits(model, dict(words("very good film", return_tensors="pt"))).softmax(-1)[0]
        scores = {row["label"]: row["score"] for row in found}
        for index, label in model.config.id2label.items():
            assert scores[label] == pytest.approx(expected[index].item(), abs=1e-5)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
    def test_lora(self, tmp_path, name):
        save_pretrained(shrunk(name), tmp_path / "pruned")
        base, batch = auto(name).from_pretrained(tmp_path / "pruned"), tiny_batch(name)
        plain = logits(base, batch)
        targets = "all-linear" if name == "llama" else None
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        tuned = peft.get_peft_model(copy.deepcopy(base), lora)
        adapted = logits(tuned, batch)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        tuned.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(auto(name).from_pretrained(tmp_path / "pruned"), tmp_path / "adapter")
        torch.testing.assert_close(logits(again, batch), adapted, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="size mismatch"):  # an adapter of the pruned model on the dense one
            peft.PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter")

        torch.testing.assert_close(logits(copy.deepcopy(tuned).unload(), batch), plain, atol=1e-5, rtol=1e-5)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), adapted, atol=1e-4, rtol=1e-4)
        assert type(merged) is type(base)
        save_pretrained(merged, tmp_path / "merged")
        assert holds(tmp_path / "merged", merged)

    def test_a_model_with_an_adapter_inside_is_not_saved_as_if_it_were_plain(self, tmp_path):
        model = shrunk("llama")
        model.add_adapter(peft.LoraConfig(r=2))
        with pytest.raises((SaveError, TypeError)):
            save_pretrained(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
