"""`hf-prune prune`: load, prune, shrink, save."""

import argparse
import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from shutil import get_terminal_size
from textwrap import dedent, fill
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import AutoConfig

from ..errors import ConfigError, unknown
from ..gates import current_mask
from ..hub import save_pretrained
from ..methods import MethodConfig, RecoverableConfig, WeightPruningConfig, get_pruner, known_pruners
from ..pruning import prune
from ..surgery import shrink
from .arguments import add_device, add_model, count, limit, setting
from .data import add_data, read_examples, reading
from .loading import check_device, how_it_loads, load_model, load_processor, loading_sentence, resolve

_DESCRIPTION = """\
Make a model smaller: choose the heads and neurons to keep, cut the others out,
save the result, and reload it to compare its outputs before the command ends.
Methods with --sparsity or --pattern zero single weights instead, which makes no
model smaller or faster by itself.
Methods that look at activations want a few hundred to a few thousand examples
like those of the task. Plain text without labels will do, except for
encoder-decoders, which need columns of input_ids and labels.
"""
_EXAMPLES = """\
examples:
  hf-prune prune ./bert-sst2 --method kcm --budget macs=0.6 \\
      --dataset reviews.txt --output ./bert-sst2-60
  hf-prune prune ./bert-sst2 --method kcm --set recover=scale \\
      --budget macs=0.6 --allocation uniform --multiple-of 64 \\
      --dataset stanfordnlp/sst2 --text-column sentence --output ./bert-uniform
  hf-prune prune Qwen/Qwen3-0.6B --method magnitude --budget params=0.8 \\
      --exclude 'layers.0.*' --output ./qwen3-80
  hf-prune prune Qwen/Qwen3-0.6B --method wanda --pattern 2:4 \\
      --dataset texts.txt --max-samples 128 --output ./qwen3-2of4

--json prints the report, the folder, and how the result loads.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, f"{_methods()}\n\n{_EXAMPLES}"
    add_model(parser)
    parser.add_argument("--method", required=True, metavar="METHOD", help="how to choose what stays, see below")
    parser.add_argument(
        "--budget",
        type=limit,
        action="append",
        metavar="METRIC=LIMIT",
        help="the most that the pruned model may cost: the ratio to keep, in (0, 1], or an absolute whole number; of "
        "macs, params (parameters), memory (bytes of weights) or latency (measured on the device; above 1 it is in "
        "milliseconds). Given several times, all limits hold",
    )
    parser.add_argument(
        "--sparsity",
        type=float,
        metavar="SHARE",
        help="for methods that zero single weights and leave the shapes: the share to zero, in [0, 1)",
    )
    parser.add_argument(
        "--pattern",
        metavar="N:M",
        help="for the same methods, instead of --sparsity: keep N of every M consecutive inputs, such as 2:4",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to save; a model in it is replaced")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the method, see below; may be given several times",
    )
    parser.add_argument(
        "--allocation",
        choices=("global", "uniform"),
        help="global: units compete over all layers; uniform: each layer keeps equally many, in numbers that plain "
        "transformers loads; default: global",
    )
    parser.add_argument(
        "--multiple-of",
        type=count,
        metavar="N",
        help="keep a multiple of N neurons in each layer, at least 1; 8 or 64 may run faster; default: 1, under a "
        "budget of latency what is fast on the device",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="units or matrices to keep whole, as shell patterns such as 'encoder.layer.0.*'; default: none",
    )
    parser.add_argument(
        "--sequence-length",
        type=count,
        metavar="TOKENS",
        help="tokens per example at which MACs are counted, at least 1; default: the mean of the data, 128 without",
    )
    parser.add_argument(
        "--target-length",
        type=count,
        metavar="TOKENS",
        help="the same for a decoder that follows an encoder; default: as above",
    )
    parser.add_argument(
        "--drop-layers",
        type=count,
        metavar="N",
        help="first drop the N layers that change the hidden states of the data least, at least 1; the budget counts "
        "them as gone; default: none",
    )
    parser.add_argument(
        "--latency-batch-size",
        type=count,
        metavar="N",
        help="examples in the batch for a budget of latency, at least 1; default: 1",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights while pruning and when saved; default: auto, as they are stored",
    )
    add_device(parser)
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="save code along, so that the model loads with trust_remote_code=True where hf_prune is not installed",
    )
    parser.add_argument(
        "--compressed",
        action="store_true",
        help="store a zero as one bit: smaller on disk after methods that zero single weights; the model then loads "
        "after `import hf_prune` only",
    )
    add_data(parser, "calibration data")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the command has done, as data and as text."""
    try:
        config = _config(args)
        name, device = resolve(args.model), check_device(args.device)
    except ConfigError as error:
        args.error(str(error))
    output = Path(args.output).expanduser()
    if args.dataset is None and (get_pruner(args.method).needs_data or args.drop_layers):
        who = args.method if get_pruner(args.method).needs_data else "--drop-layers"
        args.error(f"{who} needs calibration data: give examples like those of the task with --dataset")
    if args.standalone and args.compressed:
        args.error("--standalone and --compressed exclude each other: that code does not read compressed weights")
    if output.exists() and not output.is_dir():
        args.error(f"--output {output} is a file: give a folder")
    if output.resolve() == Path(name).resolve():
        args.error(f"--output {output} would overwrite the model that is pruned: give another folder")

    data = read_examples(args) if args.dataset is not None else None
    model = load_model(name, args.task, dtype=args.dtype, device=device)
    processor = load_processor(name)
    result = prune(
        model,
        config,
        data,
        processing_class=processor,
        batch_size=args.batch_size,
        **reading(args),
    )
    if current_mask(model) is not None:
        shrink(model)
    save_pretrained(
        model,
        output,
        processing_class=processor,
        mask=result.mask,
        report=result.report,
        standalone=args.standalone,
        compressed=args.compressed,
    )
    loads, cls = how_it_loads(AutoConfig.from_pretrained(output), output), type(model).__name__
    lines = [
        str(result.report),
        *(result.report.latency["table"] if result.report.latency is not None else []),
        f"Saved to {output}. {loading_sentence(loads)}",
        "",
        *(["    import hf_prune"] if loads["needs_hf_prune"] else []),
        f"    from transformers import {cls}",
        f"    model = {cls}.from_pretrained({str(output)!r})",
    ]
    return {**result.report.to_dict(), "output": str(output), **loads}, "\n".join(lines)


