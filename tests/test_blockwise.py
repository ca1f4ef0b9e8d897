"""The engine: block by block is what a naive recomputation finds; interruptions, offloading, bad input."""

import copy
import json
import multiprocessing
import os
import signal

import accelerate
import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import hf_prune
from hf_prune import (
    CalibrationError,
    ConfigError,
    SparseGPTConfig,
    UnsupportedModelError,
    WandaConfig,
    WeightMagnitudeConfig,
)
from hf_prune.block_walk import _Stream
from hf_prune.methods import SparseGPTPruner, WandaPruner
from hf_prune.methods.weights import keep_highest, wanda_score
from hf_prune.run_files import run_folder
from hf_prune.units import base_model


def naive_wanda(model, batches, sparsity):
    """For each block a whole forward pass through all that is pruned so far; no padding."""
    keep, names = {}, {module: name for name, module in model.named_modules()}
    for stack in hf_prune.prunable_units(model).stacks:
        for layer in base_model(model).get_submodule(stack):
            modules = [m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
            squares, handles = {}, []

            def hook(module, args, squares=squares):
                inputs = args[0].double()
                times = len(batch_rows(batches[0])) if inputs.dim() > 2 and len(inputs) == 1 else 1
                total = inputs.reshape(-1, inputs.shape[-1]).square().sum(0) * times
                squares[module] = squares.get(module, 0) + total

            for module in modules:
                handles.append(module.register_forward_pre_hook(hook))
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            for handle in handles:
                handle.remove()
            for module in modules:
                conv = isinstance(module, Conv1D)
                weight = module.weight.data.T if conv else module.weight.data
                kept = keep_highest(wanda_score(weight, squares[module]), sparsity)
                weight *= kept
                keep[f"{names[module]}.weight"] = kept.T if conv else kept
    return hf_prune.WeightMask(keep)


def batch_rows(batch):
    return next(iter(batch.values()))


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_naive_recomputation(name):
    batches = [tiny_batch(name, size=4, seed=seed) for seed in range(2)]
    model, reference = tiny_model(name), tiny_model(name)
    mask = hf_prune.prune(model, WandaConfig(sparsity=0.5), batches).mask
    assert mask == naive_wanda(reference, batches, 0.5)
    assert same(weights(model), weights(reference))


def test_no_layer_runs_more_often_than_twice_a_batch():
    model, batches = tiny_model("llama"), [tiny_batch("llama", seed=seed) for seed in range(2)]
    calls, ends = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        layer.mlp.down_proj.register_forward_hook(lambda *_: ends.append(1))
    hf_prune.prune(model, WandaConfig(sparsity=0.5), batches)
    # The first layer hands over once what layers return; what comes out of the last is not needed. What down_proj
    # computes is needed in the second pass only, and in the first batch, which shows that nothing follows it.
    assert len(calls) == 3 * 2 + 2 * 2 + 6  # the replaced layers of two passes that enter are called too
    assert len(ends) == 3 + 2 * 2 + 1


def test_conv1d_is_a_transposed_linear():
    batches = [tiny_batch("gpt2", size=16, padded=True)]
    for config in (WandaConfig(sparsity=0.5), WandaConfig(pattern="2:4"), SparseGPTConfig(sparsity=0.5)):
        conv, linear = tiny_model("gpt2"), tiny_model("gpt2")
        for layer in linear.transformer.h:
            for owner, name in (
                (layer.attn, "c_attn"),
                (layer.attn, "c_proj"),
                (layer.mlp, "c_fc"),
                (layer.mlp, "c_proj"),
            ):
                old = getattr(owner, name)
                new = nn.Linear(*old.weight.shape)
                new.weight, new.bias = nn.Parameter(old.weight.data.T.clone()), old.bias
                setattr(owner, name, new)
        first, second = (hf_prune.prune(m, config, batches).mask for m in (conv, linear))
        assert first.sparsity() == pytest.approx(0.5, abs=0.01)
        assert all(torch.equal(first[key], second[key].T) for key in first)


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


class TwinLlama(transformers.LlamaForCausalLM):
    """A model that ties two of its projections."""

    _tied_weights_keys = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }


