"""Calibration data in any form in, padded batches of tensors out."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .errors import CalibrationError, ConfigError

Batch = dict[str, torch.Tensor]
_PADDING = {"attention_mask": 0, "decoder_attention_mask": 0, "token_type_ids": 0, "labels": -100}


def read_batches(
    model: PreTrainedModel,
    data: Any,
    *,
    processing_class: Any,
    text_column: str | None,
    max_samples: int | None,
    batch_size: int,
    max_length: int | None,
    labels: bool,
) -> list[Any]:
    """Read data once and keep them as batches. Arguments as in [`~hf_prune.Calibrator`].

    Returns:
        `list`: Examples, sorted by length, as padded batches, dicts of tensors. Batches of a loader as they are,
        whatever they are; the last one is cut to `max_samples`.

    Raises:
        CalibrationError: The data are of no known form, or text without a tokenizer that knows its words; examples
            don't fit into one batch; there are several columns of text, and `text_column` names none.
        ConfigError: `text_column` is not in the data.
    """
    if isinstance(data, str | os.PathLike | Mapping):
        kind = type(data).__name__
        raise CalibrationError(f"The calibration data are one {kind}: give a list of examples, a Dataset or a loader.")
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__") or _is_batch(next(iter(data), None)):
        return _whole_batches(data, max_samples)
    reader = _Reader(model, processing_class, text_column, max_length, labels)
    return list(reader.batches(list(islice(iter(data), max_samples)), batch_size))


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether a model predicts each token from those before it, so that its labels are its inputs."""
    return bool(model.can_generate() and not model.config.is_encoder_decoder)


def update_digest(digest: "hashlib._Hash", tensors: Mapping[str, torch.Tensor]) -> "hashlib._Hash":
    """Feed a digest with tensors and their names, in the order of the names. It comes back.

    Args:
        digest (`hashlib` object): The digest, such as `hashlib.sha256()`.
        tensors (`dict[str, torch.Tensor]`): Tensors on any device. Their bytes count, not their shapes and dtypes.

    Returns:
        `hashlib` object: The same digest.
    """
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest


def _is_batch(item: Any) -> bool:
    """Whether an element of a list is a batch already, rather than one example."""
    dims = {"input_ids": 2, "pixel_values": 4, "input_features": 3}
    return isinstance(item, Mapping) and any(
        isinstance(item.get(k), torch.Tensor) and item[k].dim() == n for k, n in dims.items()
    )


