"""`hf-prune search`: load, search, save every point of the Pareto front."""

import argparse
from pathlib import Path
from typing import Any

from .. import evaluation
from ..costs import METRICS
from ..errors import ConfigError, PruningError
from ..processes import process_state
from ..search.spaces import known_spaces, search_space
from .arguments import add_device, add_model, count, limit, setting
from .data import add_data, read_examples, reading
from .loading import check_device, load_model, load_processor, resolve, trying

_DESCRIPTION = """\
Search a super-network for the sub-networks with the best trade-offs between error
and cost, and save every one of them as a model of its own. Sub-networks are
evaluated as they are: train the model with SuperNetTrainer first, so that all
sizes are good. Nothing is trained here.
"""
_EXAMPLES = """\
examples:
  hf-prune search ./bert-sst2-supernet --space small --dataset valid.tsv \\
      --storage search.log --output ./bert-sst2-front
  hf-prune search ./bert-sst2-supernet --space medium --bounds 'num_heads_*=4:12' \\
      --budget params=0.7 --cost macs --method local --samples 200 \\
      --dataset valid.tsv --output ./front --plot front.png

The table is Markdown. The data need a column `label` or `labels`; for the
perplexity of a causal language model texts will do. A search with --storage goes
on where it was broken off, and several may share it.
"""
_PLOTS = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_model(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="gets a folder for each point of the front")
    parser.add_argument(
        "--space", choices=known_spaces(), default="small", help="which sub-networks there are; default: %(default)s"
    )
    parser.add_argument(
        "--bounds",
        type=setting,
        action="append",
        default=[],
        metavar="PARAMETER=LOW:HIGH",
        help="search a part of the space, such as num_layers=2:6; the parameter may be a shell pattern; may be given "
        "several times",
    )
    parser.add_argument(
        "--budget",
        type=limit,
        action="append",
        metavar="METRIC=LIMIT",
        help="search sub-networks that cost at most this: a ratio in (0, 1], or an absolute whole number; of macs, "
        "params or memory; may be given several times",
    )
    parser.add_argument(
        "--metric",
        default="accuracy",
        choices=evaluation.METRICS,
        help="the error is 1 - metric, or loss or perplexity themselves; default: %(default)s",
    )
    parser.add_argument("--cost", choices=METRICS, default="params", help="the other objective; default: %(default)s")
    parser.add_argument(
        "--method",
        choices=("random", "local", "nsga2", "tpe", "gp"),
        default="nsga2",
        help="how sub-networks are drawn; default: %(default)s",
    )
    parser.add_argument(
        "--samples", type=count, default=100, metavar="N", help="sub-networks to draw in all; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    parser.add_argument(
        "--storage",
        metavar="URL_OR_FILE",
        help="where to keep what was evaluated: a database such as sqlite:///search.db, or a file; default: nowhere",
    )
    parser.add_argument(
        "--study-name", default="hf_prune", metavar="NAME", help="tells the searches in a storage apart"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw error against cost: .png, .svg or .pdf; default: no plot")
    add_device(parser)
    add_data(parser, "validation data, with labels", required=True)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the command has found, as data and as text."""
    try:
        from ..search.engine import search_subnetworks
    except ImportError as error:
        raise PruningError("The search needs Optuna: pip install 'hf_prune[search]'") from error
    try:
        name, device = resolve(args.model), check_device(args.device)
        bounds = {key: _bound(key, text) for key, text in args.bounds}
    except ConfigError as error:
        args.error(str(error))
    output = Path(args.output).expanduser()
    if output.exists() and not output.is_dir():
        args.error(f"--output {output} is a file: give a folder")
    if output.resolve() == Path(name).resolve():
        args.error(f"--output {output} is the model that is searched: give another folder")
    plot = Path(args.plot).expanduser() if args.plot else None
    if plot is not None and plot.suffix not in _PLOTS:
        args.error(f"--plot {plot} must end in {', '.join(_PLOTS)}")
    data = read_examples(args)
    model = load_model(name, args.task, device=device)
    processor = load_processor(name)
    space = search_space(args.space, model, bounds=bounds, budget=dict(args.budget) if args.budget else None)
    if plot is not None:  # now: a search is long
        with trying(f"write {plot}"):
            plot.parent.mkdir(parents=True, exist_ok=True)
    front = search_subnetworks(
        model,
        space,
        data,
        metric=args.metric,
        cost=args.cost,
        method=args.method,
        num_samples=args.samples,
        seed=args.seed,
        storage=args.storage,
        study_name=args.study_name,
        processing_class=processor,
        batch_size=args.batch_size,
        **reading(args),
    )
    folders = front.save_models(output, model, processing_class=processor)
    if plot is not None and process_state().is_main_process:
        front.plot(plot)
    points = [
        {"folder": str(folder), "error": point.error, **point.costs}
        for folder, point in zip(folders, front, strict=True)
    ]
    data_out = {"hypervolume": front.hypervolume(), "evaluated": len(front.evaluated), "points": points}
    return data_out, f"{front}\n\nSaved to {folders[0]} ... {folders[-1]}."


def _bound(key: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError(f"--bounds {key}= takes two whole numbers, such as 2:6, got {text!r}.") from None
