"""2:4 on sparse tensor cores: what is refused where there are none. What they compute is in test_gpu.py."""

import pytest
import torch
from tiny import tiny_model

import hf_prune
from hf_prune.sparse_kernels import is_two_of_four


def test_without_a_gpu_it_says_why_and_changes_nothing():
    model = tiny_model("llama")
    result = hf_prune.prune(model, hf_prune.WeightMagnitudeConfig(pattern="2:4"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(hf_prune.UnsupportedModelError, match="is on cpu: torch has 2:4 kernels for NVIDIA GPUs"):
        hf_prune.accelerate_sparse(model, result.report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.report.latency is None


def test_the_pattern_is_looked_for_in_the_weights():
    model = tiny_model("llama")
    assert not any(is_two_of_four(weight) for weight in model.parameters() if weight.dim() == 2)
    mask = hf_prune.prune(model, hf_prune.WeightMagnitudeConfig(pattern="2:4")).mask
    assert all(is_two_of_four(model.get_parameter(name)) for name in mask)
    assert is_two_of_four(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 2]]))
    assert not is_two_of_four(torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 0]]))  # half are zero, but not of every four
    assert not is_two_of_four(torch.zeros(3, 6)) and not is_two_of_four(torch.zeros(4))


def test_the_report_shows_measured_times():
    model = tiny_model("llama")
    report = hf_prune.prune(model, hf_prune.WeightMagnitudeConfig(pattern="2:4")).report
    assert str(report).endswith("neither smaller nor faster.")
    report.latency = {"before": 2.0, "after": 1.5, "where": "a GPU, batch 8"}
    assert str(report).endswith("Measured 2.00 to 1.50 ms (75.0%); a GPU, batch 8.")
