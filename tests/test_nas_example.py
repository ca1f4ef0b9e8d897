"""The example that searches the sub-networks of a trained super-network, on tiny data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import hf_prune


@pytest.mark.slow
def test_the_example(reader):
    root = Path(__file__).parents[1]
    options = "--model bert-sst2 --train_file train.jsonl --test_file train.jsonl --text_column text --max_steps 6"
    options += " --samples 8 --params 0.7 --output_dir out --report_to none --save_strategy no"
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, root / "examples" / "nas_glue.py", *options.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "evaluated sub-networks are on the front" in done.stdout and "Saved to out." in done.stdout
    front = hf_prune.ParetoFront.load("out")
    model = AutoModelForSequenceClassification.from_pretrained("out/model")
    assert model.num_parameters() == front[front.select({"params": 0.7})].costs["params"]
    assert Path("out/front.png").exists() and hf_prune.PruningReport.load("out/model").method == "nas"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [("--params 0.01", "nearest feasible budget"), ("--method grid", "Unknown search method 'grid'")],
)
def test_the_example_refuses_before_training(reader, options, message):
    options += " --model bert-sst2 --train_file train.jsonl --test_file train.jsonl --text_column text"
    options += " --output_dir out --report_to none"
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "examples" / "nas_glue.py", *options.split()]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and not Path("out/supernet").exists()
