"""One and two processes find the same mask and the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
from itertools import product
from pathlib import Path

import torch
from tiny import parameters_as_time, tiny_batch, tiny_model

import hf_prune
import hf_prune.calibration
import hf_prune.latency

out = Path(sys.argv[1])
state = hf_prune.calibration.process_state()
CONFIGS = {
    "kcm": hf_prune.KCMConfig(budget={"macs": 0.85}),
    "magnitude": hf_prune.MagnitudeConfig(budget={"macs": 0.8}),
    "random": hf_prune.RandomConfig(budget={"macs": 0.8}, seed=1),
    "latency": hf_prune.MagnitudeConfig(budget={"latency": 0.9}),
}
hf_prune.latency._clocked = parameters_as_time
if not state.is_main_process:
    hf_prune.methods.base.latency_table = None  # it alone measures
for name, label in product(("bert", "llama", "bart"), CONFIGS):
    config = CONFIGS[label]
    data = [tiny_batch(name, size=8, padded=True, seed=seed) for seed in range(5)]  # an odd number of batches
    model = hf_prune.prunable(tiny_model(name))
    result = model.prune(config, data)
    assert result.report.processes == state.num_processes
    calibrator = result.report.calibration
    model.shrink()
    mine = f"{name}-{label}-{state.num_processes}-{state.process_index}"
    torch.save((result.mask.to_dict(), model.state_dict(), calibrator), out / mine)
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
    assert len(runs) == 12
    for run in runs:
        one, first, second = (torch.load(tmp_path / f"{run}{end}") for end in ("-1-0", "-2-0", "-2-1"))
        assert one[0] == first[0] == second[0]
        assert one[2] == first[2] == second[2]
        for key, weight in one[1].items():
            assert torch.equal(first[1][key], second[1][key]), key
            assert torch.allclose(weight, first[1][key], atol=2e-3), key
