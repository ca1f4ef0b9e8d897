"""Fisher mask search: its mathematics against closed forms and brute force, and its use of labels."""

import copy
from itertools import combinations

import pytest
import torch
import transformers as T
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import CalibrationError, Calibrator, FisherConfig
from hf_prune.gradients import collect_gradients
from hf_prune.methods.fisher import FisherBlock, rearranged
from hf_prune.selection import Selector

QUESTIONS = T.AutoModelForQuestionAnswering


def fisher_of(gradients):
    gradients = torch.tensor(gradients, dtype=torch.float64)  # (units, dimensions)
    return gradients @ gradients.T


def labelled(name, size=16, seed=0):
    return tiny_batch(name, size=size, padded=True, seed=seed, labels=True)


def questions(size):
    spans = {"start_positions": torch.arange(size) % 3, "end_positions": torch.arange(size) % 3 + 1}
    return tiny_batch("bert", size=size, padded=True) | spans


def information(model, data, per_sample):
    """The Fisher matrix of each group."""
    calibrator = Calibrator(model, data, labels=True)
    groups = calibrator.units.of_kind("heads", "neurons")
    blocks = {g.name: FisherBlock(g.size, torch.device("cpu")) for g in groups}
    collect_gradients(calibrator, groups, blocks, per_sample=per_sample)
    return {name: block.matrix for name, block in blocks.items()}


def test_gradients_that_cancel_are_pruned_together():
    fisher = fisher_of([[1, 0], [-1, 0], [0.5, 0.5]])
    assert rearranged(fisher, 2).tolist() == [False, False, True]
    pruned = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert pruned @ fisher @ pruned == 0


@pytest.mark.parametrize("seed", range(5))
def test_rearranging_keeps_counts_and_never_hurts(seed):
    generator = torch.Generator().manual_seed(seed)
    fisher = fisher_of(torch.randn(12, 4, generator=generator).tolist())
    for pruned in range(13):
        keep = rearranged(fisher, pruned)
        assert int((~keep).sum()) == pruned
        start = torch.zeros(12, dtype=torch.float64)
        start[fisher.diagonal().argsort()[:pruned]] = 1
        end = (~keep).double()
        assert end @ fisher @ end <= start @ fisher @ start + 1e-9


def test_the_search_finds_the_best_split():
    model = tiny_model("bert", num_hidden_layers=1, intermediate_size=6)
    table = hf_prune.CostTable(model, hf_prune.prunable_units(model), sequence_length=9)
    heads, neurons = "encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"
    for seed, ratio in ((0, 0.8), (1, 0.6), (2, 0.45), (3, 0.7)):
        generator = torch.Generator().manual_seed(seed)
        scores = {heads: torch.rand(4, generator=generator) * 8, neurons: torch.rand(6, generator=generator)}
        mask = Selector(table, {"macs": ratio}).search(scores)
        found = sum(float(scores[name][mask[name]].sum()) for name in scores)
        best = 0.0
        for h in range(1, 5):
            for n in range(1, 7):
                for a, b in ((a, b) for a in combinations(range(4), h) for b in combinations(range(6), n)):
                    keep = hf_prune.PruningMask(
                        {
                            heads: torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(a), True),
                            neurons: torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(b), True),
                        },
                        table.units,
                    )
                    if table.of(keep).macs <= ratio * table.of().macs:
                        best = max(best, float(scores[heads][list(a)].sum() + scores[neurons][list(b)].sum()))
        assert table.of(mask).macs <= ratio * table.of().macs
        assert found == pytest.approx(best)


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "opt", "vit"])
def test_gradients_are_those_of_the_loss_by_the_mask(name):
    model, batch = tiny_model(name), labelled(name, size=3)
    calibrator = Calibrator(model, [batch], labels=True)
    group = calibrator.units.of_kind("heads")[-1]
    blocks = {group.name: FisherBlock(group.size, torch.device("cpu"))}
    collect_gradients(calibrator, [group], blocks, per_sample=False)

    scale = torch.ones(group.size, requires_grad=True)
    site = model.base_model.get_submodule(group.name)
    handle = site.register_forward_pre_hook(lambda module, args: (args[0] * scale.repeat_interleave(group.width),))
    model(**batch).loss.backward()
    handle.remove()
    expected = scale.grad.double()
    assert torch.allclose(blocks[group.name].matrix, expected.outer(expected), atol=1e-9)
    assert all(p.requires_grad for name, p in model.named_parameters() if p.grad is not None)


def test_gradients_of_examples_do_not_depend_on_the_batch():
    model, batch = tiny_model("bert"), labelled("bert", size=8)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(8)]
    found = []
    for data in ([batch], rows):
        found.append(information(model, data, per_sample=True))
    for name, matrix in found[0].items():
        assert torch.allclose(matrix, found[1][name], rtol=0, atol=1e-5 * float(matrix.abs().max()))


