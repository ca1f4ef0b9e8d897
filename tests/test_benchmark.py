import json
from dataclasses import asdict

import pytest
import torch
from tiny import FAMILIES, VOCAB, tiny_model
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_prune.benchmark import (
    Latency,
    Measurement,
    compare,
    comparison_table,
    disk_bytes,
    example_inputs,
    load_checkpoint,
    measure_latency,
    peak_memory,
)
from hf_prune.errors import ConfigError, PruningError
from hf_prune.tables import markdown_table, si_scale


def bert(layers: int = 2, neurons: int = 64) -> BertForSequenceClassification:
    return tiny_model("bert", num_hidden_layers=layers, intermediate_size=neurons)


class TestExampleInputs:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_family_runs_on_them(self, name):
        model = tiny_model(name)
        inputs = example_inputs(model, batch_size=3, sequence_length=7)
        with torch.inference_mode():
            logits = model(**inputs).logits
        assert len(logits) == 3
        assert logits.isfinite().all()

    @pytest.mark.parametrize("name", ["bart", "gpt2", "llama", "t5"])
    def test_classifiers_that_look_for_the_last_token_run_on_them(self, name):
        model = tiny_model(name, AutoModelForSequenceClassification)
        with torch.inference_mode():
            assert model(**example_inputs(model, 3, 7)).logits.shape == (3, model.config.num_labels)

    def test_same_seed_same_inputs(self):
        first, again, other = (example_inputs(bert(), 2, 8, seed)["input_ids"] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_special_ids_are_left_out(self):
        model = bert()
        model.config.eos_token_id = [7, 8]
        ids = example_inputs(model, 16, 64)["input_ids"]
        assert set(ids.flatten().tolist()) <= set(range(3, VOCAB)) - {7, 8}

    def test_float_inputs_have_the_dtype_of_the_model(self):
        assert example_inputs(tiny_model("vit").to(torch.bfloat16), 1, 1)["pixel_values"].dtype == torch.bfloat16

    def test_a_sequence_longer_than_the_positions_is_refused(self):
        with pytest.raises(ConfigError, match="64 positions has no room for sequence_length=65"):
            example_inputs(bert(), 1, 65)

    def test_another_kind_of_input_is_refused(self):
        model = bert()
        model.main_input_name = "input_values"
        with pytest.raises(ConfigError, match="takes 'input_values'"):
            example_inputs(model, 1, 8)


class TestMeasureLatency:
    def test_figures(self):
        latency = measure_latency({"small": bert(1), "large": bert(8)}, 2, 16, repeats=10, warmup=1, threads=1)
        assert list(latency) == ["small", "large"]
        for run in latency.values():
            assert 0 < run.p50_ms <= run.p95_ms
            assert run == Latency(run.p50_ms, run.p95_ms, 2, 16, "cpu", 1, "float32")
        assert latency["small"].p50_ms < latency["large"].p50_ms

    def test_models_take_turns(self):
        calls: list[str] = []
        models = {name: bert(1) for name in "abc"}
        for name, model in models.items():
            model.register_forward_hook(lambda *_, name=name: calls.append(name))
        measure_latency(models, 1, 4, repeats=6, warmup=2)
        rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
        assert len(rounds) == 8
        assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
        assert len({tuple(order) for order in rounds}) > 1

    def test_models_and_threads_are_left_as_they_were(self):
        before, training, evaluating = torch.get_num_threads(), bert().train(), bert().eval()
        modes: list[bool] = []
        training.register_forward_hook(lambda module, *_: modes.append(module.training))
        measure_latency({"a": training, "b": evaluating}, 1, 4, repeats=1, warmup=0, threads=before + 1)
        assert modes == [False]
        assert (training.training, evaluating.training) == (True, False)
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(
        "wrong", [{"repeats": 0}, {"warmup": -1}, {"threads": 0}, {"batch_size": 0}, {"sequence_length": 0}]
    )
    def test_numbers_out_of_range_are_refused(self, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be a whole number of at least"):
            measure_latency({"a": bert()}, **{"batch_size": 1, "sequence_length": 4, **wrong})

    def test_no_model_is_refused(self):
        with pytest.raises(ConfigError, match="models must be a whole number of at least 1"):
            measure_latency({})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    bert(2).save_pretrained(folder / "dense")
    bert(2, neurons=16).save_pretrained(folder / "pruned")
    return {"dense": folder / "dense", "pruned": folder / "pruned"}


class TestDiskBytes:
    def test_is_the_size_of_the_weights(self, checkpoints):
        (checkpoints["dense"] / "pruning_mask.safetensors").write_bytes(b"a mask is no weight")
        folder = checkpoints["dense"]
        assert disk_bytes(folder) == (folder / "model.safetensors").stat().st_size
        assert disk_bytes(folder) >= 4 * bert(2).num_parameters()

    def test_shards_are_summed(self, tmp_path):
        bert(2).save_pretrained(tmp_path, max_shard_size="20KB")
        shards = list(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1
        assert disk_bytes(tmp_path) == sum(shard.stat().st_size for shard in shards)

    def test_missing_weights_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="has no config.json"):
            disk_bytes(tmp_path / "nowhere")
        bert().config.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"holds no model\*.safetensors"):
            disk_bytes(tmp_path)


class TestPeakMemory:
    def test_holds_weights_and_activations_and_not_the_libraries(self, tmp_path):
        model = bert(4, neurons=40_000)
        model.save_pretrained(tmp_path)
        weights = 4 * model.num_parameters()
        small, large = (peak_memory(tmp_path, batch, 8, device="cpu") for batch in (1, 64))
        assert 40e6 < weights < small < weights + 150e6
        # The neurons of one layer and their activation: 8 tokens each of 63 more examples.
        assert large - small > 4 * 40_000 * 8 * 63

    def test_failure_says_why(self, checkpoints):
        with pytest.raises(PruningError, match="no room for sequence_length=1000"):
            peak_memory(checkpoints["dense"], 1, 1000)

    def test_wrong_arguments_are_refused(self, checkpoints, tmp_path):
        with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1, got 0"):
            peak_memory(checkpoints["dense"], 0)
        with pytest.raises(ConfigError, match="has no config.json"):
            peak_memory(tmp_path)


class TestLoadCheckpoint:
    def test_loads_the_class_that_was_saved(self, checkpoints):
        model = load_checkpoint(checkpoints["dense"], device="cpu")
        assert type(model) is BertForSequenceClassification
        assert not model.training

    def test_an_unknown_architecture_is_refused(self, tmp_path):
        config = bert().config
        config.architectures = ["NoSuchModel"]
        config.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="names NoSuchModel as its architecture"):
            load_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def rows(checkpoints):
    scores = {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.88}}
    return compare(checkpoints, batch_sizes=(1, 2), sequence_length=8, repeats=3, scores=scores, device="cpu")


