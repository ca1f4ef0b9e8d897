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
from tiny import tiny_batch, tiny_model

import hf_prune
import hf_prune.calibration

out = Path(sys.argv[1])
state = hf_prune.calibration.process_state()
CONFIGS = {
    "kcm": hf_prune.KCMConfig(budget={"macs": 0.85}),
    "magnitude": hf_prune.MagnitudeConfig(budget={"macs": 0.8}),
    "random": hf_prune.RandomConfig(budget={"macs": 0.8}, seed=1),
    "wanda": hf_prune.WandaConfig(sparsity=0.5, ratios="owl", checkpoint_dir=str(out / "blocks")),
    "sparsegpt": hf_prune.SparseGPTConfig(sparsity=0.5),
}
for name, label in product(("bert", "llama", "bart"), CONFIGS):
    config = copy.deepcopy(CONFIGS[label])
    if label == "wanda":
        config.checkpoint_dir += f"-{name}-{state.num_processes}"
    data = [tiny_batch(name, size=8, padded=True, seed=seed) for seed in range(5)]  # an odd number of batches
    model = hf_prune.prunable(tiny_model(name))
    result = model.prune(config, data)
    assert result.report.processes == state.num_processes
    calibrator = result.report.calibration
    if hf_prune.current_mask(model) is not None:
        model.shrink()
    mine = f"{name}-{label}-{state.num_processes}-{state.process_index}"
    torch.save((dict(result.mask), model.state_dict(), calibrator), out / mine)
"""


def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([sys.executable], two):
        done = subprocess.run([*command, script, tmp_path], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = {path.name[: -len("-1-0")] for path in tmp_path.glob("*-1-0")}
    assert len(runs) == 15
    for run in runs:
        one, first, second = (torch.load(tmp_path / f"{run}{end}") for end in ("-1-0", "-2-0", "-2-1"))
        assert one[0].keys() == first[0].keys() == second[0].keys()
        for key, keep in one[0].items():
            assert torch.equal(keep, first[0][key]) and torch.equal(keep, second[0][key]), key
        assert one[2] == first[2] == second[2]
        for key, weight in one[1].items():
            assert torch.equal(first[1][key], second[1][key]), key
            assert torch.allclose(weight, first[1][key], atol=2e-3), key
