"""Tiny models pruned unevenly, a report with figures of every kind, and how models are compared."""

import copy
import itertools
from dataclasses import asdict

import torch
from tiny import tiny_model

from hf_prune import PruningMask, prunable_units, shrink
from hf_prune.benchmark import Measurement
from hf_prune.least_squares import ridge_solve
from hf_prune.timing import Latency

# What shrinks and loads differently: separate, fused, interleaved and shared projections, one and two stacks
SOME = ["bert", "distilbert", "deberta-v2", "gpt2", "gpt_neox", "llama", "phi3", "t5", "bart", "whisper", "vit"]


def logits(model, batch):
    """The logits of a model in eval mode, or the first tensor that it computes."""
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
    return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))


def uneven(model, drop=True):
    """A mask that keeps other numbers of heads and neurons in each layer, and drops the second layer of each stack."""
    units, generator, keep = prunable_units(model), torch.Generator().manual_seed(0), {}
    for group in units.of_kind("heads", "neurons"):
        if group.prunable:
            count = max(group.size * (2 + group.layer) // 5, 1)
            keep[group.name] = torch.zeros(group.size, dtype=torch.bool)
            keep[group.name][torch.randperm(group.size, generator=generator)[:count]] = True
    for stack in units.stacks if drop else ():
        keep[stack] = torch.arange(units[stack].size) != 1
    return PruningMask(keep, units)


def shrunk(name, auto=None, drop=True, **options):
    """A tiny model of a family, pruned so unevenly that no stock config holds it."""
    model = tiny_model(name, auto, **options)
    return shrink(model, uneven(model, drop))


def shapes(model):
    """The shape of each parameter by its name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def rebuilt(config, cls, device="meta"):
    """A model of a class made from a config alone, without memory for its weights."""
    with torch.device(device):
        return cls(copy.deepcopy(config))


def fail_at(monkeypatch, refit):
    """Let the solve of this refit, counted from 1, find NaN."""
    count = itertools.count(1)

    def solve(equations, weight, bias, ridge):
        new, bias = ridge_solve(equations, weight, bias, ridge)
        return new * (float("nan") if next(count) == refit else 1), bias

    monkeypatch.setattr("hf_prune.layer_walk.ridge_solve", solve)


def weights(model):
    """A copy of what a model holds, by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    """Two state dicts have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def equal(mine, theirs):
    """Two models have the same weights."""
    return same(mine.state_dict(), theirs.state_dict())


def measured(report):
    """The report, with a benchmark and an evaluation."""
    runs = [
        [Latency(p50, 1.5 * p50, batch, 27, "cpu", 1, "float32") for batch, p50 in ((1, 10 * s), (8, 60 * s))]
        for s in (1, 0.5)
    ]
    rows = [
        Measurement("a", 1000, 2e6, 4_000_000, 8_000_000, runs[0], onnx_latency=runs[0][1:]),
        Measurement("b", 700, 1e6, 3_000_000, 6_000_000, runs[1], onnx_latency=runs[1][1:]),
    ]
    report.benchmark = [asdict(row) for row in rows]
    report.evaluation = [
        {
            "metric": "accuracy",
            "before": 0.8773,
            "after": 0.867,
            "n": 872,
            "dataset": "nyu-mll/glue",
            "config": "sst2",
        },
        {"metric": "loss", "before": 0.31, "after": 0.33},
    ]
    return report
