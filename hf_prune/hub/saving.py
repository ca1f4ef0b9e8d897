"""Save a pruned model so that it provably loads again.

The checkpoint is written to a folder beside the target, reloaded as a user would, compared with the model in memory,
and only then put in the target's place: a crash at any moment leaves the old folder or the new one.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .. import compression
from ..errors import ConfigError, MaskError, PruningError, SaveError
from ..gates import current_mask, masked_columns
from ..layout import KEY, disable, enable
from ..masks import PruningMask
from ..offload import execution_device
from ..report import PruningReport
from ..timing import evaluating, example_inputs
from ..units import PrunableUnits, forget_gguf, prunable_units, site
from ..weight_masks import WeightMask
from .card import CARD_FILE, origin, usage, write_card
from .staging import link_others, staged
from .standalone import add_standalone_code

logger = logging.get_logger(__name__)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    mask: PruningMask | WeightMask | None = None,
    report: PruningReport | None = None,
    standalone: bool = False,
    compressed: bool = False,
    **options: Any,
) -> None:
    """Save a model, reload it, compare, and only then replace what was in the folder.

    A shrunk model loads with plain `from_pretrained`: with nothing but transformers where its config can hold the
    shapes, else after `import hf_prune`. A model that is masked but not shrunk is saved dense, with zeros in place of
    the pruned columns.

    Args:
        model (`PreTrainedModel`): The model.
        save_directory (`str` or path): The folder. Files in it that belong to no model stay.
        processing_class (*optional*): Tokenizer or processor to save beside it.
        mask ([`PruningMask`] or [`WeightMask`], *optional*): To save as `pruning_mask.safetensors`. Defaults to the
            mask that the model carries.
        report ([`PruningReport`], *optional*): To save as `pruning_report.json`, with the model card that it makes,
            `README.md`; a card that hf_prune did not write stays. The report learns how the checkpoint was verified,
            and what is known of the model that was pruned.
        standalone (`bool`, *optional*, defaults to `False`): Add the code that rebuilds the shapes, so that
            `from_pretrained(..., trust_remote_code=True)` loads the model where hf_prune is not installed.
        compressed (`bool`, *optional*, defaults to `False`): Store matrices with many zeros as one bit a weight and
            the values that are not zero: at a sparsity of 50 %, 0.53 of the size in float32, 0.56 in bfloat16.
            `from_pretrained` then needs `import hf_prune`; in memory the model is as large as ever.
        options: Passed on to `PreTrainedModel.save_pretrained`: `max_shard_size`, `variant`. With an explicit
            `state_dict`, as `Trainer` passes for sharded models, the stock method runs alone: the weights are not
            those in memory.

    Raises:
        ConfigError: Both `standalone` and `compressed` are asked for.
        SaveError: The folder can't be written, or what was written did not reload to the same function. The old folder
            is intact.
        MaskError: The model is masked to skip whole layers: shrink it first.
        UnsupportedModelError: The family is unknown, or the model can't be pruned.
    """
    if standalone and compressed:
        raise ConfigError("The code that standalone=True adds does not read compressed weights: choose one of them.")
    if (
        options.get("state_dict") is not None
        or not options.get("is_main_process", True)
        or options.get("distributed_checkpoint")
    ):
        _stock_save(model, save_directory, **options)
        return
    if options.pop("push_to_hub", False):
        raise SaveError("save_pretrained writes to disk: call model.push_to_hub(repo_id) afterwards.")
    target = Path(save_directory).resolve()
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file: give a folder.")
    options.pop("state_dict", None)
    forget_gguf(model)
    carried = current_mask(model)
    state = model.state_dict()
    if carried is not None:
        state = _folded(model, state, carried)
        logger.warning(
            "The model is masked but not shrunk: it is saved with all its parameters. shrink(model) cuts them."
        )
    here = _working_directory()  # perhaps the folder that is about to be replaced
    with staged(target) as staging:
        if standalone:  # remote code skips the renaming of weights that some families need at load
            options.setdefault("save_original_format", False)
        _stock_save(model, staging, state_dict=dict(state), **options)
        if compressed:
            _compress(staging)
        if processing_class is not None:
            processing_class.save_pretrained(staging)
        if (mask := mask if mask is not None else carried) is not None:
            mask.save(staging)
        if standalone:
            add_standalone_code(model, staging)
        for file in staging.iterdir():  # safetensors makes files that only their owner can read
            if file.is_file():
                file.chmod(staging.stat().st_mode & 0o666)
        if target.exists():
            link_others(target, staging, options.get("variant"))
        verified = {
            "processor": _processor(processing_class, staging),
            "variant": options.get("variant"),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "remote_code": standalone,
            "hf_prune": not standalone and (compressed or getattr(model.config, KEY, None) is not None),
            "usage": not standalone and _importable(model, staging),
            "masked": carried is not None,
        }
        verified["outputs"] = _verify(model, state, staging, verified)
        if report is not None:
            verified["usage"] &= report.model_class == type(model).__name__
            source = origin(model)
            if report.metadata.get("base_model", source.get("base_model")) != source.get("base_model"):
                source.pop("base_revision", None)  # it is that of another model
            metadata = source | report.metadata
            _document(replace(report, verified=verified, metadata=metadata), staging, target.name)
        for file in staging.iterdir():
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
    if report is not None:
        report.verified, report.metadata = verified, metadata
    if here is not None and here.is_relative_to(target):
        os.chdir(here)


def _compress(folder: Path) -> None:
    """Rewrite the weights in a folder, file by file."""
    homes: dict[str, str] = {}
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            parts = compression.compressed({name: file.get_tensor(name) for name in file.keys()})
            save_file(parts, waiting := path.with_suffix(".tmp"), metadata=file.metadata())
        os.replace(waiting, path)
        homes |= dict.fromkeys(parts, path.name)
        size += sum(part.nbytes for part in parts.values())
    for path in folder.glob("*.safetensors.index*.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"]["total_size"], index["weight_map"] = size, dict(sorted(homes.items()))
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was removed
        return None


def _stock_save(model: PreTrainedModel, directory: str | os.PathLike[str], **options: Any) -> None:
    PreTrainedModel.save_pretrained(model, directory, **options)


def _folded(model: PreTrainedModel, state: dict[str, torch.Tensor], mask: PruningMask) -> dict[str, torch.Tensor]:
    """The weights with zeros in the columns of pruned units: without gates they compute what the masked model does."""
    units: PrunableUnits = prunable_units(model)
    for group in units.of_kind("layers"):
        if not mask[group.name].all():
            raise MaskError(
                f"The mask skips layers of {group.name}, zeros can't say that: call shrink(model) before saving."
            )
    names = {id(module): name for name, module in model.named_modules()}
    state = dict(state)
    for group, columns in masked_columns(model, units, mask):
        module = site(model, group)
        weight = module.weight.detach().clone()
        weight.index_fill_(0 if isinstance(module, Conv1D) else 1, columns.to(weight.device), 0)
        state[f"{names[id(module)]}.weight"] = weight
    return state


# Reload and compare


def _verify(model: PreTrainedModel, state: dict[str, torch.Tensor], directory: Path, how: Mapping[str, Any]) -> bool:
    """Whether the outputs could be compared too; raises if anything differs. `how` is what a report says of it."""
    name = type(model).__name__
    try:
        again = _reload(model, directory, how)
    except (OSError, ValueError, RuntimeError, PruningError, SafetensorError) as error:
        raise SaveError(f"The saved {name} does not load again, nothing was replaced: {error}") from error
    loaded = again.state_dict()
    for key in state.keys() | loaded.keys():
        if key in loaded and key in state and state[key].dtype not in (loaded[key].dtype, model.dtype):
            raise SaveError(
                f"{key} is {state[key].dtype} in memory and {loaded[key].dtype} when it is reloaded, nothing was "
                "replaced: transformers loads a checkpoint in one dtype. Cast the model first: model.to(dtype)."
            )
        if key not in loaded or key not in state or not _same(_value(model, key, state[key]), loaded[key]):
            raise SaveError(
                f"The saved {name} reloads with another {key!r}, nothing was replaced. Please report this family."
            )
    try:
        again = again.to(execution_device(model))
        inputs = example_inputs(model, batch_size=1, sequence_length=8)
        ours = first_output(model, inputs)
    except (ConfigError, RuntimeError, ValueError, TypeError) as error:
        logger.warning(f"The weights reload equal; the outputs were not compared: {error}")
        return False
    try:
        theirs = first_output(again, inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SaveError(f"The saved {name} does not run when it is reloaded, nothing was replaced: {error}") from error
    # The weights are equal to the bit; kernels may round differently where they lie differently in memory.
    tolerance = 1e-4 if ours.dtype == torch.float32 else 3e-2
    scale = ours.abs().max().clamp_min(1.0)
    if ours.shape != theirs.shape or not bool((ours - theirs).abs().max() <= tolerance * scale):
        raise SaveError(
            f"The saved {name} computes something else when it is reloaded, nothing was replaced: a "
            f"{model.config.model_type} keeps state that its config and weights do not hold. Please report this."
        )
    return True


def _processor(processing_class: Any, directory: Path) -> str | None:
    """The auto class that loads what a tokenizer or processor has saved, if it does."""
    kinds = {
        "AutoTokenizer": PreTrainedTokenizerBase,
        "AutoProcessor": ProcessorMixin,
        "AutoImageProcessor": ImageProcessingMixin,
        "AutoFeatureExtractor": FeatureExtractionMixin,
    }
    processor = next((auto for auto, kind in kinds.items() if isinstance(processing_class, kind)), None)
    if processor is not None:
        try:
            getattr(transformers, processor).from_pretrained(directory)
        except Exception as error:  # from OSError to whatever the code of tokenizers raises
            logger.warning(f"{processor} does not load what {type(processing_class).__name__} saved: {error}")
            processor = None
    return processor


def _importable(model: PreTrainedModel, directory: Path) -> bool:
    """Whether `from transformers import ...` gives the class of a model, and not one that it was derived from."""
    cls, classes = getattr(transformers, type(model).__name__, None), type(model).__mro__
    if cls not in classes or '"auto_map"' in (directory / "config.json").read_text(encoding="utf-8"):
        return False
    homes = {cls.__module__, "hf_prune.modeling"}  # of the class that prunable() makes, and of its mixin
    derived = (c.__module__ for c in classes[: classes.index(cls)])
    return all(home in homes or home.startswith("transformers_modules.") for home in derived)


def _document(report: PruningReport, directory: Path, name: str) -> None:
    """The report and, unless somebody else wrote one, the card. A card is not worth a model that is not saved."""
    report.save(directory)
    if not (directory / CARD_FILE).exists():
        try:
            write_card(directory, name=name)
        except PruningError as error:
            logger.warning(f"The model is saved without a card: {error}")


def _reload(model: PreTrainedModel, directory: Path, how: Mapping[str, Any]) -> PreTrainedModel:
    """The saved model, by the lines of the model card where those can run."""
    options: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": how["attention"]}
    if how["variant"] is not None:
        options["variant"] = how["variant"]
    enabled = getattr(PreTrainedModel.post_init, "_hf_prune", False)
    if not how["hf_prune"]:
        disable()  # it must load without hf_prune
    try:
        if how["remote_code"]:
            return _reload_remote(model, directory, options)
        if how["usage"]:
            return _run_usage(model, directory, how)
        cls = next(c for c in type(model).__mro__ if not c.__module__.startswith("transformers_modules."))
        loaded: PreTrainedModel = cls.from_pretrained(directory, **options)  # type: ignore[attr-defined]
        return loaded
    finally:
        if enabled:
            enable()


def _run_usage(model: PreTrainedModel, directory: Path, how: Mapping[str, Any]) -> PreTrainedModel:
    found: dict[str, Any] = {}
    lines = usage(
        ascii(str(directory)),
        type(model).__name__,
        processor=how["processor"],
        variant=how["variant"],
        needs_hf_prune=how["hf_prune"],
    )
    exec(lines, found)
    loaded: PreTrainedModel = found["model"]
    if loaded.config._attn_implementation != how["attention"]:
        loaded.set_attn_implementation(how["attention"])
    return loaded


def _reload_remote(model: PreTrainedModel, directory: Path, options: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    reference = next(ref for ref in config.auto_map.values() if ref.endswith(f".{type(model).__name__}"))
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = get_class_from_dynamic_module(reference, directory)
    try:
        loaded: PreTrainedModel = remote.from_pretrained(directory, **options)
        return loaded
    finally:
        module = sys.modules.pop(remote.__module__)
        shutil.rmtree(Path(str(module.__file__)).parents[1], ignore_errors=True)  # transformers caches the code


def _value(model: PreTrainedModel, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """An entry of the state dict, wherever Accelerate keeps it."""
    value: torch.Tensor = load_offloaded_parameter(model, key) if tensor.is_meta else tensor
    return value


def _same(mine: torch.Tensor, other: torch.Tensor) -> bool:
    wide = torch.promote_types(mine.dtype, other.dtype)  # some families keep some weights in float32 whatever is asked
    return mine.shape == other.shape and torch.equal(mine.to(other.device, wide), other.to(wide))


def first_output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor that a model returns, without dropout: logits or hidden states.

    Args:
        model (`PreTrainedModel`): The model. Its training mode is restored.
        inputs (`dict[str, torch.Tensor]`): What to call it with.

    Returns:
        `torch.Tensor`: On the device of the model, with the examples in its first dimension.
    """
    with evaluating(model):
        outputs = model(**inputs)
    values = outputs if isinstance(outputs, tuple) else outputs.values()
    first: torch.Tensor = next(value for value in values if isinstance(value, torch.Tensor))
    return first
