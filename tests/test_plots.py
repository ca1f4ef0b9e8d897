import sys

import pytest

from hf_prune.benchmark import Latency, Measurement
from hf_prune.errors import ConfigError
from hf_prune.plots import plot_comparison, plot_units


def group(kind: str, stack: str, layer: int, block: str, size: int, kept: int) -> dict[str, object]:
    name = stack if layer < 0 else f"{stack}.{layer}.{block}"
    return {"name": name, "kind": kind, "stack": stack, "layer": layer, "size": size, "kept": kept}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def is_png(path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 10_000


class TestPlotUnits:
    def test_encoder(self, tmp_path):
        heads = [
            group("heads", "encoder.layer", i, "attention.output.dense", 12, kept) for i, kept in enumerate([3, 9])
        ]
        neurons = [
            group("neurons", "encoder.layer", i, "output.dense", 1536, kept) for i, kept in enumerate([1024, 0])
        ]
        figure = plot_units([heads[0], neurons[0], heads[1], neurons[1]], tmp_path / "units.png")
        assert is_png(tmp_path / "units.png")
        upper, lower = figure.axes
        assert upper.get_title("left") == "Heads kept: 12 of 24 (50%)"
        assert lower.get_title("left") == "Neurons kept: 1,024 of 3,072 (33%)"
        # Grey bars of the whole size, then coloured ones of what is kept.
        assert [bar.get_height() for bar in upper.patches] == [12, 12, 3, 9]
        assert [bar.get_height() for bar in lower.patches] == [1536, 1536, 1024, 0]
        assert texts(lower) == ["1,024", "0"]
        assert [tick.get_text() for tick in upper.get_xticklabels()] == ["0", "1"]

    def test_encoder_decoder(self, tmp_path):
        units = []
        for layer in range(3):
            units.append(group("heads", "encoder.layers", layer, "self_attn.out_proj", 8, 4))
            units.append(group("heads", "decoder.layers", layer, "self_attn.out_proj", 8, 5))
            units.append(group("heads", "decoder.layers", layer, "encoder_attn.out_proj", 8, 6))
        units += [group("layers", stack, -1, "", 6, 3) for stack in ("encoder.layers", "decoder.layers")]
        heads, layers = plot_units(units, tmp_path / "units.png").axes
        assert [bar.get_height() for bar in heads.patches if bar.get_height() < 8] == [4] * 3 + [5] * 3 + [6] * 3
        assert {"encoder.layers", "decoder.layers"} <= set(texts(heads))
        legend = [text.get_text() for text in heads.get_legend().get_texts()]
        assert legend == ["self_attn.out_proj", "encoder_attn.out_proj"]
        # No two bars of what is kept overlap.
        spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in heads.patches if bar.get_height() < 8)
        assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))
        assert layers.get_title("left") == "Layers kept: 6 of 12 (50%)"
        assert [tick.get_text() for tick in layers.get_xticklabels()] == ["encoder.layers", "decoder.layers"]

    def test_many_layers_carry_no_numbers(self, tmp_path):
        units = [group("neurons", "layers", layer, "mlp.down_proj", 64, 32) for layer in range(80)]
        assert texts(plot_units(units, tmp_path / "units.png").axes[0]) == []

    def test_no_units_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="no units to plot"):
            plot_units([], tmp_path / "units.png")


def measurement(name: str, factor: float, **scores: float) -> Measurement:
    runs = [Latency(20 * factor, 24 * factor, batch, 16, "cpu", 2, "float32") for batch in (1, 8)]
    return Measurement(name, int(20e6 * factor), 3e9 * factor, int(80e6 * factor), int(90e6 * factor), runs, scores)


class TestPlotComparison:
    def test_panels(self, tmp_path):
        rows = [measurement("dense", 1.0, accuracy=0.9), measurement("pruned", 0.5, accuracy=0.88)]
        figure = plot_comparison(rows, tmp_path / "comparison.png")
        assert is_png(tmp_path / "comparison.png")
        assert [axes.get_title("left") for axes in figure.axes] == [
            "Accuracy",
            "Parameters (M)",
            "MACs per example (G)",
            "Weights on disk (MB)",
            "Peak memory (MB)",
            "Latency, batch 1 (ms)",
            "Latency, batch 8 (ms)",
        ]
        assert [[bar.get_height() for bar in axes.patches] for axes in figure.axes] == [
            [0.9, 0.88],
            [20, 10],
            [3, 1.5],
            [80, 40],
            [90, 45],
            [20, 10],
            [20, 10],
        ]
        assert texts(figure.axes[0]) == ["0.900", "0.880"]
        assert texts(figure.axes[1]) == ["20", "10\n(0.50×)"]
        assert [text for text in texts(figure.axes[-1]) if text] == ["20", "10\n(0.50×)"]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "pruned"]
        assert "16 tokens, float32, CPU, 2 threads" in figure.get_supxlabel()
        # The whiskers end at the 95th percentile.
        ends = figure.axes[-1].collections[0].get_segments()
        assert [segment[:, 1].tolist() for segment in ends] == [[20, 24], [10, 12]]

    def test_pyplot_is_not_touched(self, tmp_path):
        sys.modules.pop("matplotlib.pyplot", None)
        plot_comparison([measurement("dense", 1.0)], tmp_path / "comparison.svg")
        assert (tmp_path / "comparison.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert "matplotlib.pyplot" not in sys.modules

    def test_no_rows_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="no measurements to plot"):
            plot_comparison([], tmp_path / "comparison.png")
