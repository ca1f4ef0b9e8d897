import json
import re
from html.parser import HTMLParser

import pytest
from tiny import tiny_model

import hf_prune
from hf_prune.comparison import comparison_markdown, comparison_rows, write_page
from hf_prune.errors import ConfigError
from hf_prune.plots import plot_tradeoff

EVIL = '"><script>alert(1)</script> | [x](javascript:y)'


def pruned(budget: float, accuracy: float | None, **changes):
    report = hf_prune.prune(tiny_model("bert"), hf_prune.MagnitudeConfig(budget={"macs": budget})).report
    if accuracy is not None:
        report.evaluation = [{"metric": "accuracy", "before": 0.86, "after": accuracy, "n": 872}]
    for name, value in changes.items():
        setattr(report, name, value)
    return report


@pytest.fixture(scope="module")
def reports():
    benchmark = [{"latency": [{"p50_ms": p50}]} for p50 in (10.0, 7.5)]
    return {"bert-80": pruned(0.8, 0.855, benchmark=benchmark), "bert-50": pruned(0.5, 0.801)}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its words."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += [data.strip()] if data.strip() else []


class TestTable:
    def test_rows(self, reports):
        first, second = comparison_rows(reports)
        assert (first["name"], first["method"], first["latency"], second["latency"]) == (
            "bert-80",
            "magnitude",
            0.75,
            None,
        )
        assert first["macs"] == reports["bert-80"].ratio("macs") and first["zeros"] is None
        figures = {"metric": "accuracy", "dataset": None, "before": 0.86, "after": 0.801}
        assert second["quality"] == {"accuracy": figures}
        json.dumps([first, second])

    def test_markdown(self, reports):
        header, _, first, second, *_, foot = comparison_markdown(reports).splitlines()
        assert header == "|  | method | MACs | parameters | memory | latency | accuracy |"
        assert first.startswith("| bert-80 | magnitude |") and first.endswith("| 75.0% | 0.8550 (-0.0050) |")
        assert second.endswith("| - | 0.8010 (-0.0590) |")
        assert foot == "Shares of the dense model's, BertForSequenceClassification (bert)."

    def test_what_does_not_compare_has_columns_of_its_own(self):
        rows = [{"metric": "accuracy", "before": 0.9, "after": 0.85}, {"metric": "f1", "before": 0.8, "after": 0.7}]
        named = {"metric": "accuracy", "before": 0.5, "after": 0.4, "dataset": "glue", "config": "sst2"}
        reports = {
            "a": pruned(0.7, None, evaluation=rows),
            "b": pruned(0.7, None, evaluation=[{**rows[0], "before": 0.6}]),
            "c": pruned(0.7, None, evaluation=[named]),
            "d": pruned(0.7, None, evaluation=[{**named, "before": 0.55}]),
        }
        header, _, *lines = comparison_markdown(reports).splitlines()[:6]
        columns = ["accuracy (dense 0.9000)", "f1", "accuracy (dense 0.6000)", "accuracy on glue sst2"]
        assert header.endswith(f"| {' | '.join(columns)} |")
        filled = [[not cell.strip(" |").startswith("-") for cell in line.split(" | ")[-4:]] for line in lines]
        assert [row.index(True) for row in filled] == [0, 2, 3, 3] and sum(map(sum, filled)) == 5

    def test_masked_models_are_named(self):
        masked = {
            "m": pruned(0.7, None, verified={"masked": True}),
            "s": pruned(0.7, None, verified={"masked": False}),
        }
        assert comparison_markdown(masked).endswith("as large as the dense model until it is shrunk: m.")
        assert [row["masked"] for row in comparison_rows(masked)] == [True, False]

    def test_columns_without_figures_are_left_out(self):
        header = comparison_markdown({"a": pruned(0.7, None)}).splitlines()[0]
        assert header == "|  | method | MACs | parameters | memory |"

    def test_single_weights(self):
        report = hf_prune.prune(tiny_model("bert"), hf_prune.WeightMagnitudeConfig(sparsity=0.5)).report
        table = comparison_markdown({"zeros": report})
        assert "| memory | zeros |" in table and "| 100.0% | 100.0% | 100.0% | 50.0% |" in table


class TestPlot:
    def test_points(self, reports, tmp_path):
        figure = plot_tradeoff(reports, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        latency, macs, params = figure.axes
        assert [axes.get_title("left") for axes in figure.axes] == [
            "accuracy against latency",
            "accuracy against MACs",
            "accuracy against parameters",
        ]
        points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in macs.lines}
        assert points == {
            (1.0, 0.86),
            (reports["bert-80"].ratio("macs"), 0.855),
            (reports["bert-50"].ratio("macs"), 0.801),
        }
        assert len(latency.lines) == 2 and len(params.lines) == 4  # one report has no latency
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "bert-80", "bert-50"]

    def test_other_data_have_axes_of_their_own(self, tmp_path):
        row = {"metric": "accuracy", "before": 0.9, "after": 0.85, "dataset": "sst2"}
        both = {
            "a": pruned(0.7, None, evaluation=[row]),
            "b": pruned(0.7, None, evaluation=[{**row, "before": 0.5, "dataset": "cola"}]),
        }
        figure = plot_tradeoff(both, tmp_path / "plot.png")
        assert [axes.get_title("left") for axes in figure.axes[::2]] == [
            "accuracy on sst2 against MACs",
            "accuracy on cola against MACs",
        ]
        assert [len(axes.lines) for axes in figure.axes] == [2] * 4

    def test_without_quality(self, tmp_path):
        with pytest.raises(ConfigError, match="No report holds an evaluation"):
            plot_tradeoff({"a": pruned(0.7, None)}, tmp_path / "plot.png")
        assert not (tmp_path / "plot.png").exists()


