"""`hf-prune inspect`: what of a model can be pruned, and what it costs."""

import argparse
import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import AttentionSpec, StackSpec
from ..costs import CostTable
from ..depth import droppable
from ..masks import PruningMask
from ..methods import get_pruner, known_pruners
from ..tables import si_scale
from ..units import Kind, PrunableUnits, UnitGroup, base_model, head_counts
from .arguments import add_model, count
from .loading import how_it_loads, load_model, loading_sentence, resolve

_DESCRIPTION = """\
Show what of a model can be pruned: its heads (KV groups under grouped-query
attention), neurons and layers, what they cost, which of them plain transformers
loads in smaller number, and how far each method can go. The weights are loaded,
on the CPU, and nothing is changed.
"""
_EXAMPLES = """\
examples:
  hf-prune inspect google-bert/bert-base-uncased
  hf-prune inspect ./bert-sst2-60 --sequence-length 64 --json

MACs are the multiply-accumulates of the layers in one forward pass over one
example; embeddings and task head are left out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_model(parser)
    parser.add_argument(
        "--sequence-length",
        type=count,
        default=128,
        metavar="TOKENS",
        help="tokens per example at which MACs are counted, at least 1; default: %(default)s",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the command has found, as data and as text."""
    name = resolve(args.model)
    model = load_model(name, args.task)
    table = CostTable(model, sequence_length=args.sequence_length)
    found: dict[str, Any] = {
        "model": name,
        "class": type(model).__name__,
        "model_type": table.units.model_type,
        "note": table.units.architecture.note,
        "dtype": str(model.dtype).removeprefix("torch."),
        **table.of().to_dict(),
        "shares": _shares(table),
        "sequence_lengths": table.lengths,
        "stacks": [_stack(model, table, stack) for stack in table.units.stacks.values()],
        "lowest_macs": _lowest_macs(table),
        **how_it_loads(model.config, name),
    }
    return found, _text(found)


def _shares(table: CostTable) -> dict[str, dict[str, float]]:
    dense = table.of()
    kinds: dict[str, Kind] = {"attention": "heads", "feed_forward": "neurons"}
    return {
        part: {
            metric: sum(table.unit[g.name][metric] * g.size for g in table.units.of_kind(kind)) / dense[metric]
            for metric in ("macs", "params")
        }
        for part, kind in kinds.items()
    }


def _stack(model: PreTrainedModel, table: CostTable, stack: StackSpec) -> dict[str, Any]:
    """The blocks of a stack, and the attributes of the stock config that hold their numbers (`""`: none does)."""
    layers = table.units[stack.layers].size
    columns = zip(*(table.units.of_layer(stack.layers, index) for index in range(layers)), strict=True)
    return {
        "name": stack.layers,
        "layers": layers,
        "config": stack.config_depth,
        "blocks": [_block(model, stack, groups) for groups in columns],
    }


def _block(model: PreTrainedModel, stack: StackSpec, groups: tuple[UnitGroup, ...]) -> dict[str, Any]:
    first = groups[0]
    heads = isinstance(first.block, AttentionSpec)
    return {
        "site": first.name.removeprefix(f"{stack.layers}.0."),
        "kind": first.kind,
        "heads_per_unit": max(_heads_per_unit(model, group) for group in groups) if heads else None,
        "units": [group.size for group in groups],
        "prunable": first.prunable,
        "config": stack.config_heads if heads else stack.config_neurons,
    }


def _heads_per_unit(model: PreTrainedModel, group: UnitGroup) -> int:
    assert isinstance(group.block, AttentionSpec)
    layer = base_model(model).get_submodule(f"{group.stack}.{group.layer}")
    queries, keys, _ = head_counts(layer, group.block)
    return queries // keys if keys else 1


def _lowest_macs(table: CostTable) -> dict[str, float]:
    """For each method the smallest ratio that `--budget macs=` can ask for: one unit a layer stays, or one layer."""
    lowest = {}
    for name, kinds in ((name, get_pruner(name).kinds) for name in known_pruners()):
        if not kinds:  # it removes no units
            continue
        groups = [g for g in table.units.of_kind(*kinds) if g.prunable and g.size]
        floor = PruningMask({g.name: _fewest(g, table.units) for g in groups}, table.units)
        lowest[name] = math.ceil(1e4 * table.of(floor).macs / table.of().macs) / 1e4
    return lowest


def _fewest(group: UnitGroup, units: PrunableUnits) -> torch.Tensor:
    stays = [0] if group.kind != "layers" else sorted({*range(group.size)} - {*droppable(units)[group.name]}) or [0]
    return torch.zeros(group.size, dtype=torch.bool).index_fill(0, torch.tensor(stays), True)


def _text(found: dict[str, Any]) -> str:
    lengths = ", ".join(f"{n:.4g}" for n in dict.fromkeys(found["sequence_lengths"].values()))
    rows = [["stack", "units", "site", "number", "held by config"]]
    for stack in found["stacks"]:
        rows.append([stack["name"], "layers", "", str(stack["layers"]), stack["config"]])
        for block in stack["blocks"]:
            number = _range(block["units"]) + ("" if block["prunable"] else " (fixed)")
            rows.append([stack["name"], _unit(block), block["site"], number, block["config"] or "-"])
    lowest: dict[float, list[str]] = {}
    for method, ratio in found["lowest_macs"].items():
        lowest.setdefault(ratio, []).append(method)
    note = f"\n{found['model_type']}: {found['note']}." if found["note"] else ""
    return f"""\
{found["class"]} ({found["model_type"]}) from {found["model"]}

parameters  {_si(found["params"])}  {_share(found, "params")}
memory      {_si(found["memory"])}B  weights in {found["dtype"]}
MACs        {_si(found["macs"])}  {_share(found, "macs")}; one example, n = {lengths} tokens

{_aligned(rows)}

Where the config holds the number, plain transformers loads a model with fewer, if they are equally many in each layer
(prune --allocation uniform). All else loads after `import hf_prune`.
Lowest budget: {"; ".join(f"macs={ratio} by {', '.join(methods)}" for ratio, methods in lowest.items())}.{note}
{loading_sentence(found)}"""


def _unit(block: dict[str, Any]) -> str:
    several = block["heads_per_unit"] is not None and block["heads_per_unit"] > 1
    return f"KV groups of {block['heads_per_unit']} heads" if several else str(block["kind"])


def _range(counts: Iterable[int]) -> str:
    counts = sorted(set(counts))
    return f"{counts[0]} a layer" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} a layer"


def _share(found: dict[str, Any], metric: str) -> str:
    attention, feed_forward = (found["shares"][part][metric] for part in ("attention", "feed_forward"))
    rest = f", other {1 - attention - feed_forward:.1%}" if metric == "params" else ""
    return f"attention {attention:.1%}, feed-forward {feed_forward:.1%}{rest}"


def _si(number: float) -> str:
    prefix, scale = si_scale(number)
    return f"{number / scale:.2f} {prefix}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
