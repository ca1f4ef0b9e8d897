"""The command line: `hf-prune inspect`, `prune` and `bench`. One file per command; this one imports no torch.

Results go to stdout; progress, warnings and errors to stderr. The exit code is 0 when all went well, 1 when a command
failed, 2 when it was called wrongly, and 130 after Ctrl-C.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import PruningError

TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "question-answering": "AutoModelForQuestionAnswering",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "token-classification": "AutoModelForTokenClassification",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`list[str]`, *optional*): The arguments. Defaults to those of the process.

    Returns:
        `int`: The exit code, 0, 1 or 130. A wrong call leaves with `SystemExit(2)`, as argparse does.
    """
    args = _parser().parse_args(argv)
    try:
        command = import_module(f".{args.command}", __name__)
        with redirect_stdout(sys.stderr):  # whatever a library prints, it is no result
            data, text = command.run(args)
        print(json.dumps(data, indent=2) if args.json else text, flush=True)
    except KeyboardInterrupt:
        print("hf-prune: interrupted", file=sys.stderr)
        return 130
    except (PruningError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"hf-prune: error: {error}", file=sys.stderr)
        return 1
    return 0


class _HelpWithMethods(argparse.Action):
    """`--help` that asks the registry for the methods and their options; only this help has to wait for torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .prune import methods_help

        parser.epilog = f"{methods_help()}\n\n{parser.epilog}"
        parser.print_help()
        parser.exit()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _limit(text: str) -> tuple[str, float]:
    metric, _, value = text.partition("=")
    for number in (int, float):
        try:
            return metric, number(value)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(
        f"{text!r} is no METRIC=LIMIT: give the ratio to keep, in (0, 1], such as macs=0.6, or an absolute whole "
        "number such as params=40000000, of macs, params, memory or latency (milliseconds)"
    )


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, such as recover=none")
    return key, value


_DESCRIPTION = """\
Make Hugging Face transformers physically smaller and faster: remove attention
heads and feed-forward neurons, then load the result with plain from_pretrained.
Look at a model with inspect, make it smaller with prune, and measure what that
gained with bench.
"""
_EXAMPLES = """\
examples:
  hf-prune inspect google-bert/bert-base-uncased
  hf-prune prune ./bert-sst2 --method kcm --budget macs=0.6 \\
      --dataset reviews.txt --output ./bert-sst2-60
  hf-prune bench ./bert-sst2-60 --against ./bert-sst2

`hf-prune COMMAND --help` explains a command.
exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted
"""
_INSPECT = """\
Show what of a model can be pruned: its heads (KV groups under grouped-query
attention), neurons and layers, what they cost, which of them plain transformers
loads in smaller number, and how far each method can go. The weights are loaded,
on the CPU, and nothing is changed.
"""
_INSPECT_EXAMPLES = """\
examples:
  hf-prune inspect google-bert/bert-base-uncased
  hf-prune inspect ./bert-sst2-60 --sequence-length 64 --json

