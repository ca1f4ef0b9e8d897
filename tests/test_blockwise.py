"""The engine: block by block is what a naive recomputation finds; what a run says; bad input."""

import copy
import json

import accelerate
import pytest
import torch
import transformers
from pruned import same, weights
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn
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
from hf_prune.methods.weights import keep_highest, wanda_score
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
