"""Checkpoints with the code that loads them: what is written, and loading them beside hf_prune."""

import json

import pytest
import torch
import transformers as T
from folders import snapshot
from pruned import SOME, logits, shrunk
from tiny import auto, tiny_batch

from hf_prune import PruningMask, apply_mask, layout, prunable_units, save_pretrained, shrink
from hf_prune.hub import standalone

pytestmark = pytest.mark.usefixtures("remote_code_stays_in")


class TestStandalone:
    @pytest.mark.parametrize("name", SOME)
    def test_the_code_is_listed_for_every_auto_class(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path, standalone=True)
        found = json.loads((tmp_path / "config.json").read_text())
        autos = standalone.auto_classes(model.config.model_type)
        assert found["auto_map"] == {auto: f"modeling_hf_prune.{cls}" for auto, cls in autos.items()}
        assert type(model).__name__ in autos.values()
        code = (tmp_path / "modeling_hf_prune.py").read_text()
        compile(code, "modeling_hf_prune.py", "exec")
        assert (
            "hf_prune." not in code.replace("config.hf_prune", "").replace("update hf_prune.", "")
            and "import hf_prune" not in code
        )

    def test_a_later_plain_save_does_not_leave_code_behind(self, tmp_path, new):
        save_pretrained(new, tmp_path, standalone=True)
        save_pretrained(new, tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
        assert set(snapshot(tmp_path)) == {"config.json", "model.safetensors"}

    def test_the_code_refuses_hostile_layouts_too(self, tmp_path, new):
        save_pretrained(new, tmp_path, standalone=True)
        found = json.loads((tmp_path / "config.json").read_text())
        found["hf_prune"]["numbers"]["encoder.layer.0.output.dense.in_features"] = 10**12
        (tmp_path / "config.json").write_text(json.dumps(found))
        layout.disable()
        try:
            with pytest.raises(ValueError, match="encoder.layer.0.output.dense.in_features"):
                T.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
        finally:
            layout.enable()


class TestStandaloneBesideHfPrune:
    """Remote code and hf_prune in one process: the layout is applied by both."""

    @pytest.mark.parametrize("name", ["bert", "phi3", "gpt_neox", "t5"])
    def test_loads_prunes_and_saves(self, tmp_path, name):
        model, batch = shrunk(name), tiny_batch(name)
        save_pretrained(model, tmp_path / "first", standalone=True)
        again = auto(name).from_pretrained(tmp_path / "first", trust_remote_code=True)
        assert type(again).__module__.startswith("transformers_modules.")
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)
        save_pretrained(again, tmp_path / "again", standalone=True)

        units = prunable_units(again)  # the last layer only: the first keeps what the remote code made of it
        last = [g for g in units.of_kind("heads", "neurons") if g.layer == 1 and g.prunable and g.size > 1]
        apply_mask(again, PruningMask({g.name: torch.arange(g.size) > 0 for g in last}, units))
        masked = logits(again, batch)
        shrink(again)
        for folder, options in (("plain", {}), ("standalone", {"standalone": True})):
            save_pretrained(again, tmp_path / folder, **options)
            for trust in (False, True):
                loaded = auto(name).from_pretrained(tmp_path / folder, trust_remote_code=trust)
                torch.testing.assert_close(logits(loaded, batch), masked, atol=1e-5, rtol=1e-5)