@pytest.mark.parametrize(("name", "auto"), [("bert", None), ("bert", QUESTIONS), ("llama", None), ("bart", None)])
def test_gradients_of_batches_are_gathered_over_their_parts(name, auto, monkeypatch):
    """A few examples at a time, the mean loss is still that of the batch, whatever share of it each example has."""
    model = tiny_model(name, auto)
    batches = [questions(5), questions(3)] if auto else [labelled(name, size=5), labelled(name, size=3, seed=1)]
    if name == "llama":
        batches[0]["labels"][0] = -100  # a part with nothing to predict
    parts, found = Calibrator.in_parts, []
    for tokens in (10**6, 1):
        monkeypatch.setattr(Calibrator, "in_parts", lambda self, n=tokens: parts(self, n))
        found.append(information(model, batches, per_sample=False))
    for site, matrix in found[0].items():
        assert matrix.any() and torch.linalg.matrix_rank(matrix) <= 2
        assert torch.allclose(matrix, found[1][site], rtol=0, atol=1e-5 * float(matrix.abs().max()))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_questions_are_pruned_by_the_loss_of_their_spans(dtype, per_sample):
    config = FisherConfig(budget={"macs": 0.7}, per_sample=per_sample)
    batch, masks = questions(24), []
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(24)]
    for data in ([batch], rows) if per_sample else ([batch], [batch]):
        model = tiny_model("bert", QUESTIONS).to(dtype)
        masks.append(hf_prune.prune(model, config, data).mask)
        with torch.no_grad():
            masked = model(**batch).start_logits
            shrunk = hf_prune.shrink(model)(**batch).start_logits
        assert torch.allclose(shrunk, masked, atol=1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        assert masks[0] == masks[1]


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"rearrange": False, "recover": "none"}])
@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5", "vit"])
def test_pruning_with_labels(name, options):
    model = hf_prune.prunable(tiny_model(name))
    data = [labelled(name, size=24, seed=seed) for seed in range(2)]
    result = model.prune(FisherConfig(budget={"macs": 0.8}, **options), data)
    assert result.report.ratio("macs") <= 0.8
    with torch.no_grad():
        masked = model(**data[0]).logits
        assert torch.allclose(model.shrink()(**data[0]).logits, masked, atol=1e-4)


def test_labels_are_found_and_missed():
    model, config = tiny_model("bert"), FisherConfig(budget={"macs": 0.8})
    rows = [{"input_ids": [5, 6, 7, 8], "label": i % 2, "text": "ignored"} for i in range(40)]
    assert hf_prune.prune(tiny_model("bert"), config, rows).report.calibration["samples"] == 40
    state = copy.deepcopy(model.state_dict())
    unlabelled = [{"input_ids": [5, 6, 7, 8]}] * 40
    for data, message in (
        (unlabelled, "needs labels: the calibration data have no column"),
        (Calibrator(model, unlabelled), "make the Calibrator with labels=True"),
        (None, "labelled examples like those of the task"),
    ):
        with pytest.raises(CalibrationError, match=message):
            hf_prune.prune(model, config, data)
    headless = hf_prune.prunable(tiny_model("bert", T.AutoModel))
    with pytest.raises(CalibrationError, match="needs labels|returns no loss"):
        headless.prune(config, [{**row, "labels": 0} for row in rows])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_methods_that_need_no_data_can_end_with_a_refit():
    data = [tiny_batch("bert", size=16, padded=True)]
    with torch.no_grad():
        dense = tiny_model("bert")(**data[0]).logits
    gap = {}
    for recover in ("none", "lstsq"):
        model = tiny_model("bert")
        config = hf_prune.MagnitudeConfig(budget={"macs": 0.75}, recover=recover)
        hf_prune.prune(model, config, data)
        with torch.no_grad():
            gap[recover] = (model(**data[0]).logits - dense).square().mean()
    assert gap["lstsq"] < gap["none"]
    with pytest.raises(CalibrationError, match="needs calibration data"):
        hf_prune.prune(tiny_model("bert"), hf_prune.MagnitudeConfig(budget={"macs": 0.75}, recover="lstsq"))


def test_a_classifier_that_decodes_its_own_input_needs_no_labels():
    model = tiny_model("bart", T.AutoModelForSequenceClassification)
    batch = {k: v for k, v in tiny_batch("bart", size=24).items() if k != "decoder_input_ids"}
    batch["input_ids"][:, -1] = 2  # the state at the end token is classified
    calibrator = Calibrator(model, [batch])
    assert calibrator.lengths == (9.0, 9.0)
    hf_prune.prune(model, hf_prune.KCMConfig(budget={"macs": 0.85}), calibrator)
