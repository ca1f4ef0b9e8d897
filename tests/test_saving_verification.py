"""What was saved is loaded and compared before it takes the place of the old folder."""

import json
from pathlib import Path

import pytest
import torch
import transformers as T
from folders import holds, raising, snapshot
from tiny import tiny_model

from hf_prune import layout, save_pretrained
from hf_prune.errors import SaveError
from hf_prune.hub import saving

pytestmark = pytest.mark.usefixtures("remote_code_stays_in")


class TestVerification:
    def spoil(self, monkeypatch, change):
        stock = T.PreTrainedModel.save_pretrained

        def function(self, directory, *args, **options):
            stock(self, directory, *args, **options)
            change(Path(directory))

        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", function)

    def refused(self, model, folder, match, **options):
        before = snapshot(folder)
        with pytest.raises(SaveError, match=match):
            save_pretrained(model, folder, **options)
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize("options", [{}, {"standalone": True}], ids=["plain", "standalone"])
    def test_another_weight(self, folder, new, monkeypatch, options):
        stock = T.PreTrainedModel.save_pretrained

        def function(self, directory, state_dict, **more):
            state_dict["classifier.bias"] = state_dict["classifier.bias"] + 1e-6
            stock(self, directory, state_dict=state_dict, **more)

        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", function)
        self.refused(new, folder, "classifier.bias", **options)

    def test_a_missing_weight(self, folder, new, monkeypatch):
        stock = T.PreTrainedModel.save_pretrained

        def function(self, directory, state_dict, **more):
            del state_dict["classifier.weight"]
            stock(self, directory, state_dict=state_dict, **more)

        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", function)
        self.refused(new, folder, "classifier.weight")

    def test_truncated_weights(self, folder, new, monkeypatch):
        def cut(directory):
            file = directory / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])

        self.spoil(monkeypatch, cut)
        self.refused(new, folder, "does not load again")

    def test_a_broken_config(self, folder, new, monkeypatch):
        self.spoil(monkeypatch, lambda directory: (directory / "config.json").write_text("{"))
        self.refused(new, folder, "does not load again")

    def test_a_layout_that_does_not_fit(self, folder, new, monkeypatch):
        def widen(directory):
            found = json.loads((directory / "config.json").read_text())
            found["hf_prune"]["numbers"].pop("encoder.layer.0.output.dense.in_features")
            (directory / "config.json").write_text(json.dumps(found))

        self.spoil(monkeypatch, widen)
        self.refused(new, folder, "does not load again")

    def test_state_that_no_file_holds(self, folder, new):
        new.bert.encoder.layer[0].attention.self.scaling = 3.0
        self.refused(new, folder, "computes something else")

    def test_a_hook_that_the_file_does_not_hold(self, folder, new):
        new.classifier.register_forward_hook(lambda module, args, output: output + 1)
        self.refused(new, folder, "computes something else")

    def test_a_reloaded_model_that_does_not_run(self, folder, new, monkeypatch):
        reload = saving._reload

        def broken(*args):
            model = reload(*args)
            model.forward = raising(RuntimeError("shapes cannot be multiplied"))
            return model

        monkeypatch.setattr(saving, "_reload", broken)
        self.refused(new, folder, "shapes cannot be multiplied")

    def test_disabled_layouts_fail_here_not_at_the_user(self, folder, new):
        layout.disable()
        try:
            self.refused(new, folder, "does not load again")
        finally:
            layout.enable()

    def test_saving_standalone_does_not_enable_what_was_disabled(self, tmp_path, new):
        layout.disable()
        try:
            save_pretrained(new, tmp_path / "out", standalone=True)
            assert not hasattr(T.PreTrainedModel.post_init, "_hf_prune")
        finally:
            layout.disable()
            layout.enable()

    def test_a_family_whose_inputs_are_unknown_is_saved_with_a_warning(self, tmp_path, new, monkeypatch):
        new.main_input_name = "input_values"
        warnings = []
        monkeypatch.setattr(saving.logger, "warning", lambda message, *args: warnings.append(message))
        save_pretrained(new, tmp_path / "out")
        assert any("not compared" in message for message in warnings)
        del new.main_input_name
        assert holds(tmp_path / "out", new)

    def test_corrupted_weights_are_refused_at_load(self, tmp_path, new):
        """A file that was damaged later."""
        save_pretrained(new, tmp_path)
        file = tmp_path / "model.safetensors"
        whole = file.read_bytes()
        for broken in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 16 + whole[16:]):
            file.write_bytes(broken)
            with pytest.raises(Exception, match="(?i)safetensor|header|incomplete|invalid|metadata|corrupt"):
                T.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_mixed_dtypes_are_told_apart_from_other_mismatches(tmp_path):
    model = tiny_model("bert").to(torch.bfloat16)
    model.bert.encoder.layer[0].output.LayerNorm.float()
    model.bert.encoder.layer[0].output.LayerNorm.weight.data += 1e-4  # what bfloat16 can't hold
    with pytest.raises(SaveError, match="layer.0.output.LayerNorm.* is torch.float32 in memory and torch.bfloat16"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
