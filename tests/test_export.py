import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import save_tiny
from tiny import tiny_batch, tiny_model
from transformers.exporters import DynamoExporter, ExportedModel

import hf_prune
from hf_prune import ConfigError, PruningError, export, export_model
from hf_prune.benchmark import compare, comparison_table


@pytest.fixture(scope="module")
def shrunk():
    """Models with other widths in each layer, and one layer less."""

    def make(name: str):
        model = tiny_model(name)
        units = hf_prune.prunable_units(model)
        keep = {}
        for seed, group in enumerate(units.values()):
            kept = torch.ones(group.size, dtype=torch.bool)
            if group.kind == "layers":
                kept[1] = False
            elif group.prunable:
                kept[: seed % group.size] = False
            keep[group.name] = kept
        return hf_prune.shrink(model, hf_prune.PruningMask(keep, units)) or model

    return make


@pytest.fixture(scope="module")
def exported(shrunk, tmp_path_factory):
    """A pruned BERT, and the folders of its exports."""
    model, folder = shrunk("bert"), tmp_path_factory.mktemp("exports")
    model.train()  # as a Trainer leaves it
    config = model.config.to_dict()
    for format in ("onnx", "torch"):
        export_model(model, folder / format, format)
    assert model.training and all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    return model.eval(), folder


def agree(model, run, name: str, sizes=((2, 11), (5, 3), (1, 20))) -> None:
    for size, length in sizes:
        batch = tiny_batch(name, size, length, padded=True)
        with torch.no_grad():
            expected = model(**batch).logits
        torch.testing.assert_close(run(**batch), expected, atol=1e-4, rtol=1e-4)


class TestFiles:
    def test_onnx_runtime_alone_runs_the_file(self, exported):
        import onnxruntime

        model, folder = exported
        session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
        assert all(isinstance(axis, str) for put in session.get_inputs() for axis in put.shape)  # dynamic

        def run(**batch):
            [logits] = session.run(["logits"], {name: x.numpy() for name, x in batch.items()})
            return torch.from_numpy(np.asarray(logits))

        agree(model, run, "bert")

    def test_torch_alone_runs_the_file(self, exported):
        model, folder = exported
        program = torch.export.load(folder / "torch" / "model.pt2").module()
        agree(model, lambda **batch: program(**batch)["logits"], "bert", [(2, 11), (5, 3)])

    @pytest.mark.parametrize("format", ["onnx", "torch"])
    def test_transformers_runs_the_folder(self, exported, format):
        model, folder = exported
        again = ExportedModel.from_pretrained(folder / format)
        agree(model, lambda **batch: again(**batch).logits, "bert")

    def test_what_is_written(self, exported):
        _, folder = exported
        assert {path.name for path in (folder / "onnx").iterdir()} == {
            "config.json",
            "export.json",
            "model.onnx",
            "model.onnx.data",
        }
        assert {path.name for path in (folder / "torch").iterdir()} == {"config.json", "export.json", "model.pt2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((name, "onnx") for name in ("distilbert", "vit", "gpt2", "llama", "t5", "bart", "whisper")),
        ("llama", "torch"),
        ("t5", "torch"),
    ],
)
def test_families(shrunk, tmp_path, name, format):
    model = shrunk(name)
    run = export_model(model, tmp_path, format)
    agree(model, lambda **batch: run(**batch).logits, name)


class TestErrors:
    def refuses(self, model, folder, error, message, format="torch"):
        with pytest.raises(error, match=message):
            export_model(model, folder, format)
        assert not folder.exists()

    def test_unknown_format(self, tmp_path):
        self.refuses(
            tiny_model("bert"), tmp_path / "out", ConfigError, "export format 'onx'. Did you mean 'onnx'", "onx"
        )

    def test_a_masked_model(self, tmp_path):
        model = tiny_model("bert")
        hf_prune.prune(model, hf_prune.RandomConfig(budget={"macs": 0.8}))
        self.refuses(model, tmp_path / "out", ConfigError, r"call shrink\(model\) first")

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(ConfigError, match="is a file"):
            export_model(tiny_model("bert"), tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_a_model_in_the_way(self, tmp_path):
        folder = save_tiny(tmp_path / "model", tokenizer=False)
        before = (tmp_path / "model" / "config.json").read_bytes()
        with pytest.raises(ConfigError, match="holds a model"):
            export_model(tiny_model("llama"), folder)
        assert (tmp_path / "model" / "config.json").read_bytes() == before

    def test_missing_packages(self, tmp_path, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name.startswith("onnx") else find(name, *a)
        )
        message = r"needs onnx, onnxscript, onnxruntime: pip install 'hf_prune\[onnx\]'"
        self.refuses(tiny_model("bert"), tmp_path / "out", PruningError, message, "onnx")

    def test_what_cannot_be_traced(self, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("data-dependent branch")

        monkeypatch.setattr(DynamoExporter, "export", fail)
        message = r"can't export a BertForSequenceClassification \(bert\) to torch: data-dependent branch"
        self.refuses(tiny_model("bert"), tmp_path / "out", PruningError, message)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda logits: logits + 0.01, "computes other logits than the model at batch 2, length 11"),
            (lambda logits: logits * float("nan"), "computes other logits"),
            (lambda logits: logits if len(logits) != 1 else logits[:, :1], "at batch 1, length 6"),
            (lambda logits: 1 / 0, "does not run at batch 2, length 11, nothing was written: division by zero"),
        ],
    )
    def test_a_graph_that_computes_something_else(self, tmp_path, monkeypatch, wrong, message):
        model = tiny_model("bert")

        def run(**inputs):
            return {"logits": wrong(model(**inputs).logits)}

        monkeypatch.setattr(DynamoExporter, "export", lambda *_: run)
        self.refuses(model, tmp_path / "out", PruningError, message)