class TestBadInput:
    def refused(self, model, config, error, match, data=None):
        dense = weights(model)
        with pytest.raises(error, match=match):
            hf_prune.prune(model, config, data if data is not None else [tiny_batch("llama", size=8)])
        assert same(weights(model), dense)

    def test_activations_that_are_not_finite(self):
        model = tiny_model("llama")
        model.model.layers[1].mlp.down_proj.weight.data[:] = 3e38
        self.refused(
            model, WandaConfig(sparsity=0.5), CalibrationError, "inputs of model.layers.2.self_attn.q_proj are NaN"
        )

    def test_a_pattern_that_does_not_divide_the_inputs(self):
        model = tiny_model("llama")
        self.refused(model, WandaConfig(pattern="2:5"), ConfigError, "q_proj has 32 inputs, no multiple of the 5")

    @pytest.mark.parametrize("pattern", ["layers.9.*", "lm_head", "model.embed_tokens"])
    def test_patterns_that_match_nothing(self, pattern):
        self.refused(
            tiny_model("llama"), WandaConfig(sparsity=0.5, exclude=(pattern,)), ConfigError, "Unknown pattern"
        )

    def test_nothing_left(self):
        self.refused(
            tiny_model("llama"), WandaConfig(sparsity=0.5, exclude=("*",)), ConfigError, "nothing left to prune"
        )

    def test_a_text_file_instead_of_texts(self):
        self.refused(
            tiny_model("llama"), WandaConfig(sparsity=0.5), CalibrationError, "are one str: give a list", "missing.txt"
        )

    def test_mixtures_of_experts(self):  # their experts are no nn.Linear
        config = transformers.MixtralConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_local_experts=2
        )
        with pytest.raises(UnsupportedModelError, match="Unknown model_type 'mixtral'"):
            hf_prune.prune(
                transformers.MixtralForCausalLM(config), WandaConfig(sparsity=0.5), [tiny_batch("llama", size=8)]
            )

    def test_no_data(self):
        for config in (WandaConfig(sparsity=0.5), WeightMagnitudeConfig(sparsity=0.5, ratios="owl")):
            with pytest.raises(CalibrationError, match="needs calibration data"):
                hf_prune.prune(tiny_model("llama"), config)

    def test_shared_weights(self):
        model = tiny_model("llama")
        first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
        last.up_proj.weight = first.up_proj.weight
        self.refused(
            model, WandaConfig(sparsity=0.5), UnsupportedModelError, "layers.0.mlp.up_proj.weight and .* share one"
        )
        for config in (WandaConfig(sparsity=0.5, exclude=("*.up_proj",)),):
            mask = hf_prune.prune(model, config, [tiny_batch("llama")]).mask
            assert len(mask) == 18

    @pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "device_map"])
    def test_shared_weights_that_are_offloaded(self, tmp_path, offload):
        model = TwinLlama(tiny_model("llama", tie_word_embeddings=True).config)
        assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
        if offload == "device_map":
            model.save_pretrained(tmp_path / "dense")
            places = {"model.embed_tokens": 0, "model.layers": "disk", "model.norm": 0, "model.rotary_emb": 0}
            places = {key: "cpu" if value == 0 else value for key, value in places.items()} | {"lm_head": "cpu"}
            model = TwinLlama.from_pretrained(tmp_path / "dense", device_map=places, offload_folder=tmp_path / "disk")
        elif offload == "disk_offload":
            accelerate.disk_offload(model, str(tmp_path / "disk"))
        else:
            accelerate.cpu_offload(model)
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
        with pytest.raises(UnsupportedModelError, match="layers.0.mlp.up_proj.weight and .* share one"):
            hf_prune.prune(model, WandaConfig(sparsity=0.5), [tiny_batch("llama")])

    def test_weights_that_came_to_be_shared_and_are_offloaded(self, tmp_path):
        models = tiny_model("llama"), tiny_model("llama")
        for model in models:
            model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(UnsupportedModelError, match="layers.0.mlp.up_proj.weight and .* share one"):
            hf_prune.prune(accelerate.cpu_offload(models[0]), WandaConfig(sparsity=0.5), [tiny_batch("llama")])
        # In files these are two weights.
        model = accelerate.disk_offload(models[1], str(tmp_path / "disk"))
        hf_prune.prune(model, WandaConfig(sparsity=0.5), [tiny_batch("llama")]).mask.check(model)

    def test_an_expert_that_sees_no_token_is_left_alone(self, caplog):
        model = tiny_model("llama")
        model.model.layers[1].mlp.spare = nn.Linear(32, 16)
        dense = model.model.layers[1].mlp.spare.weight.detach().clone()
        result = hf_prune.prune(model, SparseGPTConfig(sparsity=0.5), [tiny_batch("llama", size=8)])
        assert "No token of the calibration data reached model.layers.1.mlp.spare: it is left" in caplog.text
        assert torch.equal(model.model.layers[1].mlp.spare.weight, dense)
        assert result.mask["model.layers.1.mlp.spare.weight"].all()


