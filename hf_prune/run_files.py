"""Files in which a run keeps tensors until they are needed again. They go with the run, even with a killed one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .errors import ConfigError

logger = logging.get_logger(__name__)

_PREFIX = "hf_prune-run-"


@contextmanager
def run_folder(parent: str | None) -> Iterator[Path | None]:
    """A folder inside another one for the files of a run. It goes with the context, however that ends.

    Runs that were killed could not remove theirs: they are known by a lock that nobody holds any more, and removed.

    Args:
        parent (`str`, *optional*): Where it is made. Without it there is none.

    Raises:
        ConfigError: The parent can't be made.
    """
    if parent is None:
        yield None
        return
    try:
        os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"offload_folder {parent!r} can't be made: {error.strerror}.") from error
    for left in Path(parent).glob(f"{_PREFIX}*/"):
        if left.is_dir():
            _remove_abandoned(left)
    folder = Path(parent) / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        with WeakFileLock(_lock(folder)):  # before the folder: without a lock it would be taken for abandoned
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        _lock(folder).unlink(missing_ok=True)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_abandoned(folder: Path) -> None:
    try:
        with WeakFileLock(_lock(folder), timeout=0.1):
            shutil.rmtree(folder, ignore_errors=True)
    except TimeoutError:  # its run goes on
        return
    _lock(folder).unlink(missing_ok=True)
    logger.warning(f"Removed {folder}, which a run that was killed had left.")


@dataclass(frozen=True)
class Filed:
    """A tensor in a file."""

    path: Path


class Shelf:
    """Where tensors wait for their turn: in CPU memory, or in files.

    Args:
        folder (`Path`, *optional*): Where the files are.

    Attributes:
        nbytes (`int`): The bytes that were put there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.nbytes = folder, 0

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor | Filed:
        """Keep a tensor, in place of the one that had its name."""
        self.nbytes += tensor.nbytes
        if self.folder is None:
            return tensor.to("cpu")
        kept = Filed(self.folder / f"{name}.safetensors")
        save_file({"tensor": tensor.contiguous()}, kept.path)
        return kept


def fetched(kept: torch.Tensor | Filed) -> torch.Tensor:
    """What [`Shelf.put`] returned, as a tensor."""
    return load_file(kept.path)["tensor"] if isinstance(kept, Filed) else kept