class TestCompare:
    def test_figures(self, rows, checkpoints):
        dense, pruned = rows
        assert [row.name for row in rows] == ["dense", "pruned"]
        assert dense.parameters == bert(2).num_parameters()
        assert dense.parameters - pruned.parameters == 2 * (64 - 16) * (2 * 32 + 1)
        # A neuron costs 2·n·d, and each of two layers has 48 fewer.
        assert dense.macs - pruned.macs == 2 * 48 * 2 * 8 * 32
        assert dense.disk_bytes == disk_bytes(checkpoints["dense"])
        assert [run.batch_size for run in pruned.latency] == [1, 2]
        assert all(row.peak_memory_bytes > 0 for row in rows)
        assert pruned.scores == {"accuracy": 0.88}

    def test_rows_are_json(self, rows):
        data = json.loads(json.dumps([asdict(row) for row in rows]))
        assert data[1]["latency"][1]["sequence_length"] == 8

    def test_wrong_arguments_are_refused(self, checkpoints, tmp_path):
        with pytest.raises(ConfigError, match="checkpoints must be a whole number of at least 1"):
            compare({})
        with pytest.raises(ConfigError, match="batch_sizes must be a whole number of at least 1, got 0"):
            compare(checkpoints, batch_sizes=(4, 0))
        with pytest.raises(ConfigError, match=r"scores are given for \['prunde'\]"):
            compare(checkpoints, scores={"prunde": {}})
        with pytest.raises(ConfigError, match="has no config.json"):
            compare({"dense": tmp_path})


def test_comparison_table():
    def row(name: str, factor: float, accuracy: float) -> Measurement:
        runs = [Latency(20 * factor, 25 * factor, batch, 16, "cpu", 2, "float32") for batch in (1, 8)]
        return Measurement(
            name, int(20e6 * factor), 3e9 * factor, int(80e6 * factor), 500, runs, {"accuracy": accuracy}
        )

    table = comparison_table([row("dense", 1.0, 0.9), row("pruned", 0.5, 0.88)])
    lines = table.splitlines()
    assert lines[0] == "|  | dense | pruned | pruned vs dense |"
    assert lines[2] == "| accuracy | 0.9000 | 0.8800 | -0.0200 |"
    assert "| parameters | 20.00 M | 10.00 M | 0.50× |" in lines
    assert "| MACs per example | 3.00 G | 1.50 G | 0.50× |" in lines
    assert "| weights on disk | 80.00 MB | 40.00 MB | 0.50× |" in lines
    assert "| latency p95, batch 8 | 25.00 ms | 12.50 ms | 0.50× |" in lines
    assert lines[-1] == "16 tokens, float32, CPU, 2 threads; peak memory at batch 8, libraries excluded."


@pytest.mark.parametrize(
    ("number", "scale"), [(2.5e9, ("G", 1e9)), (1e6, ("M", 1e6)), (1500, ("k", 1e3)), (999, ("", 1.0)), (0, ("", 1.0))]
)
def test_si_scale(number, scale):
    assert si_scale(number) == scale


def test_bars_in_a_cell_are_escaped_once():
    assert markdown_table(["", "n"], [["a|b", r"c\|d"]]) == "|  | n |\n| --- | --: |\n| a\\|b | c\\|d |"