class TestLatency:
    @pytest.fixture
    def graphs(self, monkeypatch):
        """In place of exports: the models themselves, with the session options that they were given."""
        found = []

        class Graph:
            device, dtype = torch.device("cpu"), torch.float32

            def __init__(self, model):
                self.model, self.calls = model, 0
                found.append(self)

            def to(self, session_options):
                self.threads = session_options.intra_op_num_threads

            def __call__(self, **inputs):
                self.calls += 1
                return self.model(**inputs)

        monkeypatch.setattr(export, "_exported", lambda model, format: Graph(model))
        return found

    def test_side_by_side(self, graphs):
        models = {"dense": tiny_model("bert"), "small": tiny_model("bert", intermediate_size=8)}
        at = export.measure_onnx_latency(models, (1, 3), 8, repeats=2, threads=2)
        assert [list(found) for found in at] == [["dense", "small"]] * 2
        assert [found["small"].batch_size for found in at] == [1, 3]
        latency = at[1]["dense"]
        assert (latency.sequence_length, latency.threads, latency.dtype) == (8, 2, "float32")
        assert 0 < latency.p50_ms <= latency.p95_ms
        assert [graph.calls for graph in graphs] == [10, 10] and [graph.threads for graph in graphs] == [2, 2]

    @pytest.mark.parametrize("wrong", [{"threads": 0}, {"repeats": 0}, {"batch_sizes": ()}, {"models": {}}])
    def test_bad_numbers(self, graphs, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be a whole number of at least 1"):
            export.measure_onnx_latency(**{"models": {"a": tiny_model("bert")}, "sequence_length": 8, **wrong})

    def test_in_the_benchmark(self, graphs, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_prune.benchmark.peak_memory", lambda *_, **__: 10**6)
        folders = {name: save_tiny(tmp_path / name, tokenizer=False) for name in ("dense", "small")}
        rows = compare(folders, batch_sizes=(1, 2), sequence_length=8, repeats=1, onnx=True)
        assert [latency.batch_size for latency in rows[1].onnx_latency] == [1, 2]
        lines = comparison_table(rows).splitlines()
        assert sum(line.startswith("| ONNX Runtime p50, batch") for line in lines) == 2
        assert "ONNX" not in comparison_table([replace(row, onnx_latency=[]) for row in rows])


class TestCommand:
    def test_export(self, run, tmp_path):
        folder = save_tiny(tmp_path / "dense")
        code, out, err = run("export", folder, "--format", "torch", "--output", tmp_path / "out", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["file"] == str(tmp_path / "out" / "model.pt2") and (tmp_path / "out" / "model.pt2").is_file()
        assert (tmp_path / "out" / "tokenizer.json").is_file() and "[torch" not in out

    def test_text(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_prune.cli.export.export_model", lambda *_: None)
        folder = save_tiny(tmp_path / "dense", tokenizer=False)
        code, out, _ = run("export", folder, "--output", tmp_path / "out")
        assert code == 0 and out.startswith(f"Wrote {tmp_path / 'out' / 'model.onnx'}.")
        assert f"ExportedModel.from_pretrained('{tmp_path / 'out'}')" in out

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--format", "tflite", "--output", "out"], "invalid choice: 'tflite'"),
            ([], "the following arguments are required: --output"),
            (["--output", "."], ". holds a model, whose config.json the export would replace: give another folder"),
            (["--output", "config.json"], "is a file: give a folder"),
        ],
    )
    def test_wrong_calls(self, run, tmp_path, monkeypatch, argv, message):
        folder = save_tiny(tmp_path / "dense", tokenizer=False)
        monkeypatch.chdir(folder)
        code, out, err = run("export", folder, *argv)
        assert (code, out) == (2, "") and message in " ".join(err.split())

    def test_no_such_model(self, run, tmp_path):
        code, _, err = run("export", tmp_path / "none", "--output", tmp_path / "out")
        assert code == 2 and "There is no folder" in err
