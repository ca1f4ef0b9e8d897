"""What a step of super-network training costs on sliced sub-networks, against the same step on masked ones.

    python benchmarks/supernet.py

A model of the shape of MiniLM-L6 (6 layers, hidden size 384, 12 heads, 1536 neurons) with random weights. Both kinds
of step run one after the other, on one thread, on the same batch and the same sub-networks; times are processor time.
A step of strategy `full` in SMALL with k = 2: the whole network, the smallest sub-network and two others, each forward
and backward, and one step of AdamW.

The ratio is that of mean times over SMALL. Two members drawn by chance vary so much that hundreds of steps would be
needed. So the 18 steps go through 36 members in an order by chance: all six depths, each with the same six widths, of
which heads and neurons have the means of SMALL. A pass takes the time a + layers (b + c heads + d neurons), so that
their mean time is that of all members.
"""

import argparse
import json
import random
import statistics
import time

import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

import hf_prune
from hf_prune.trainers import distillation_loss

HEADS = (1, 3, 5, 8, 10, 12)  # of 1 .. 12
UNITS = (640, 1408, 128, 896, 384, 1152)  # of 1 .. 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1, help="how often to go through the 18 steps")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)  # as Trainer does
    space = hf_prune.SmallSpace(model)
    shape = (options.batch_size, options.length)
    batch = {
        "input_ids": torch.randint(1000, 30000, shape),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, shape[:1]),
    }

    def whole() -> torch.Tensor:
        outputs = model(**batch)
        outputs.loss.backward()
        return outputs.logits.detach()

    def sliced(mask: hf_prune.PruningMask, taught: torch.Tensor) -> None:
        outputs = hf_prune.subnetwork(model, mask, space.units)(**batch)
        (outputs.loss + distillation_loss(outputs.logits, taught, 10.0)).backward()

    def masked(mask: hf_prune.PruningMask, taught: torch.Tensor) -> None:
        hf_prune.apply_mask(model, mask)
        outputs = model(**batch)
        (outputs.loss + distillation_loss(outputs.logits, taught, 10.0)).backward()
        hf_prune.remove_mask(model)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(part, members) -> None:
        taught = whole()
        for member in members:
            part(space.mask(member), taught)
        update()

    def clock(function, *arguments) -> float:
        started = time.process_time()
        function(*arguments)
        return time.process_time() - started

    taught, smallest = whole(), space.mask(space.smallest)
    sliced(smallest, taught), masked(smallest, taught), update()  # warm up
    seconds = {"sliced": 0.0, "masked": 0.0}
    alone: dict[str, list[float]] = {"smallest": [], "whole": [], "building": []}
    widths = list(zip(HEADS, UNITS, strict=True))
    drawn = [dict(zip(space.parameters, (depth, *width), strict=True)) for depth in range(1, 7) for width in widths]
    drawn = [member for _ in range(options.rounds) for member in random.sample(drawn, len(drawn))]
    for index in range(0, len(drawn), 2):
        members = [space.smallest, *drawn[index : index + 2]]
        for name, part in (("sliced", sliced), ("masked", masked))[:: 1 if index % 4 else -1]:
            seconds[name] += clock(step, part, members)
        alone["whole"].append(clock(lambda: (whole(), update())))
        alone["smallest"].append(clock(lambda: (sliced(smallest, taught), update())))
        alone["building"].append(clock(hf_prune.subnetwork, model, space.mask(members[1]), space.units))
        print(f"step {index // 2 + 1}: sliced/masked so far {seconds['sliced'] / seconds['masked']:.3f}", flush=True)
    median = {name: statistics.median(times) for name, times in alone.items()}
    figures = {
        "full step, sliced/masked": seconds["sliced"] / seconds["masked"],
        "step, smallest/whole": median["smallest"] / median["whole"],
        "making a sub-network/step of the whole": median["building"] / median["whole"],
    }
    for name, ratio in figures.items():
        print(f"{name}: {ratio:.3f}")
    if options.output:
        with open(options.output, "w") as file:
            json.dump({**vars(options), **figures, "seconds": {**seconds, **median}}, file, indent=1)


if __name__ == "__main__":
    main()
