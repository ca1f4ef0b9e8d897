"""`hf-prune search`: what it writes, what it prints, and what it refuses."""

import json
import math

import pytest
import transformers
from folders import TEXTS, save_tiny
from transformers import AutoModelForSequenceClassification

import hf_prune


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "valid.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(TEXTS)))
    return str(path)


@pytest.fixture
def search(run, dense, valid, tmp_path):
    def call(*options, output=tmp_path / "front"):
        return run("search", dense, "--dataset", valid, "--output", output, "--samples", 5, *options)

    return call


def test_writes_every_point_of_the_front(search, dense, tmp_path):
    code, out, err = search("--plot", tmp_path / "new" / "front.png", "--json")
    assert code == 0, err
    found = json.loads(out)
    front = hf_prune.ParetoFront.load(tmp_path / "front")
    assert [point["error"] for point in found["points"]] == [point.error for point in front]
    assert found["evaluated"] == len(front.evaluated) and found["hypervolume"] == front.hypervolume()
    for index, point in enumerate(found["points"]):
        model = AutoModelForSequenceClassification.from_pretrained(point["folder"])
        assert model.num_parameters() == point["params"] == front[index].costs["params"]
        assert hf_prune.PruningReport.load(point["folder"]).method == "nas"
        assert transformers.AutoTokenizer.from_pretrained(point["folder"]).vocab_size > 10
    assert (tmp_path / "new" / "front.png").exists()


def test_goes_on_with_bounds_and_a_budget(search, tmp_path):
    options = ["--space", "medium", "--bounds", "num_heads_*=2:4", "--budget", "params=0.9", "--method", "local"]
    options += ["--storage", tmp_path / "search.log", "--cost", "macs", "--metric", "loss"]
    code, out, err = search(*options)
    assert code == 0 and out.count("\n| ") >= 2 and "error and macs" in out and "Saved to" in out, err
    code, again, err = search(*options)
    assert (code, again) == (0, out)
    front = hf_prune.ParetoFront.load(tmp_path / "front")
    assert all(2 <= value <= 4 for p in front for name, value in p.member.items() if "heads" in name)
    assert all(point.costs["params"] <= 0.9 * front.dense["params"] for point in front)
    code, _, err = search(*options[:2], *options[-6:])
    assert code == 1 and "was begun with another space" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bounds", "num_layers=2"], "takes two whole numbers"),
        (["--bounds", "num_layers"], "no KEY=VALUE"),
        (["--space", "tiny"], "invalid choice: 'tiny'"),
        (["--samples", "0"], "at least 1"),
        (["--method", "grid"], "invalid choice: 'grid'"),
        (["--plot", "front.jpeg2"], "must end in .png, .svg, .pdf"),
    ],
)
def test_wrong_calls(search, tmp_path, options, message):
    code, out, err = search(*options)
    assert (code, out) == (2, "") and message in err
    assert not (tmp_path / "front").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bounds", "num_layers=0:9"], "is outside of the model"),
        (["--bounds", "num_layers=3:2"], "is empty"),
        (["--budget", "params=0.01"], "nearest feasible budget"),
        (["--storage", "sqlite:////no/such/folder/x.db"], "Can't open the storage"),
        (["--plot", "/proc/no/such/x.png"], "Can't write /proc/no/such/x.png"),
    ],
)
def test_failures(search, tmp_path, options, message):
    code, out, err = search(*options)
    assert (code, out) == (1, "") and message in err and "Traceback" not in err
    assert not (tmp_path / "front").exists()


def test_text_without_labels(run, dense, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    code, _, err = run("search", dense, "--dataset", tmp_path / "texts.txt", "--output", tmp_path / "front")
    assert code == 1 and "labels" in err


def test_over_the_model_itself(search, dense):
    code, _, err = search(output=dense)
    assert code == 2 and "is the model that is searched" in err


def test_texts_for_a_language_model(run, tmp_path):
    model = save_tiny(tmp_path / "llama", "llama")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    call = ["search", model, "--dataset", tmp_path / "texts.txt", "--output", tmp_path / "front", "--samples", 3]
    code, _, err = run(*call)
    assert code == 1 and "'accuracy' is for classifiers" in err
    code, out, err = run(*call, "--metric", "perplexity", "--json")
    assert code == 0, err
    causal = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    whole = hf_prune.ParetoFront.load(tmp_path / "front").dense_error
    loss, count = 0.0, 0
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        length = batch["input_ids"].shape[1] - 1
        loss += causal(**batch, labels=batch["input_ids"]).loss.item() * length
        count += length
    assert whole == pytest.approx(math.exp(loss / count), rel=1e-4)
