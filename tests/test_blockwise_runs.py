"""Runs of the engine: models that are offloaded, files that wait on disk, interruptions."""

import multiprocessing
import os
import signal

import accelerate
import pytest
import torch
from pruned import same, weights
from tiny import FAMILIES, tiny_batch, tiny_model
from torch.utils._pytree import tree_leaves

import hf_prune
from hf_prune import ConfigError, SparseGPTConfig, UnsupportedModelError, WandaConfig, WeightMagnitudeConfig
from hf_prune.block_walk import _Stream
from hf_prune.methods import SparseGPTPruner, WandaPruner
from hf_prune.run_files import run_folder
from hf_prune.units import base_model


class TestOffloading:
    config = WandaConfig(sparsity=0.5)

    def check(self, model, name="llama", config=None):
        data = [tiny_batch(name, size=16, padded=True)]
        plain = tiny_model(name)
        expected = hf_prune.prune(plain, config or self.config, data)
        result = hf_prune.prune(model, config or self.config, data)
        assert result.mask == expected.mask
        result.mask.check(model)
        assert result.report.weights == expected.report.weights
        assert all(
            p.is_meta
            for p in base_model(model).get_submodule(next(iter(hf_prune.prunable_units(model).stacks))).parameters()
        )
        with torch.no_grad():
            assert torch.allclose(model(**data[0]).logits, plain(**data[0]).logits, atol=1e-5)
        return plain

    @pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper"])
    def test_in_memory(self, name):
        self.check(accelerate.cpu_offload(tiny_model(name), execution_device="cpu"), name)

    def test_on_disk(self, tmp_path):
        model = accelerate.disk_offload(tiny_model("llama"), str(tmp_path / "disk"), execution_device="cpu")
        self.check(model, config=SparseGPTConfig(sparsity=0.5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_checkpoint_with_a_device_map(self, tmp_path, dtype):
        tiny_model("llama").to(dtype).save_pretrained(tmp_path / "dense")
        before = (tmp_path / "dense" / "model.safetensors").read_bytes()
        device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
        options = {"device_map": {**device_map, "model.rotary_emb": "cpu"}, "offload_folder": str(tmp_path / "disk")}
        model = FAMILIES["llama"][1].from_pretrained(tmp_path / "dense", dtype=dtype, **options)
        assert model.model.layers[0].mlp.down_proj.weight.is_meta
        plain = FAMILIES["llama"][1].from_pretrained(tmp_path / "dense", dtype=dtype)
        for each in (plain, model):
            hf_prune.prune(each, self.config, [tiny_batch("llama", size=8)])
        hf_prune.save_pretrained(model, tmp_path / "pruned")
        again = FAMILIES["llama"][1].from_pretrained(tmp_path / "pruned", dtype=dtype)
        assert same(weights(again), weights(plain))
        assert (tmp_path / "dense" / "model.safetensors").read_bytes() == before

    def test_masks_apply_to_offloaded_models(self):
        model = accelerate.cpu_offload(tiny_model("llama"), execution_device="cpu")
        mask = hf_prune.prune(tiny_model("llama"), WeightMagnitudeConfig(sparsity=0.5)).mask
        with pytest.raises(hf_prune.MaskError, match="are not zero"):
            mask.check(model)
        mask.apply(model)
        mask.check(model)

    def test_methods_that_cut_units_refuse(self):
        model = accelerate.cpu_offload(tiny_model("bert"), execution_device="cpu")
        with pytest.raises(UnsupportedModelError, match="is offloaded"):
            hf_prune.apply_mask(model, hf_prune.PruningMask({}, hf_prune.prunable_units(model)))
        with pytest.raises(UnsupportedModelError, match="is offloaded"):
            hf_prune.shrink(model)

    def test_broken_weights_are_found(self):
        model = tiny_model("llama")
        model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
        accelerate.cpu_offload(model, execution_device="cpu")
        with pytest.raises(UnsupportedModelError, match="layers.2.mlp.up_proj.weight are NaN or infinite"):
            hf_prune.prune(model, WandaConfig(sparsity=0.5), [tiny_batch("llama")])

    def test_after_an_error_the_log_says_what_is_pruned(self, monkeypatch, caplog):
        fail_at(monkeypatch, 9)
        model = accelerate.cpu_offload(tiny_model("llama"), execution_device="cpu")
        with pytest.raises(RuntimeError, match="stop"):
            hf_prune.prune(model, self.config, [tiny_batch("llama")])
        assert "1 of 3 blocks are pruned already" in caplog.text


class TestFilesOfARun:
    data = [tiny_batch("llama", size=8, padded=True, seed=seed) for seed in range(2)]

    @pytest.mark.parametrize("name", ["bart", "t5", "whisper", "gemma2"])
    def test_what_blocks_read_waits_on_disk(self, monkeypatch, tmp_path, name):
        data = [tiny_batch(name, size=4, padded=True, seed=seed) for seed in range(2)]
        expected = hf_prune.prune(tiny_model(name), WandaConfig(sparsity=0.5), data).mask
        call, tensors = _Stream._call, []

        def spied(self, *args):
            tensors.extend(
                value for value in tree_leaves([self.calls, self.hidden]) if isinstance(value, torch.Tensor)
            )
            return call(self, *args)

        monkeypatch.setattr(_Stream, "_call", spied)
        config = WandaConfig(sparsity=0.5, offload_folder=str(tmp_path / "hidden"))
        assert hf_prune.prune(tiny_model(name), config, data).mask == expected
        assert not tensors and not list((tmp_path / "hidden").iterdir())

    def test_what_an_error_puts_back_waits_on_disk(self, monkeypatch, tmp_path):
        model = tiny_model("llama")
        dense, solve, files = weights(model), SparseGPTPruner.solve, []

        def failing(self, *args):
            files[:] = [path.name for path in tmp_path.rglob("before-*")]
            if len(files) == 8:
                raise RuntimeError("stop")
            return solve(self, *args)

        monkeypatch.setattr(SparseGPTPruner, "solve", failing)
        with pytest.raises(RuntimeError, match="stop"):
            hf_prune.prune(model, SparseGPTConfig(sparsity=0.5, offload_folder=str(tmp_path)), self.data)
        assert "before-model.layers.1.self_attn.q_proj.weight.safetensors" in files
        assert same(weights(model), dense) and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("function", ["outlier_share", "wanda_score", "prune_blocks"])
    def test_an_error_leaves_nothing(self, monkeypatch, tmp_path, function):
        def failing(*args):
            assert len(list(tmp_path.rglob("*.safetensors"))) or function == "prune_blocks"
            raise KeyboardInterrupt("stop")

        monkeypatch.setattr(f"hf_prune.methods.weights.{function}", failing)
        config = WandaConfig(sparsity=0.5, ratios="owl", offload_folder=str(tmp_path))
        with pytest.raises(KeyboardInterrupt, match="stop") as caught:
            hf_prune.prune(tiny_model("llama"), config, self.data)
        assert caught.tb is not None and not list(tmp_path.iterdir())  # though the error holds all frames

    def test_what_a_killed_run_left_goes_with_the_next(self, tmp_path, caplog):
        config = WandaConfig(sparsity=0.5, offload_folder=str(tmp_path), checkpoint_dir=str(tmp_path / "blocks"))
        process = multiprocessing.get_context("fork").Process(target=killed_run, args=(config, self.data))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        (left,) = tmp_path.glob("hf_prune-run-*/")
        assert list(left.glob("*.safetensors"))
        (tmp_path / "hf_prune-run-notes.txt").write_text("of somebody else")
        (tmp_path / "tmp").mkdir()
        with run_folder(str(tmp_path)) as running:
            assert not left.exists() and f"Removed {left}" in caplog.text
            (running / "hidden").touch()
            result = hf_prune.prune(tiny_model("llama"), config, self.data)
            assert (running / "hidden").exists()  # another run that goes on
        assert result.mask == hf_prune.prune(tiny_model("llama"), WandaConfig(sparsity=0.5), self.data).mask
        assert {path.name for path in tmp_path.iterdir()} == {"hf_prune-run-notes.txt", "tmp", "blocks"}

    def test_a_folder_that_can_not_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        config = WandaConfig(sparsity=0.5, offload_folder=str(tmp_path / "file" / "hidden"))
        with pytest.raises(ConfigError, match="offload_folder .* can't be made"):
            hf_prune.prune(tiny_model("llama"), config, self.data)


def killed_run(config, data):
    solve, calls = WandaPruner.solve, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(self, *args)

    WandaPruner.solve = killed
    hf_prune.prune(tiny_model("llama"), config, data)


def fail_at(monkeypatch, count, error=RuntimeError, pruner=WandaPruner):
    """Let Wanda (or another method) fail at the count-th matrix."""
    solve, calls = pruner.solve, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == count:
            raise error("stop")
        return solve(self, *args)

    monkeypatch.setattr(pruner, "solve", failing)


class TestInterruptions:
    data = [tiny_batch("bart", size=4, padded=True, seed=seed) for seed in range(2)]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_the_model_is_as_it_was(self, monkeypatch, error):
        model = tiny_model("bart")
        dense = weights(model)
        fail_at(monkeypatch, 20, error)
        with pytest.raises(error):
            hf_prune.prune(model, WandaConfig(sparsity=0.5), self.data)
        assert same(weights(model), dense) and torch.is_grad_enabled()
        monkeypatch.undo()
        hf_prune.prune(
            model, WandaConfig(sparsity=0.5), self.data
        )  # nothing hangs on it that would hinder another run

    def test_the_model_is_as_it_was_where_all_weights_had_changed(self, monkeypatch, tmp_path):
        model = tiny_model("gpt2")  # whose matrices are transposed
        dense, data = weights(model), [tiny_batch("gpt2", size=8, seed=seed) for seed in range(2)]
        for count in (7, 3):  # the second time behind blocks of the first run
            with monkeypatch.context() as patch:
                fail_at(patch, count, pruner=SparseGPTPruner)
                with pytest.raises(RuntimeError):
                    hf_prune.prune(model, SparseGPTConfig(sparsity=0.5, checkpoint_dir=str(tmp_path)), data)
            assert same(weights(model), dense) and list(tmp_path.iterdir())

    @pytest.mark.parametrize("options", [{}, {"ratios": "owl"}])
    def test_a_run_continues_and_ends_bit_equal(self, monkeypatch, tmp_path, options):
        whole = tiny_model("bart")
        expected = hf_prune.prune(whole, WandaConfig(sparsity=0.5, **options), self.data)
        config = WandaConfig(sparsity=0.5, checkpoint_dir=str(tmp_path / "run"), **options)
        fail_at(monkeypatch, 30)  # in the decoder
        with pytest.raises(RuntimeError):
            hf_prune.prune(tiny_model("bart"), config, self.data)
        monkeypatch.undo()
        finished = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert finished == [f"block-000{index}.safetensors" for index in range(4)]
        fail_at(monkeypatch, 10**9)
        model = tiny_model("bart")
        result = hf_prune.prune(model, config, self.data)
        assert result.mask == expected.mask and same(weights(model), weights(whole))
        assert result.report.weights == expected.report.weights
        again = tiny_model("bart")
        monkeypatch.undo()
        fail_at(monkeypatch, 1)  # all is finished: nothing is solved again
        assert hf_prune.prune(again, config, self.data).mask == expected.mask
        assert same(weights(again), weights(whole))

    def test_sparsegpt_continues(self, tmp_path):
        config = SparseGPTConfig(sparsity=0.5, checkpoint_dir=str(tmp_path))
        batches = [tiny_batch("llama", size=8, seed=seed) for seed in range(2)]
        first, second = tiny_model("llama"), tiny_model("llama")
        hf_prune.prune(first, config, batches)
        (tmp_path / "block-0002.safetensors").unlink()
        hf_prune.prune(second, config, batches)
        assert same(weights(first), weights(second))

    def test_other_runs_and_other_weights_are_refused(self, tmp_path):
        config = WandaConfig(sparsity=0.5, checkpoint_dir=str(tmp_path))
        hf_prune.prune(tiny_model("llama"), config, [tiny_batch("llama")])
        other = tiny_model("llama", seed=2)
        dense = weights(other)
        for model, own, data in (
            (tiny_model("llama"), WandaConfig(sparsity=0.6, checkpoint_dir=str(tmp_path)), [tiny_batch("llama")]),
            (tiny_model("llama"), config, [tiny_batch("llama", seed=1)]),
            (other, config, [tiny_batch("llama")]),
            (tiny_model("llama", rms_norm_eps=1e-3), config, [tiny_batch("llama")]),
        ):
            with pytest.raises(ConfigError, match="checkpoint_dir .* holds blocks of a run"):
                hf_prune.prune(model, own, data)
        assert same(weights(other), dense)
        (tmp_path / "block-0000.safetensors").write_bytes(b"nothing")
        with pytest.raises(ConfigError, match="holds no pruned block"):
            hf_prune.prune(tiny_model("llama"), config, [tiny_batch("llama")])

    def test_a_model_that_was_saved_continues_the_run(self, tmp_path):
        config = WandaConfig(sparsity=0.5, checkpoint_dir=str(tmp_path / "run"))
        model = tiny_model("llama")
        hf_prune.prune(model, config, [tiny_batch("llama")])
        tiny_model("llama").save_pretrained(tmp_path / "dense")
        loaded = type(model).from_pretrained(tmp_path / "dense")
        hf_prune.prune(loaded, config, [tiny_batch("llama")])
        assert same(weights(loaded), weights(model))

    @pytest.mark.parametrize(
        "part",
        ["embed_tokens", "norm", "layers.0.input_layernorm", "layers.1.mlp.down_proj", "layers.1.self_attn.q_proj"],
    )
    def test_weights_that_are_not_pruned_belong_to_a_run(self, tmp_path, part):
        config = WandaConfig(sparsity=0.5, exclude=("*.down_proj",), checkpoint_dir=str(tmp_path))
        hf_prune.prune(tiny_model("llama", attention_bias=True), config, [tiny_batch("llama")])
        other = tiny_model("llama", attention_bias=True)
        list(other.model.get_submodule(part).parameters())[-1].data.add_(1)
        dense = weights(other)
        with pytest.raises(ConfigError, match="checkpoint_dir .* holds blocks of a run"):
            hf_prune.prune(other, config, [tiny_batch("llama")])
        assert same(weights(other), dense)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bart"])
    def test_an_offloaded_model_continues_the_run_of_a_resident_one(self, monkeypatch, tmp_path, name):
        config = WandaConfig(sparsity=0.5, checkpoint_dir=str(tmp_path / "run"))
        expected = hf_prune.prune(tiny_model(name), config, [tiny_batch(name)]).mask
        fail_at(monkeypatch, 1)
        for offload in (accelerate.cpu_offload, lambda *_: accelerate.disk_offload(*_, str(tmp_path / "disk"))):
            model = offload(tiny_model(name))
            assert hf_prune.prune(model, config, [tiny_batch(name)]).mask == expected

    def test_a_folder_that_can_not_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        config = WandaConfig(sparsity=0.5, checkpoint_dir=str(tmp_path / "file" / "run"))
        with pytest.raises(ConfigError, match="can't be made"):
            hf_prune.prune(tiny_model("llama"), config, [tiny_batch("llama")])
