"""Save a pruned model so that it provably loads again.

The checkpoint is written to a folder beside the target, reloaded as a user would, compared with the model in memory,
and only then put in the target's place: a crash at any moment leaves the old folder or the new one.
"""

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from ..benchmark import example_inputs
from ..errors import ConfigError, MaskError, PruningError, SaveError
from ..gates import current_mask, masked_columns
from ..layout import disable, enable
from ..masks import PruningMask
from ..report import PruningReport
from ..units import PrunableUnits, output_matrix, prunable_units, site
from .standalone import add_standalone_code

logger = logging.get_logger(__name__)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    mask: PruningMask | None = None,
    report: PruningReport | None = None,
    standalone: bool = False,
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
        mask ([`PruningMask`], *optional*): To save as `pruning_mask.safetensors`. Defaults to the mask that the model
            carries.
        report ([`PruningReport`], *optional*): To save as `pruning_report.json`.
        standalone (`bool`, *optional*, defaults to `False`): Add the code that rebuilds the shapes, so that
            `from_pretrained(..., trust_remote_code=True)` loads the model where hf_prune is not installed.
        options: Passed on to `PreTrainedModel.save_pretrained`: `max_shard_size`, `variant`. With an explicit
            `state_dict`, as `Trainer` passes for sharded models, the stock method runs alone: the weights are not
            those in memory.

    Raises:
        SaveError: The folder can't be written, or what was written did not reload to the same function. The old folder
            is intact.
        MaskError: The model is masked to skip whole layers: shrink it first.
    """
    if (
        options.get("state_dict") is not None
        or not options.get("is_main_process", True)
        or options.get("distributed_checkpoint")
    ):
        _stock_save(model, save_directory, **options)
        return
    if options.pop("push_to_hub", False):
        raise SaveError("save_pretrained writes to disk: call model.push_to_hub(repo_id) afterwards.")
    target = Path(save_directory).absolute()
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file: give a folder.")
    carried = current_mask(model)
    state = model.state_dict()
    if carried is not None:
        state = _folded(model, state, carried)
        logger.warning(
            "The model is masked but not shrunk: it is saved with all its parameters. shrink(model) cuts them."
        )
    with _staging(target) as staging:
        if standalone:  # remote code skips the renaming of weights that some families need at load
            options.setdefault("save_original_format", False)
        _stock_save(model, staging, state_dict=dict(state), **options)
        if processing_class is not None:
            processing_class.save_pretrained(staging)
        if (mask := mask if mask is not None else carried) is not None:
            mask.save(staging)
        if report is not None:
            report.save(staging)
        if standalone:
            add_standalone_code(model, staging)
        _verify(model, state, staging, standalone, options.get("variant"))
        for file in staging.iterdir():
            if file.is_file():
                if file.stat().st_nlink == 1:  # ours: safetensors writes files that only their owner can read
                    file.chmod(0o666 & ~_umask())
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())


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
        folded = output_matrix(module).detach().clone()
        folded[columns.to(folded.device)] = 0
        state[f"{names[id(module)]}.weight"] = folded if module.weight.shape == folded.shape else folded.T.contiguous()
    return state


# Reload and compare


def _verify(
    model: PreTrainedModel, state: dict[str, torch.Tensor], directory: Path, standalone: bool, variant: str | None
) -> None:
    name = type(model).__name__
    try:
        again = _reload(model, directory, standalone, variant)
    except (OSError, ValueError, RuntimeError, PruningError, SafetensorError) as error:
        raise SaveError(f"The saved {name} does not load again, nothing was replaced: {error}") from error
    loaded = again.state_dict()
    for key in state.keys() | loaded.keys():
        if key not in loaded or key not in state or not _same(state[key], loaded[key]):
            raise SaveError(
                f"The saved {name} reloads with another {key!r}, nothing was replaced. Please report this family."
            )
    again = again.to(model.device)
    try:
        inputs = example_inputs(model, batch_size=2, sequence_length=8)
    except ConfigError as error:
        logger.warning(f"The weights reload equal; the outputs were not compared: {error}")
        return
    ours, theirs = _outputs(model, inputs), _outputs(again, inputs)
    # The weights are equal to the bit; kernels may round differently where they lie differently in memory.
    tolerance = 1e-4 if ours.dtype == torch.float32 else 3e-2
    scale = ours.abs().max().clamp_min(1.0)
    if ours.shape != theirs.shape or not bool((ours - theirs).abs().max() <= tolerance * scale):
        raise SaveError(
            f"The saved {name} computes something else when it is reloaded, nothing was replaced: a "
            f"{model.config.model_type} keeps state that its config and weights do not hold. Please report this."
        )


def _reload(model: PreTrainedModel, directory: Path, standalone: bool, variant: str | None) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if variant is not None:
        options["variant"] = variant
    if not standalone:
        cls = next(
            c for c in type(model).__mro__ if "from_pretrained" in dir(c) and c.__module__.startswith("transformers.")
        )
        loaded: PreTrainedModel = cls.from_pretrained(directory, **options)  # type: ignore[attr-defined]
        return loaded
    config = AutoConfig.from_pretrained(directory)
    reference = next(ref for ref in config.auto_map.values() if ref.endswith(f".{type(model).__name__}"))
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    disable()  # it must load without hf_prune
    try:
        remote = get_class_from_dynamic_module(reference, directory)
        loaded = remote.from_pretrained(directory, **options)
        return loaded
    finally:
        enable()


def _same(mine: torch.Tensor, other: torch.Tensor) -> bool:
    return mine.shape == other.shape and mine.dtype == other.dtype and torch.equal(mine.to(other.device), other)


def _outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    finally:
        model.train(training)
    first: torch.Tensor = next(value for value in outputs.values() if isinstance(value, torch.Tensor))
    return first


# Put in place


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place when the context ends well, and vanishes when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SaveError(f"Can't write beside {target}: {error.strerror or error}. Choose another folder.") from error
    try:
        os.chmod(staging, target.stat().st_mode & 0o777 if target.exists() else 0o777 & ~_umask())
        if target.exists():
            _link_others(target, staging)
        yield staging
        _replace(staging, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"Could not save to {target}, which is as it was: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_OF_A_MODEL = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "config.json",
    "generation_config.json",
    "pruning_report.json",
)


def _link_others(source: Path, staging: Path) -> None:
    """What else is in the folder (tokenizer, checkpoints, logs) stays, as hard links where the file system can."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    of_a_model = shutil.ignore_patterns(*_OF_A_MODEL)
    top = str(source)
    shutil.copytree(
        source,
        staging,
        symlinks=True,
        copy_function=link,
        dirs_exist_ok=True,
        ignore=lambda folder, names: of_a_model(folder, names) if folder == top else set(),
    )


def _replace(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        # Without an atomic exchange the old folder waits beside the new one until that is in place.
        waiting = target.with_name(f"{staging.name}.old")
        os.rename(target, waiting)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(waiting, target)
            raise
        shutil.rmtree(waiting, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically. `False` where the system can't."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        code: int = ctypes.CDLL(None).renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
    except (OSError, AttributeError):
        return False
    return code == 0