MACs are the multiply-accumulates of the layers in one forward pass over one
example; embeddings and task head are left out.
"""
_PRUNE = """\
Make a model smaller: choose the heads and neurons to keep, cut the others out,
save the result, and reload it to compare its outputs before the command ends.
Methods with --sparsity or --pattern zero single weights instead, which makes no
model smaller or faster by itself.
Methods that look at activations want a few hundred to a few thousand examples
like those of the task. Plain text without labels will do, except for
encoder-decoders, which need columns of input_ids and labels.
"""
_PRUNE_EXAMPLES = """\
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
_BENCH = """\
Measure checkpoints side by side: latency (median and 95th percentile of one
forward pass), peak memory, size on disk, MACs and parameters. The models take
turns on the same random inputs, so that a busy machine slows all of them down
alike; the figures of two calls do not compare.
"""
_BENCH_EXAMPLES = """\
examples:
  hf-prune bench ./bert-sst2-60 --against ./bert-sst2
  hf-prune bench ./bert-80 ./bert-60 --against ./bert --batch-size 1 32 \\
      --threads 4 --json > bench.json

The table is Markdown, with ratios to the first model.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-prune", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"hf_prune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name != "prune",
        )
        command.set_defaults(error=command.error)
        return command

    _add_inspect(add("inspect", "show what of a model can be pruned, and what it costs", _INSPECT, _INSPECT_EXAMPLES))
    _add_prune(add("prune", "make a model smaller, and save it", _PRUNE, _PRUNE_EXAMPLES))
    _add_bench(add("bench", "measure latency, memory and size side by side", _BENCH, _BENCH_EXAMPLES))
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--sequence-length",
        type=_count,
        default=128,
        metavar="TOKENS",
        help="tokens per example at which MACs are counted, at least 1; default: %(default)s",
    )


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action=_HelpWithMethods, nargs=0, help="show this help message and exit")
    _add_model(parser)
    parser.add_argument("--method", required=True, help="how to choose what stays, see below")
    parser.add_argument(
        "--budget",
        type=_limit,
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
        type=_setting,
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
        type=_count,
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
        type=_count,
        metavar="TOKENS",
        help="tokens per example at which MACs are counted, at least 1; default: the mean of the data, 128 without",
    )
    parser.add_argument(
        "--target-length",
        type=_count,
        metavar="TOKENS",
        help="the same for a decoder that follows an encoder; default: as above",
    )
    parser.add_argument(
        "--drop-layers",
        type=_count,
        metavar="N",
        help="first drop the N layers that change the hidden states of the data least, at least 1; the budget counts "
        "them as gone; default: none",
    )
    parser.add_argument(
        "--latency-batch-size",
        type=_count,
        metavar="N",
        help="examples in the batch for a budget of latency, at least 1; default: 1",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights while pruning and when saved; default: auto, as they are stored",
    )
    _add_device(parser)
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="save code along, so that the model loads with trust_remote_code=True where hf_prune is not installed",
    )
    data = parser.add_argument_group("calibration data")
    data.add_argument(
        "--dataset",
        metavar="FILE_OR_ID",
        help="a .txt file (one example a line), a .jsonl, .json, .csv or .tsv file, or a dataset of the Hub",
    )
    data.add_argument("--dataset-config", metavar="NAME", help="configuration of a dataset of the Hub; default: none")
    data.add_argument("--split", metavar="NAME", help="split of a dataset of the Hub; default: train")
    data.add_argument(
        "--text-column", metavar="NAME", help="the column with the text; default: the only column of strings"
    )
    data.add_argument(
        "--max-samples",
        type=_count,
        default=2048,
        metavar="N",
        help="read the first N examples, at least 1; shuffle data that are sorted by class; default: %(default)s",
    )
    data.add_argument(
        "--batch-size",
        type=_count,
        default=32,
        metavar="N",
        help="examples in a batch, at least 1; default: %(default)s",
    )
    data.add_argument(
        "--max-length",
        type=_count,
        metavar="TOKENS",
        help="cut longer texts to this many tokens, at least 1; default: what tokenizer and model take",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=_MODEL)
    parser.add_argument("--against", metavar="DENSE", help="the model to compare with; default: the first MODEL")
    parser.add_argument(
        "--batch-size",
        type=_count,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="examples in a batch, at least 1; latency is measured at each size given; default: 1 8",
    )
    parser.add_argument(
        "--sequence-length",
        type=_count,
        default=128,
        metavar="TOKENS",
        help="tokens in each example, at least 1; default: %(default)s",
    )
    parser.add_argument(
        "--repeats", type=_count, default=30, metavar="N", help="timed passes, at least 1; default: %(default)s"
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="threads on the CPU, at least 1; default: what torch takes"
    )
    _add_device(parser)


_MODEL = "a folder that save_pretrained wrote, or a model of the Hub"


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "--task",
        default="auto",
        choices=("auto", *TASKS),
        metavar="TASK",
        help=f"load the model for this task: {', '.join(TASKS)}; default: auto, the class that its config names",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where to run: cpu, cuda, cuda:1, ...; default: the GPU if there is one")
