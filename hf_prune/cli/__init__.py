"""The command line, `hf-prune COMMAND`. One file per command; this one imports no torch.

The file of a command has two functions: `add_arguments(parser)` describes it, and `run(args)` does it and returns its
result as data, for `--json`, and as text. Only the file of the command that is called is imported.

Results go to stdout; progress, warnings and errors to stderr. The exit code is 0 when all went well, 1 when a command
failed, 2 when it was called wrongly, and 130 after Ctrl-C.
"""

import argparse
import json
import math
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import PruningError
from .run_file import parse_with_file

COMMANDS = {
    "inspect": "show what of a model can be pruned, and what it costs",
    "prune": "make a model smaller, and save it",
    "search": "find the best trade-offs of a super-network",
    "bench": "measure latency, memory and size side by side",
    "compare": "set pruning runs side by side: a table, a picture, a page",
    "export": "write a model as ONNX or torch.export",
    "card": "write the model card of a saved model anew",
    "push": "upload a saved model to the Hub",
}
_DESCRIPTION = """\
Make Hugging Face transformers physically smaller and faster: remove attention
heads and feed-forward neurons, then load the result with plain from_pretrained.
Look at a model with inspect, make it smaller with prune, measure what that gained
with bench, and set several runs side by side with compare.
"""
_EXAMPLES = """\
examples:
  hf-prune inspect google-bert/bert-base-uncased
  hf-prune prune ./bert-sst2 --method kcm --budget macs=0.6 \\
      --dataset reviews.txt --output ./bert-sst2-60
  hf-prune bench ./bert-sst2-60 --against ./bert-sst2

`hf-prune COMMAND --help` explains a command. Any command also takes its arguments
from a YAML file with --config: its keys are their long names, and what is given
on the command line wins. The second example as a file is

  model: ./bert-sst2
  method: kcm
  budget: {macs: 0.6}
  dataset: reviews.txt
  output: ./bert-sst2-60

exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`list[str]`, *optional*): The arguments. Defaults to those of the process.

    Returns:
        `int`: The exit code, 0, 1 or 130. A wrong call leaves with `SystemExit(2)`, as argparse does.
    """
    debug = False
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        debug = args.debug
        with redirect_stdout(sys.stderr):  # whatever a library prints, it is no result
            data, text = args.run(args)
        print(json.dumps(_plain(data), indent=2, allow_nan=False) if args.json else text, flush=True)
    except KeyboardInterrupt:
        print("hf-prune: interrupted", file=sys.stderr)
        return 130
    except (PruningError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"hf-prune: error: {error}", file=sys.stderr)
        return 1
    return 0


def _plain(data: Any) -> Any:
    """Data as JSON has them: it knows no NaN and no infinity, so they become null."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _parse(argv: list[str]) -> argparse.Namespace:
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("hf-prune", description=_DESCRIPTION, epilog=_EXAMPLES, **options)
    parser.add_argument("--version", action="version", version=f"hf_prune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, **options)
        if argv[:1] == [name]:
            module = import_module(f".{name}", __name__)
            module.add_arguments(command)
            command.add_argument(
                "--config", metavar="FILE", help="take arguments from a YAML file, see hf-prune --help"
            )
            command.add_argument("--json", action="store_true", help="print the result as JSON")
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run, error=command.error)
            command.usage = _usage(command)
            if any(argument.partition("=")[0] == "--config" for argument in argv):
                return parse_with_file(parser, command, argv)
    return parser.parse_args(argv)


def _usage(command: argparse.ArgumentParser) -> str:
    """What is required; the list of options says the rest."""
    required = [action for action in command._actions if action.required]
    words = [" ".join([*a.option_strings[-1:], str(a.metavar), *["..."] * (a.nargs == "+")]) for a in required]
    return " ".join(["%(prog)s", *words, "[options]"])
