"""One and two processes find the same mask and the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import copy
import sys
from itertools import product
from pathlib import Path

import torch
from tiny import parameters_as_time, tiny_batch, tiny_model
from transformers import AutoModelForQuestionAnswering

import hf_prune
import hf_prune.processes
import hf_prune.latency

out = Path(sys.argv[1])
state = hf_prune.processes.process_state()
CONFIGS = {
    "kcm": hf_prune.KCMConfig(budget={"macs": 0.85}),
    "magnitude": hf_prune.MagnitudeConfig(budget={"macs": 0.8}),
    "flap": hf_prune.FLAPConfig(budget={"macs": 0.8}),
    "layer_drop": hf_prune.LayerDropConfig(budget={"macs": 0.75}),
    "shallow": hf_prune.MagnitudeConfig(budget={"macs": 0.6}, drop_layers=1, recover="lstsq"),
    "random": hf_prune.RandomConfig(budget={"macs": 0.8}, seed=1),
    "fisher": hf_prune.FisherConfig(budget={"macs": 0.8}),
    "fisher-paper": hf_prune.FisherConfig(budget={"macs": 0.8}, per_sample=True, recover="scale"),
    "kprune": hf_prune.KPruneConfig(budget={"macs": 0.8}, mu=8.0),
    "wanda": hf_prune.WandaConfig(sparsity=0.5, ratios="owl", checkpoint_dir=str(out / "blocks")),
    "sparsegpt": hf_prune.SparseGPTConfig(sparsity=0.5),
    "latency": hf_prune.MagnitudeConfig(budget={"latency": 0.9}),
}
hf_prune.layer_timing._clocked = parameters_as_time
if not state.is_main_process:
    hf_prune.methods.base.latency_table = None  # it alone measures
RUNS = [(*run, None) for run in product(("bert", "llama", "bart"), CONFIGS)]
RUNS += [("bert", label, AutoModelForQuestionAnswering) for label in ("fisher", "kprune")]
for name, label, auto in RUNS:
    config = copy.deepcopy(CONFIGS[label])
    if label == "wanda":
        config.checkpoint_dir += f"-{name}-{state.num_processes}"
    labels = "fisher" in label
    # An odd number of batches.
    data = [tiny_batch(name, size=8, padded=True, seed=seed, labels=labels) for seed in range(5)]
    if auto:
        for batch in data:
            batch.pop("labels", None)
            batch |= {"start_positions": torch.arange(8) % 3, "end_positions": torch.arange(8) % 3 + 1}
    model = hf_prune.prunable(tiny_model(name, auto))
    result = model.prune(config, data)
    assert result.report.processes == state.num_processes
    calibrator = result.report.calibration
    if hf_prune.current_mask(model) is not None:
        model.shrink()
    mine = f"{name}-{label}-{bool(auto)}-{state.num_processes}-{state.process_index}"
    torch.save((dict(result.mask), model.state_dict(), calibrator), out / mine)
"""


def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    env = {
        **os.environ,
        "PYTHONPATH": f"{here}:{here.parent}",
        "OMP_NUM_THREADS": "1",
        "HF_PRUNE_CACHE": str(tmp_path),
    }
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([sys.executable], two):
        done = subprocess.run([*command, script, tmp_path], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = {path.name[: -len("-1-0")] for path in tmp_path.glob("*-1-0")}
    assert len(runs) == 38
    for run in runs:
        one, first, second = (torch.load(tmp_path / f"{run}{end}") for end in ("-1-0", "-2-0", "-2-1"))
        assert one[0].keys() == first[0].keys() == second[0].keys()
        for key, keep in one[0].items():
            assert torch.equal(keep, first[0][key]) and torch.equal(keep, second[0][key]), key
        assert one[2] == first[2] == second[2]
        for key, weight in one[1].items():
            assert torch.equal(first[1][key], second[1][key]), key
            assert torch.allclose(weight, first[1][key], atol=2e-3), key
