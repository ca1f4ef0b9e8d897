"""The automatic choice: every candidate is reported, the one closest to the dense model is kept."""

import copy

import pytest
import torch
import transformers as T
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import AutoPruningConfig, CalibrationError, Calibrator, ConfigError, InfeasibleBudgetError, KCMConfig
from hf_prune.methods.auto import mean_divergence


def data(name="bert", **options):
    return [tiny_batch(name, size=12, padded=True, seed=seed, **options) for seed in range(4)]


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "gpt2", "vit"])
def test_the_closest_is_kept_with_its_weights(name):
    model, dense = tiny_model(name), tiny_model(name)
    candidates = ("magnitude", {"method": "kcm", "d2": "mean"}, "kcm", "random")
    config = AutoPruningConfig(budget={"macs": 0.85}, candidates=candidates)
    result = hf_prune.prune(model, config, data(name))
    rows, chosen = result.report.facts["candidates"], result.report.facts["chosen"]
    assert [row["config"]["method"] for row in rows] == ["magnitude", "kcm", "kcm", "random"]
    assert rows[chosen]["divergence"] == min(row["divergence"] for row in rows)
    # What was chosen is what is there: pruned alone, on the same part of the data, the model is the same.
    again = tiny_model(name)
    fit, held_out = Calibrator(again, data(name)).split(5)
    alone = hf_prune.prune(again, hf_prune.PruningConfig.from_dict(rows[chosen]["config"]), fit)
    assert alone.mask == result.mask
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert mean_divergence(dense, held_out) == pytest.approx(rows[chosen]["divergence"], rel=1e-6)


def test_parts_of_the_data_do_not_depend_on_batches():
    model, batches = tiny_model("bert"), data()
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(12)]
    numbers = []
    for calibrator in (Calibrator(model, batches), Calibrator(model, rows)):
        fit, held_out = calibrator.split(5)
        assert (len(fit), len(held_out)) == (39, 9)
        numbers.append([[n for i, _ in part.batches("") for n in part.examples[i]] for part in (fit, held_out)])
        assert numbers[-1] == [[n for n in range(48) if n % 5 != 4], list(range(4, 48, 5))]
    with pytest.raises(CalibrationError, match="at least 5"):
        Calibrator(model, [tiny_batch("bert", size=4)]).split(5)


def test_candidates_that_fail_are_reported_and_passed_over():
    model = tiny_model("bert")
    config = AutoPruningConfig(budget={"macs": 0.4}, candidates=("kcm", "flap"))
    facts = hf_prune.prune(model, config, data()).report.facts
    assert "nearest feasible" in facts["candidates"][0]["error"] and facts["chosen"] == 1


def test_nothing_changes_where_all_fail():
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible"):
        hf_prune.prune(model, AutoPruningConfig(budget={"macs": 0.4}, candidates=("kcm",)), data())
    assert hf_prune.current_mask(model) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_depth_goes_first_for_all():
    config = AutoPruningConfig(budget={"macs": 0.6}, drop_layers=1, candidates=("kprune", "flap", "magnitude"))
    model = tiny_model("bert")
    result = hf_prune.prune(model, config, data())
    assert result.mask.kept("layers") == 2 and hf_prune.current_mask(model) == result.mask
    assert all("divergence" in row for row in result.report.facts["candidates"])


def test_labels_are_needed_by_those_that_need_them():
    config = AutoPruningConfig(budget={"macs": 0.6}, candidates=("magnitude", "fisher"))
    with pytest.raises(CalibrationError, match="labels"):
        hf_prune.prune(tiny_model("bert"), config, data())
    facts = hf_prune.prune(tiny_model("bert"), config, data(labels=True)).report.facts
    assert all("divergence" in row for row in facts["candidates"])


def test_a_model_in_training_mode_is_compared_without_dropout():
    divergences = []
    for mode in (True, False):
        model = tiny_model("bert").train(mode)
        config = AutoPruningConfig(budget={"macs": 0.8}, candidates=("magnitude",))
        divergences.append(hf_prune.prune(model, config, data()).report.facts["candidates"][0]["divergence"])
        assert model.training is mode
    assert divergences[0] == divergences[1]


def test_questions_and_numbers():
    for auto, options in ((T.AutoModelForQuestionAnswering, {}), (T.AutoModel, {}), (None, {"num_labels": 1})):
        model = tiny_model("bert", auto, **options)
        facts = hf_prune.prune(model, AutoPruningConfig(budget={"macs": 0.7}), data()).report.facts
        assert facts["candidates"][facts["chosen"]]["divergence"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ()}, "candidates"),
        ({"candidates": "kcm"}, "candidates"),
        ({"candidates": ("kmc",)}, "kcm"),
        ({"candidates": ("auto",)}, "auto"),
        ({"candidates": ({"method": "kcm", "budget": {"macs": 0.1}},)}, "budget"),
        ({"candidates": ({"method": "kcm", "sigma": -1},)}, "sigma"),
        ({"held_out": 1}, "held_out"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        AutoPruningConfig(budget={"macs": 0.5}, **options)


def test_the_config_survives_json():
    config = AutoPruningConfig(budget={"macs": 0.5}, candidates=("kcm", {"method": "kcm", "sigma": "median"}))
    assert hf_prune.PruningConfig.from_dict(config.to_dict()) == config
    assert isinstance(config.configs()[1], KCMConfig)