# Options of a method

# Those that have an argument of their own; the others are given with --set.
FLAGS = (
    "budget",
    "sparsity",
    "pattern",
    "exclude",
    "allocation",
    "multiple_of",
    "sequence_length",
    "target_length",
    "drop_layers",
    "latency_batch_size",
)


def _config(args: argparse.Namespace) -> MethodConfig:
    config_class = get_pruner(args.method).config_class
    known = {field.name: field for field in fields(config_class)}
    options: dict[str, Any] = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if "budget" in options:
        options["budget"] = _once(args.budget, "--budget")
    for name in options:
        if name not in known:
            legal = ", ".join(_flag(own) for own in FLAGS if own in known)
            raise ConfigError(f"{args.method} takes no {_flag(name)}. It takes {legal}.")
    for name, field in known.items():
        if name in FLAGS and name not in options and field.default is field.default_factory is MISSING:
            raise ConfigError(f"{args.method} needs {_flag(name)}.")
    hints = {name: hint for name, hint in get_type_hints(config_class).items() if name in known and name not in FLAGS}
    for key, text in _once(args.set, "--set").items():
        if key in FLAGS:
            raise ConfigError(f"{key} has a place of its own: {_flag(key)}.")
        if key not in hints:
            raise ConfigError(unknown(f"option of {args.method}", key, hints))
        options[key] = _value(key, text, hints[key])
    return config_class(**options)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _once(pairs: Iterable[tuple[str, Any]], option: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{option} {key}= is given twice.")
        found[key] = value
    return found


def _value(key: str, text: str, hint: Any) -> Any:
    """The value that `text` stands for under the type of a field of a config."""
    for kind in _alternatives(hint):
        try:
            if get_origin(kind) is Literal:
                return {str(value): value for value in get_args(kind)}[text]
            if kind in (bool, NoneType):
                return {"true": True, "false": False}[text] if kind is bool else {"none": None}[text]
            return tuple(text.split(",")) if get_origin(kind) is tuple else kind(text)
        except (KeyError, ValueError):
            continue
    raise ConfigError(f"--set {key}= takes {_legal(hint)}, got {text!r}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _legal(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "none"}
    return " or ".join(
        " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else names.get(kind, "a,b,c")
        for kind in _alternatives(hint)
    )


def _methods() -> str:
    """The registered methods and their own options, in the words of their docstrings."""
    lines = ["methods, with their options for --set:"]
    width = get_terminal_size().columns - 2
    for name in known_pruners():
        pruner = get_pruner(name)
        summary = (inspect.getdoc(pruner) or "").partition("\n\n")[0]
        needs = "Needs --dataset." if pruner.needs_data else "Needs no data."
        lines += _filled([f"  {name}: {summary} {needs}", *_documented(pruner.config_class)], width)
    for shared in (RecoverableConfig, WeightPruningConfig):
        names = [name for name in known_pruners() if issubclass(get_pruner(name).config_class, shared)]
        lines += _filled([f"  {', '.join(names)} also have:", *_documented(shared)], width)
    return "\n".join(lines)


def _documented(config_class: type) -> list[str]:
    """The options for --set that the docstring of a config explains."""
    options = dedent((inspect.getdoc(config_class) or "").partition("Args:\n")[2].partition("\n\n")[0])
    entries = [entry for entry in re.split(r"\n(?! )", options) if entry]
    return [f"    {entry}" for entry in entries if entry.partition(" ")[0] not in FLAGS]


def _filled(entries: list[str], width: int) -> list[str]:
    lines = []
    for entry in entries:
        indent = " " * (len(entry) - len(entry.lstrip()))
        plain = " ".join(entry.replace("`", "").replace("*optional*, ", "").replace(", *optional*)", ")").split())
        lines.append(fill(plain, width, initial_indent=indent, subsequent_indent=f"{indent}    "))
    return lines