@pytest.mark.parametrize(
    "pattern, count", [("layers.0.*", 14), ("model.layers.0.*", 14), ("*.down_proj", 18), ("*.up_proj.weight", 18)]
)
def test_excluded_projections_stay_dense(pattern, count):
    model = tiny_model("llama")
    dense = weights(model)
    mask = hf_prune.prune(model, WandaConfig(sparsity=0.5, exclude=(pattern,)), [tiny_batch("llama", size=8)]).mask
    assert len(mask) == count
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items() if key not in mask)


def test_nothing_is_as_large_as_the_longest_context():
    model = tiny_model("llama", max_position_embeddings=10**15)
    assert hf_prune.prune(model, WandaConfig(sparsity=0.5), [tiny_batch("llama")]).mask.sparsity() == 0.5


def test_a_model_is_pruned_further():
    model, data = tiny_model("llama"), [tiny_batch("llama", size=8)]
    first = hf_prune.prune(model, WandaConfig(sparsity=0.5), data)
    second = hf_prune.prune(model, WandaConfig(sparsity=0.75), data)
    assert (first.mask & second.mask) == second.mask  # what is zero goes first
    assert second.report.before["nonzero"] == first.report.after["nonzero"]


def test_the_log_and_the_report_say_that_zeros_are_not_speed(caplog):
    model = tiny_model("llama")
    report = hf_prune.prune(model, WandaConfig(sparsity=0.5), [tiny_batch("llama", size=8)]).report
    speed, memory = caplog.messages
    assert "statistics of a block" in memory and "to solve a matrix" in memory
    assert "Zeros in dense tensors make a model neither smaller nor faster" in speed
    assert memory.startswith("Pruning 21 matrices in 3 blocks. Memory beside the model")
    assert str(report).startswith("wanda: 50.00% of 27,648 weights in 21 matrices are zero, ")
    assert str(report).endswith("Zeros in dense tensors make a model neither smaller nor faster.")
    zeros = sum(int((m.weight == 0).sum()) for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert sum(row["zeros"] for row in report.weights) == zeros == 27_648 // 2
    assert report.after["nonzero"] == report.before["nonzero"] - zeros and report.ratio("macs") == 1
    assert hf_prune.PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("ratios", ["uniform", "owl"])
def test_memory_is_estimated_before_a_block_runs(caplog, ratios):
    model, told = tiny_model("llama"), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: told.append("Memory beside the model" in caplog.text))
    batches = [tiny_batch("llama", size=8, seed=seed) for seed in range(3)]
    hf_prune.prune(model, WandaConfig(sparsity=0.5, ratios=ratios), batches)
    assert told.index(True) == 1 and all(told[1:])  # one call of the first layer shows what layers return
    assert caplog.text.count("Memory beside the model") == 1


def test_training_mode_and_copies_survive():
    model = hf_prune.prunable(tiny_model("bert")).train()
    model.prune(WandaConfig(sparsity=0.5), [tiny_batch("bert")])
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert same(weights(copy.deepcopy(model)), weights(model))
