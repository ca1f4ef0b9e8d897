"""SparseGPT's solution for matrices of given shapes, beside the cubic work that it can't do without.

    python benchmarks/sparsegpt.py --shapes 576x576 192x576 1536x576 576x1536

A shape is OUTPUTSxINPUTS. The floor is what the algorithm costs if choosing weights and going from column to column
were free: the Cholesky factor of the Hessian, its inverse, the factor of that, and the updates as one product of
matrices for each block of 128 inputs. CPU seconds on one thread, medians in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from hf_prune.methods.sparsegpt import inverse_factor, sparsegpt

BLOCK = 128


def floor(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    factor, columns = inverse_factor(hessian), weight.T.contiguous()
    for start in range(0, len(columns), BLOCK):
        block = slice(start, start + BLOCK)
        rows, inner = columns[block], factor[block, block]
        rows.sub_(inner.T @ rows)  # all columns of the block at once
        columns[start + BLOCK :].addmm_(factor[block, start + BLOCK :].T, rows, alpha=-1)


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "576x1536"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| shape | floor, s | 50 %, times the floor | 2:4, times the floor |\n|---|---|---|---|")
    for shape in args.shapes:
        outputs, inputs = map(int, shape.split("x"))
        x, weight = torch.randn(2 * inputs, inputs), torch.randn(outputs, inputs)
        runs = {
            "floor": lambda w=weight, h=x.T @ x: floor(w, h),
            "0.5": lambda w=weight, h=x.T @ x: sparsegpt(w, h, 0.5),
            "2:4": lambda w=weight, h=x.T @ x: sparsegpt(w, h, (2, 4)),
        }
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                found[name].append(seconds(run))
        median = {name: statistics.median(values) for name, values in found.items()}
        cells = [f"{median['floor']:.3f}", *(f"{median[name] / median['floor']:.2f}" for name in ("0.5", "2:4"))]
        print("| " + " | ".join([shape, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
