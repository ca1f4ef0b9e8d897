"""Run calibration data through a model and gather statistics at the sites of its units.

[`Calibrator`] brings the data into batches, shares them among the processes that Accelerate knows, leaves padding out,
and sums what the processes saw, so that the result depends neither on the batch size nor on their number.
"""

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate.utils import reduce, send_to_device
from tqdm import tqdm
from transformers import PreTrainedModel

from .batches import Batch, data_source, is_causal_lm, read_batches, update_digest
from .errors import CalibrationError, check_whole
from .gates import LayerCalls, Observer, observe, record_calls
from .offload import execution_device
from .processes import process_state
from .statistics import Comparison, Statistic, Sums
from .timing import evaluating
from .units import base_model, prunable_units


class Calibrator:
    """Calibration data, ready to be run through a model any number of times.

    Args:
        model (`PreTrainedModel`): The model that will be calibrated.
        data: One of
            - a list (or other sequence) or `datasets.Dataset` of examples: dicts of model inputs, or of text, or plain
              strings;
            - a `DataLoader` or any other iterable (a generator) of batches, dicts of tensors, read once and kept.
        processing_class (*optional*): The tokenizer (or processor) for text; also used to pad examples.
        text_column (`str`, *optional*): Which column holds the text. Not needed when there is just one.
        max_samples (`int`, *optional*): Read this many examples and no more. All by default.
        batch_size (`int`, *optional*, defaults to 32): Examples in a batch. Batches from a loader stay as they are.
        max_length (`int`, *optional*): Truncate text to this many tokens. Defaults to what the tokenizer and the model
            take.
        labels (`bool`, *optional*, defaults to `False`): Keep the labels (column `labels`, or `label`) and require
            them, for methods that look at the loss. Causal language models make do without: theirs are the input ids.

    Attributes:
        samples, tokens (`int`): Examples and real tokens in all, over all processes.
        tokens_of (`dict[str, int]`): The real tokens that go into each stack.
        lengths (`tuple[float, float | None]`): Mean number of real tokens of an example, on the encoder's (or only)
            side and on that of a decoder which follows an encoder.
        fingerprint (`str`): SHA-256 of the inputs.
        examples (`list[list[int]]`): For each batch of this process the numbers of its examples, counted over all
            batches of all processes.

    Raises:
        CalibrationError: No data, nothing but padding in an example, or inputs that the model does not take.
        ConfigError: An option is out of range.
        UnsupportedModelError: The model can't be pruned.

    Under `accelerate launch` or torchrun every process makes its own Calibrator over the same data and reads its share
    of the batches. Examples are sorted by length before they are batched, which saves most of the padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: Any,
        *,
        processing_class: Any = None,
        text_column: str | None = None,
        max_samples: int | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        labels: bool = False,
    ) -> None:
        for name, value in (("max_samples", max_samples), ("batch_size", batch_size), ("max_length", max_length)):
            if value is not None:
                check_whole(1, **{name: value})
        self.model, self.labels, self._source = model, labels, data_source(data)
        self.units = prunable_units(model)
        self._accepted = set(inspect.signature(model.forward).parameters)
        batches = read_batches(
            model,
            data,
            processing_class=processing_class,
            text_column=text_column,
            max_samples=max_samples,
            batch_size=batch_size,
            max_length=max_length,
            labels=labels,
        )
        batches = [self._usable(batch) for batch in batches]
        if not batches:
            raise CalibrationError("The calibration data are empty: give at least one example.")
        self._check_decodable(batches[0])
        self._measure(batches)
        state = process_state()
        ends = [0, *accumulate(len(next(iter(batch.values()))) for batch in batches)]
        numbers = [list(range(*pair)) for pair in pairwise(ends)]
        self._batches = batches[state.process_index :: state.num_processes]
        self.examples = numbers[state.process_index :: state.num_processes]

    def __len__(self) -> int:
        return self.samples

    def describe(self) -> dict[str, Any]:
        """What a report says about the data.

        Returns:
            `dict`: `samples`, `tokens`, `mean_length` (tokens of an example, on the encoder's or only side), `sha256`;
            of a `datasets.Dataset` also where it comes from, as far as it knows: `dataset`, `config`, `split`,
            `revision`.
        """
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "mean_length": self.lengths[0],
            "sha256": self.fingerprint,
            **self._source,
        }

    # Running

    def batches(self, description: str) -> Iterator[tuple[int, Batch]]:
        """This process's batches with their indices, on the model's device, with a progress bar.

        Args:
            description (`str`): Of the progress bar.

        Yields:
            `int` and `dict[str, torch.Tensor]`: The index of the batch among those of this process, as in `examples`,
            and the batch.
        """
        quiet = not process_state().is_main_process or None  # None: only where stderr is a terminal
        for index, batch in enumerate(tqdm(self._batches, desc=description, disable=quiet, leave=False)):
            yield index, send_to_device(batch, execution_device(self.model))

    def split(self, every: int) -> tuple["Calibrator", "Calibrator"]:
        """Two parts of the data: all examples but each `every`-th, and those.

        Args:
            every (`int`): Held out are the examples number `every`, 2·`every`, ... in the order of the batches of all
                processes.

        Returns:
            `tuple[Calibrator, Calibrator]`: The larger part and the held-out one. `tokens`, `lengths` and
            `fingerprint` stay those of the whole.

        Raises:
            CalibrationError: There are fewer examples than `every`.
        """
        if self.samples < every:
            raise CalibrationError(
                f"To hold out every {every}th example takes at least {every} of them, the calibration data have "
                f"{self.samples}."
            )
        fit = self._rebatched(lambda numbers, _: [[n for n in numbers if n % every != every - 1]])
        held_out = self._rebatched(lambda numbers, _: [[n for n in numbers if n % every == every - 1]])
        fit.samples, held_out.samples = self.samples - self.samples // every, self.samples // every
        return fit, held_out

    def in_parts(self, tokens: int = 512) -> "Calibrator":
        """The same data in smaller batches: of at most so many tokens, padding included, or of one example.

        A backward pass holds the activations of all layers for a batch, where inference holds those of one.

        Args:
            tokens (`int`, *optional*, defaults to 512): The most tokens in a batch. Without `input_ids` an example
                counts as the longer of its mean `lengths`.

        Returns:
            [`Calibrator`]: A copy; each batch is a part of one of this one.
        """
        longest = math.ceil(max(length or 0 for length in self.lengths))

        def parts(numbers: list[int], batch: Batch) -> list[list[int]]:
            ids = batch.get("input_ids")
            size = max(tokens // (ids.shape[1] if ids is not None else longest), 1)
            return [numbers[start : start + size] for start in range(0, len(numbers), size)]

        return self._rebatched(parts)

    def _rebatched(self, divide: Callable[[list[int], Batch], list[list[int]]]) -> "Calibrator":
        """A copy in which each batch, with the numbers of its examples, is divided as a function says."""
        other = copy.copy(self)
        other._batches, other.examples = [], []
        for batch, numbers in zip(self._batches, self.examples, strict=True):
            rows_of = {number: row for row, number in enumerate(numbers)}
            for part in filter(None, divide(numbers, batch)):
                rows = [rows_of[number] for number in part]
                other._batches.append({name: value[rows] for name, value in batch.items()})
                other.examples.append(part)
        return other

    def forward(self, batch: Batch, model: PreTrainedModel | None = None) -> Any:
        """One forward pass without a KV cache, of the calibrator's model or of another one of its class.

        Args:
            batch (`dict[str, torch.Tensor]`): A batch as [`~Calibrator.batches`] yields it.
            model (`PreTrainedModel`, *optional*): The other model.

        Returns:
            `ModelOutput`: What the model returns.
        """
        cached = {"use_cache": False} if "use_cache" in self._accepted else {}
        return (model if model is not None else self.model)(**batch, **cached)

    def collect(
        self, statistics: Mapping[str, Statistic], description: str = "calibrate", record: bool = False
    ) -> list[dict[str, LayerCalls]]:
        """Fill statistics in one pass over the data.

        Args:
            statistics (`dict[str, Statistic]`): By name of a unit group: what to feed with the inputs of its site.
            description (`str`, *optional*): Of the progress bar.
            record (`bool`, *optional*, defaults to `False`): Also remember how the layers were called.

        Returns:
            `list[dict[str, LayerCalls]]`: For each batch of this process the calls, by stack. Empty unless `record`.

        Raises:
            CalibrationError: A statistic is NaN or infinite; the message names the site.
        """
        base, calls = base_model(self.model), []
        with self.evaluating():
            for _, batch in self.batches(description):
                feeds = {
                    name: self._feed(statistic, self.real_tokens(batch, self.units[name].stack), name)
                    for name, statistic in statistics.items()
                }
                with observe(base, feeds), record_calls(base, self.units.stacks if record else ()) as recorded:
                    self.forward(batch)
                if record:
                    calls.append(recorded)
        self.reduce(statistics)
        return calls

    def collect_layers(self, comparisons: Mapping[str, Comparison], description: str = "compare layers") -> None:
        """Feed comparisons with what goes into and comes out of layers, in one pass over the data.

        Args:
            comparisons (`dict[str, Comparison]`): By name of a layer, relative to the base model.
            description (`str`, *optional*): Of the progress bar.

        Raises:
            CalibrationError: A hidden state is NaN or infinite; the message names the layer.
        """
        base = base_model(self.model)
        with self.evaluating():
            for _, batch in self.batches(description):
                pairs = {
                    name: _pair(comparison, self.real_tokens(batch, name.rpartition(".")[0]), name)
                    for name, comparison in comparisons.items()
                }
                inputs, outputs = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
                with observe(base, inputs, outputs):
                    self.forward(batch)
        self.reduce(comparisons)

    def reduce(self, statistics: Mapping[str, Sums]) -> None:
        """Sum statistics over the processes, and check them.

        Args:
            statistics (`dict[str, Sums]`): By name of the site, for the message; each is changed in place.

        Raises:
            CalibrationError: One is NaN or infinite; the message names the site.
        """
        for name, statistic in statistics.items():
            for tensor in statistic.sums():
                tensor.copy_(reduce(tensor, "sum"))
                if not tensor.isfinite().all():
                    raise not_finite(name)

    def evaluating(self) -> AbstractContextManager[None]:
        """Without gradients and dropout; the training mode of the model is restored."""
        return evaluating(self.model)

    def real_tokens(self, batch: Batch, stack: str) -> torch.Tensor | None:
        """Which positions of a batch are real in a stack: bool of shape (batch, tokens), `None` if all are.

        Args:
            batch (`dict[str, torch.Tensor]`): The batch.
            stack (`str`): The stack, by its name in [`PrunableUnits`]. In a decoder that follows an encoder the
                positions are those of its own input: where that is made of labels, real is all but -100; where it has
                no mask, all up to the last token that is no padding.
        """
        spec = self.units.stacks[stack]
        if spec.fixed_length is not None:
            return None
        if not spec.decoder:
            mask = batch.get("attention_mask")
            return mask.bool() if mask is not None and mask.dim() == 2 and "input_ids" in batch else None
        if "decoder_attention_mask" in batch:
            return batch["decoder_attention_mask"].bool()
        if self._decodes_labels(batch):
            return batch["labels"].ne(-100)
        name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
        if name == "input_ids" and "attention_mask" in batch:  # the decoder reads what the encoder reads
            return batch["attention_mask"].bool()
        if name not in batch or self.model.config.pad_token_id is None:
            return None
        # The start token may be the padding token: real is what comes before the last token that is none.
        text = batch[name].ne(self.model.config.pad_token_id)
        real = text.flip(1).cumsum(1).flip(1).gt(0)
        real[:, 0] = True
        return real

    def _feed(self, statistic: Statistic, real: torch.Tensor | None, name: str) -> Callable[[torch.Tensor], None]:
        def feed(inputs: torch.Tensor) -> None:
            statistic.update(select_real(inputs, real, name))

        return feed

    # Data

    def _usable(self, batch: Any) -> Batch:
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"A batch must be a dict of tensors, got {type(batch).__name__}. Pass examples as a list or a Dataset."
            )
        usable = {k: v for k, v in batch.items() if k in self._accepted and isinstance(v, torch.Tensor)}
        main = self.model.main_input_name
        if not usable or (main not in usable and "inputs_embeds" not in usable):
            text = "Pass text with processing_class=tokenizer, or tokenised examples."
            raise CalibrationError(
                f"{type(self.model).__name__} needs {main!r}, the calibration data have {sorted(map(str, batch))}. "
                f"{text if main == 'input_ids' else 'Pass what its processor returns.'}"
            )
        ids = usable.get("input_ids")
        size = self.model.config.get_text_config().vocab_size if ids is not None else 0
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise CalibrationError(
                f"The calibration data have token ids from {int(ids.min())} to {int(ids.max())}, the vocabulary of "
                f"the model has {size}: were they made by another model's tokenizer?"
            )
        if self.labels and "labels" not in usable and ids is not None and is_causal_lm(self.model):
            real = usable["attention_mask"].bool() if "attention_mask" in usable else torch.ones_like(ids).bool()
            usable["labels"] = ids.where(real, -100)
        if self.labels and "labels" not in usable and not {"start_positions", "end_positions"} <= set(usable):
            raise CalibrationError("The method needs labels: the calibration data have no column 'labels' or 'label'.")
        if not self.labels and not self._decodes_labels(usable):
            for name in ("labels", "start_positions", "end_positions"):
                usable.pop(name, None)  # no statistic needs a loss
        return usable

    def _decodes_labels(self, batch: Batch) -> bool:
        """Whether a decoder is fed with the labels."""
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch)
        decodes = any(spec.decoder for spec in self.units.stacks.values())
        return decodes and not given and "labels" in batch and batch["labels"].dim() == 2

    def _check_decodable(self, batch: Batch) -> None:
        """Some encoder-decoders make do with the encoder's input (BART), others need their own: only they know."""
        if not self.model.config.is_encoder_decoder or {"labels", "decoder_input_ids"} & set(batch):
            return
        first = {name: value[:1].to(execution_device(self.model)) for name, value in batch.items()}
        try:
            with self.evaluating():
                self.forward(first)
        except (ValueError, TypeError, AttributeError) as error:
            raise CalibrationError(
                "An encoder-decoder needs 'labels' or 'decoder_input_ids' in the calibration data."
            ) from error

    def _measure(self, batches: Sequence[Batch]) -> None:
        digest = hashlib.sha256()
        self.samples = 0
        totals: dict[bool, float] = {}
        self.tokens_of = dict.fromkeys(self.units.stacks, 0)
        for batch in batches:
            size = len(next(iter(batch.values())))
            self.samples += size
            update_digest(digest, batch)
            for stack, spec in self.units.stacks.items():
                real = self.real_tokens(batch, stack)
                if real is not None:
                    if not real.any(1).all():
                        raise CalibrationError(
                            f"An example of the calibration data is nothing but padding (input of {stack}): drop it."
                        )
                    tokens = float(real.sum())
                elif spec.fixed_length is not None:
                    tokens = float(spec.fixed_length(self.model.config) * size)
                else:
                    name = (
                        "decoder_input_ids"
                        if spec.decoder and "decoder_input_ids" in batch
                        else self.model.main_input_name
                    )
                    shape = batch.get(name, batch.get("inputs_embeds", next(iter(batch.values())))).shape
                    tokens = float(shape[0] * shape[1])
                totals[spec.decoder] = totals.get(spec.decoder, 0.0) + tokens
                self.tokens_of[stack] += int(tokens)
        self.fingerprint = digest.hexdigest()
        self.tokens = int(sum(totals.values()))
        lengths = [totals[side] / self.samples for side in sorted(totals)]
        self.lengths = lengths[0], (lengths[1] if len(lengths) > 1 else None)


def not_finite(name: str | None) -> CalibrationError:
    """The error for statistics that are NaN or infinite. It is returned, not raised.

    Args:
        name (`str`, *optional*): The site or layer whose inputs they are; without one, the predictions or the loss.

    Returns:
        `CalibrationError`: What is wrong, and what to try.
    """
    what = "The predictions or the loss" if name is None else f"The inputs of {name}"
    below = "" if name is None else " below it"
    return CalibrationError(
        f"{what} are NaN or infinite on the calibration data. Check the weights of the layers{below}, and try float32 "
        "if the model runs in half precision."
    )


def _pair(comparison: Comparison, real: torch.Tensor | None, name: str) -> tuple[Observer, Observer]:
    """What to call with the input and with the output of a layer."""
    before: list[torch.Tensor] = []

    def compare(after: torch.Tensor) -> None:
        comparison.update(select_real(before.pop(), real, name), select_real(after, real, name))

    return before.append, compare


def select_real(inputs: torch.Tensor, real: torch.Tensor | None, name: str) -> torch.Tensor:
    """The rows of real tokens: (batch, tokens, columns) or (batch * tokens, columns) -> (real tokens, columns).

    Args:
        inputs (`torch.Tensor`): What a module was given.
        real (`torch.Tensor`, *optional*): bool of shape (batch, tokens). Without it all tokens are real.
        name (`str`): The module, for the message.

    Returns:
        `torch.Tensor`: The rows, in the order of the tokens.

    Raises:
        CalibrationError: There are more or fewer tokens than `real` has.
    """
    rows = inputs.flatten(0, -2)
    if real is None or (real.numel() == len(rows) and real.all()):
        return rows
    if real.numel() != len(rows):
        raise CalibrationError(
            f"{name} saw {len(rows)} tokens where the attention mask has {real.numel()}: padding can't be told apart."
        )
    return rows[real.flatten().to(rows.device)]
