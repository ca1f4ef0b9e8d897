"""`hf-prune export`: write a model in a format that runs without PyTorch's Python."""

import argparse
from typing import Any

from ..errors import ConfigError
from ..export import FORMATS, export_folder, export_model
from .arguments import add_model
from .loading import load_model, load_processor, resolve

_DESCRIPTION = """\
Export a model, pruned or not, as one graph of a forward pass with dynamic batch
and length. Before it is written, the graph runs on inputs of several sizes and
is compared with the model. Generation with a cache is not exported.
"""
_EXAMPLES = """\
examples:
  hf-prune export ./bert-sst2-60 --output ./bert-sst2-60-onnx
  hf-prune export ./bert-sst2-60 --format torch --output ./bert-sst2-60-pt2

onnx writes model.onnx and its weights model.onnx.data, and needs
  pip install 'hf_prune[onnx]'
torch writes model.pt2, for torch.export.load. Both load with
  transformers.exporters.ExportedModel.from_pretrained.
`hf-prune bench A --against B --onnx` measures what ONNX Runtime makes of it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_model(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where to write; an export there is replaced"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the command has written, as data and as text."""
    try:
        name, output = resolve(args.model), export_folder(args.output)
    except ConfigError as error:
        args.error(str(error))
    model = load_model(name, args.task)
    processor = load_processor(name)
    export_model(model, output, args.format)
    if processor is not None:
        processor.save_pretrained(output)
    file = output / FORMATS[args.format]
    text = f"""\
Wrote {file}. It computes what the model does, at batches and lengths that the export has not seen.

    from transformers.exporters import ExportedModel
    model = ExportedModel.from_pretrained({str(output)!r})"""
    return {"model": name, "class": type(model).__name__, "format": args.format, "file": str(file)}, text