class TestPage:
    def test_everything_is_in_it(self, reports, tmp_path):
        write_page(reports, tmp_path / "page.html")
        page = Page(tmp_path / "page.html")
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        assert len(images) == 3 and all(image["alt"] for image in images)  # quality, and a plan for each
        assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in images)
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
        source = re.sub(r'base64,[^"]*', "", (tmp_path / "page.html").read_text(encoding="utf-8"))
        assert not re.search(r"//|url\(|@import", source)
        assert {"bert-80", "bert-50", "75.0%", "0.8550 (-0.0050)", "Settings", "Versions"} <= set(page.words)
        assert str(reports["bert-50"]) in " ".join(page.words)

    def test_one_run(self, tmp_path):
        write_page({"a": pruned(0.7, None)}, tmp_path / "page.html")
        page = Page(tmp_path / "page.html")
        assert "Pruning run" in page.words and sum(tag == "img" for tag, _ in page.tags) == 1

    def test_foreign_words_are_words(self, tmp_path):
        report = pruned(0.7, None, method=EVIL, model_class=EVIL, config={EVIL: EVIL}, packages={EVIL: EVIL})
        report.evaluation = [{"metric": EVIL, "before": 0.9, "after": 0.8}]
        report.calibration = {"dataset": EVIL}
        write_page({EVIL: report}, tmp_path / "page.html")
        page = Page(tmp_path / "page.html")
        assert not {"script", "a"} & {tag for tag, _ in page.tags}
        assert EVIL in page.words and "<script>" not in (tmp_path / "page.html").read_text()
        assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)

    def test_nothing_to_show(self, tmp_path):
        with pytest.raises(ConfigError, match="no reports"):
            write_page({}, tmp_path / "page.html")


class TestCommand:
    @pytest.fixture
    def folders(self, reports, tmp_path):
        for name, report in reports.items():
            (tmp_path / name).mkdir()
            report.save(tmp_path / name)
        return [str(tmp_path / name) for name in reports]

    def test_table(self, run, folders, reports):
        assert run("compare", *folders) == (0, comparison_markdown(reports) + "\n", "")

    def test_json(self, run, folders, reports):
        assert json.loads(run("compare", *folders, "--json")[1]) == comparison_rows(reports)

    def test_json_has_no_nan(self, run, tmp_path):
        pruned(0.7, float("nan")).save(tmp_path / "report.json")
        code, out, _ = run("compare", tmp_path / "report.json", "--json")
        [row] = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert code == 0 and row["quality"]["accuracy"]["after"] is None

    def test_files(self, run, folders, reports, tmp_path):
        code, out, err = run("compare", *folders, "--html", tmp_path / "page.html", "--plot", tmp_path / "plot.svg")
        assert (code, err) == (0, "") and out.endswith(f"Wrote {tmp_path}/plot.svg.\nWrote {tmp_path}/page.html.\n")
        assert (tmp_path / "page.html").stat().st_size > 50_000
        assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")

    def test_reports_of_one_name_keep_their_paths(self, run, folders):
        paths = [f"{folder}/pruning_report.json" for folder in folders]
        assert [row["name"] for row in json.loads(run("compare", *paths, "--json")[1])] == paths

    def test_given_twice(self, run, folders):
        code, out, err = run("compare", folders[0], folders[0])
        assert (code, out) == (2, "") and f"{folders[0]} is given twice" in err

    def test_no_report(self, run, folders, tmp_path):
        code, out, err = run("compare", folders[0], tmp_path)
        assert (code, out) == (1, "")
        assert err == (
            f"hf-prune: error: {tmp_path} holds no pruning_report.json: give the folder of a model that hf_prune "
            "saved with its report.\n"
        )

    @pytest.mark.parametrize("flag", ["--plot", "--html"])
    def test_where_nothing_can_be_written(self, run, folders, flag):
        code, out, err = run("compare", *folders, flag, "/no/such/folder/file.png")
        assert (code, out) == (1, "") and "hf-prune: error: Can't write /no/such/folder/file.png" in err

    def test_unknown_picture(self, run, folders, tmp_path):
        code, _, err = run("compare", *folders, "--plot", tmp_path / "plot.xyz")
        assert code == 1 and "Format 'xyz' is not supported" in err
