"""`prunable` and the auto classes."""

import copy
import pickle

import pytest
import torch
import transformers
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import MagnitudeConfig

AUTO = [name for name in hf_prune.__all__ if name.startswith("AutoPrunable")]


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch("bert")).logits


def test_prunable_changes_the_class_of_one_object_only():
    model, other = tiny_model("bert"), tiny_model("bert")
    cls = type(model)
    assert hf_prune.prunable(model) is model is hf_prune.prunable(model)
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__ and type(model).__module__ == cls.__module__
    assert type(other) is cls and not hasattr(cls, "prune")
    assert type(hf_prune.prunable(other)) is type(model)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_survives_copies(twin):
    model = hf_prune.prunable(tiny_model("bert"))
    model.prune(MagnitudeConfig(budget={"macs": 0.6}))
    again = twin(model)
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))
    again.shrink()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


def test_it_survives_peft():
    from peft import LoraConfig, get_peft_model

    model = hf_prune.prunable(tiny_model("bert"))
    model.prune(MagnitudeConfig(budget={"macs": 0.6}))
    model.shrink()
    before = logits(model)
    merged = get_peft_model(model, LoraConfig(target_modules=["query", "value"])).merge_and_unload()
    assert type(merged) is type(model) and torch.allclose(logits(merged), before, atol=1e-6)
    merged.prune(MagnitudeConfig(budget={"params": 0.9}))


def test_the_report_and_the_mask_are_saved_beside_the_model(tmp_path):
    model = hf_prune.prunable(tiny_model("bert"))
    result = model.prune(MagnitudeConfig(budget={"macs": 0.6}))
    model.shrink()
    model.save_pretrained(tmp_path / "out")
    assert hf_prune.PruningReport.load(tmp_path / "out") == result.report
    assert hf_prune.PruningMask.load(tmp_path / "out") == result.mask
    assert f"MACs {result.report.ratio('macs'):.1%} (n = 128 tokens)" in str(result.report)
    newer = {**result.report.to_dict(), "a_field_of_a_newer_version": 1}
    assert hf_prune.PruningReport.from_dict(newer) == result.report
    with pytest.raises(hf_prune.PruningError, match="Not a pruning report"):
        hf_prune.PruningReport.from_dict({"method": "kcm"})


def test_configs_survive_json_and_refuse_what_they_do_not_know():
    config = hf_prune.KCMConfig(budget={"macs": 0.6}, exclude=["*.0.*"], sigma="median")
    assert hf_prune.PruningConfig.from_dict(config.to_dict()) == config
    with pytest.raises(hf_prune.ConfigError, match="Unknown option of KCMConfig 'sigmo'. Did you mean 'sigma'"):
        hf_prune.PruningConfig.from_dict({**config.to_dict(), "sigmo": 1})
    with pytest.raises(hf_prune.ConfigError, match="Unknown pruning method 'kcmm'. Did you mean 'kcm'"):
        hf_prune.PruningConfig.from_dict({**config.to_dict(), "method": "kcmm"})
    with pytest.raises(hf_prune.ConfigError, match="KCMConfig needs a budget"):
        hf_prune.PruningConfig.from_dict({"method": "kcm"})


@pytest.mark.parametrize(
    "cls, options",
    [
        (hf_prune.KCMConfig, {"sigma": 0}),
        (hf_prune.KCMConfig, {"sigma": "mean"}),
        (hf_prune.KCMConfig, {"alpha": float("nan")}),
        (hf_prune.KCMConfig, {"r2": "exact"}),
        (hf_prune.KCMConfig, {"recover": None}),
        (hf_prune.KCMConfig, {"max_iterations": 0}),
        (hf_prune.RandomConfig, {"seed": -1}),
        (hf_prune.MagnitudeConfig, {"allocation": "layer"}),
        (hf_prune.MagnitudeConfig, {"multiple_of": 0}),
        (hf_prune.MagnitudeConfig, {"exclude": "layers.0"}),
        (hf_prune.MagnitudeConfig, {"sequence_length": -3}),
        (hf_prune.MagnitudeConfig, {"budget": {"macs": 1.5}}),
    ],
)
def test_options_out_of_range_name_themselves(cls, options):
    with pytest.raises(hf_prune.ConfigError, match=next(iter(options))):
        cls(**{"budget": {"macs": 0.5}, **options})


def test_a_method_is_one_class_and_one_line():
    from hf_prune.methods import base

    class FirstConfig(hf_prune.PruningConfig):
        pass

    with pytest.raises(hf_prune.ConfigError, match="lower-case identifier"):
        hf_prune.register_pruner("First", FirstConfig)

    @hf_prune.register_pruner("first", FirstConfig)
    class First(hf_prune.Pruner):
        needs_data = False

        def prune(self, model, units, calibrator):
            selector = self.selector(model, units, calibrator)
            return selector.select({g.name: -torch.arange(g.size) * selector.unit_weight(g) for g in selector.groups})

    try:
        mask = hf_prune.prune(tiny_model("bert"), FirstConfig(budget={"macs": 0.6})).mask
        assert all(vector[: int(vector.sum())].all() for vector in mask.values())
        with pytest.raises(hf_prune.ConfigError, match="collides with the method 'first'"):

            @hf_prune.register_pruner("second", FirstConfig)
            class Second(hf_prune.Pruner):
                pass
    finally:
        del base._PRUNERS["first"]


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_follow_those_of_transformers(name):
    cls = getattr(hf_prune, name)
    assert cls.auto_class == name.replace("Prunable", "")
    family = {"Seq2SeqLM": "bart", "SpeechSeq2Seq": "whisper", "ImageClassification": "vit", "CausalLM": "gpt2"}
    tiny = tiny_model(family.get(name.partition("For")[2], "bert"), transformers.AutoModel)
    model = cls.from_config(tiny.config)
    assert isinstance(model, hf_prune.PruningMixin)
    with pytest.raises(OSError, match="is made with from_pretrained"):
        cls()


def test_auto_classes_load_safetensors_and_no_pickle(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "safe")
    again = hf_prune.AutoPrunableModelForSequenceClassification.from_pretrained(tmp_path / "safe")
    assert torch.equal(logits(again), logits(model))
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model.safetensors"):
        hf_prune.AutoPrunableModelForSequenceClassification.from_pretrained(tmp_path / "pickled")


def test_names_of_their_own_are_not_overwritten():
    model = tiny_model("bert")
    model.prune = lambda: None
    with pytest.raises(hf_prune.UnsupportedModelError, match="attribute 'prune' of its own"):
        hf_prune.prunable(model)