def _whole_batches(loader: Iterable[Any], max_samples: int | None) -> list[Any]:
    batches, left = [], float("inf") if max_samples is None else max_samples
    for batch in loader:
        if left <= 0:
            break
        if isinstance(batch, Mapping):
            size = len(next(iter(batch.values())))
            if size > left:
                batch = {k: v[: int(left)] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            left -= size
        batches.append(batch)
    return batches


class _Reader:
    """Turns examples into padded batches of similar length."""

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Any,
        text_column: str | None,
        max_length: int | None,
        labels: bool,
    ) -> None:
        self.labels = labels
        self.processing_class, self.text_column, self.main_input = processing_class, text_column, model.main_input_name
        tokens = (getattr(source, "pad_token_id", None) for source in (processing_class, model.config))
        self.pad_token: int = next((token for token in tokens if token is not None), 0)
        limits = [
            getattr(processing_class, "model_max_length", None),
            getattr(model.config, "max_position_embeddings", None),
            max_length,
        ]
        self.max_length = min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)

    def batches(self, examples: Sequence[Any], batch_size: int) -> Iterator[Batch]:
        items = [self._tensors(item) for item in self._tokenised(examples)]
        items.sort(key=lambda item: max((len(v) for v in item.values() if v.dim()), default=0))
        for start in range(0, len(items), batch_size):
            yield self._collate(items[start : start + batch_size])

    def _tokenised(self, examples: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
        special, texts, unknown_words = {*getattr(self.processing_class, "all_special_ids", ())}, 0, 0
        for example in examples:
            text = example
            if isinstance(example, Mapping):
                if self.main_input in example or not self._has_text(example):
                    yield {**example, **self._label(example)}
                    continue
                text = self._text(example)
            if not isinstance(text, str):
                raise CalibrationError(
                    f"An example must be a string or a dict of model inputs, got {type(text).__name__}: {text!r:.50}."
                )
            if self.processing_class is None:
                raise CalibrationError("The calibration data are text: pass processing_class=tokenizer.")
            item = self.processing_class(text, truncation=self.max_length is not None, max_length=self.max_length)
            unknown_words += bool(item["input_ids"]) and set(item["input_ids"]) <= special
            texts += 1
            yield item if example is text else {**item, **self._label(example)}
        if texts and unknown_words == texts:
            # What AutoTokenizer makes of a folder without tokenizer files.
            raise CalibrationError("The tokenizer knows none of the words of the calibration data: is it the model's?")

    def _label(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The label as models call it. Data sets say `label`, as the collators of transformers know too."""
        names = [name for name in ("labels", "label") if example.get(name) is not None]
        return {"labels": example[names[0]]} if self.labels and names else {}

    def _has_text(self, example: Mapping[str, Any]) -> bool:
        return self.text_column is not None or any(isinstance(value, str) for value in example.values())

    def _text(self, example: Mapping[str, Any]) -> Any:
        if self.text_column is not None:
            if self.text_column not in example:
                names = ", ".join(map(str, example))
                raise ConfigError(f"text_column {self.text_column!r} is not in the data: {names}.")
            return example[self.text_column]
        strings = [key for key, value in example.items() if isinstance(value, str)]
        if len(strings) > 1:
            raise CalibrationError(
                f"There are several columns of text ({', '.join(strings)}): name one with text_column=."
            )
        self.text_column = strings[0]
        return example[self.text_column]

    def _tensors(self, item: Mapping[str, Any]) -> Batch:
        tensors = {}
        for key, value in item.items():
            try:
                tensors[key] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                continue  # columns that are no numbers are no model inputs
        return tensors

    def _collate(self, items: list[Batch]) -> Batch:
        batch = {}
        for key in dict.fromkeys(key for item in items for key in item):
            if not all(key in item for item in items):
                raise CalibrationError(f"Some examples have {key!r} and some have not.")
            values = [item[key] for item in items]
            if values[0].dim() == 1:
                padding = float(_PADDING.get(key, self.pad_token))
                batch[key] = pad_sequence(values, batch_first=True, padding_value=padding)
            elif len({value.shape for value in values}) == 1:
                batch[key] = torch.stack(values)
            else:
                raise CalibrationError(
                    f"The examples have {key!r} of different shapes: pass batches (a DataLoader) instead."
                )
        if (
            "attention_mask" not in batch
            and "input_ids" in batch
            and len({len(item["input_ids"]) for item in items}) > 1
        ):
            batch["attention_mask"] = pad_sequence(
                [torch.ones_like(item["input_ids"]) for item in items], batch_first=True
            )
        return batch


_BUILDERS = ("csv", "json", "text", "parquet", "arrow", "pandas", "generator")  # of files: no names of data


def data_source(data: Any) -> dict[str, str]:
    """Where a `datasets.Dataset` says that it comes from: `dataset`, `config`, `split`, and its `revision` on the
    Hub, as far as it knows."""
    info: Any = getattr(data, "info", None)
    name = getattr(info, "dataset_name", None)
    if not name or getattr(info, "builder_name", None) in _BUILDERS or name in _BUILDERS:
        return {}
    found = {"dataset": name, "config": info.config_name, "split": getattr(data, "split", None)}
    for url in info.download_checksums or ():
        hub = re.match(r"hf://datasets/([^@]+)@([^/]+)/", str(url))
        if hub is not None:
            found |= {"dataset": hub[1], "revision": hub[2]}
    return {key: str(value) for key, value in found.items() if value}
