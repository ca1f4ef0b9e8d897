"""Write a folder beside its target, and put it in the target's place when it is complete."""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import SaveError
from .card import CARD_FILE, is_ours
from .files import of_a_model


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place when the context ends well, and vanishes when it does not.

    Args:
        target (`Path`): The folder that is replaced, or made.

    Yields:
        `Path`: The folder to write to, empty, with the mode of the target.

    Raises:
        SaveError: There can't be a folder beside the target, or what the context did failed on disk. The target is as
            it was.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        staging.mkdir()
    except OSError as error:
        raise SaveError(f"Can't write beside {target}: {error.strerror or error}. Choose another folder.") from error
    try:
        if target.exists():
            staging.chmod(target.stat().st_mode & 0o777)
        yield staging
        _replace(staging, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"Could not save to {target}, which is as it was: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def link_others(source: Path, staging: Path, variant: str | None) -> None:
    """What else is in the folder (tokenizer, checkpoints, logs) stays, as hard links where the file system can.

    Args:
        source (`Path`): The folder that is replaced.
        staging (`Path`): The one that takes its place. Files that are there already are kept.
        variant (`str`, *optional*): Of the weights: those of others stay. The files of a model, and a card that
            hf_prune wrote, do not.
    """
    goes = of_a_model(variant)

    def ignored(folder: str, names: list[str]) -> set[str]:
        beside = staging / os.path.relpath(folder, source)
        skip = {name for name in names if (beside / name).is_file()}
        if beside == staging:
            skip |= {name for name in names if goes(name) or (name == CARD_FILE and is_ours(source / name))}
        return skip

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, staging, symlinks=True, copy_function=link, dirs_exist_ok=True, ignore=ignored)


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
