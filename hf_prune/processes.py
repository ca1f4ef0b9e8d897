"""The processes that were launched together, by `accelerate launch` or torchrun."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def process_state() -> PartialState:
    """The processes that were launched together. Without an accelerator, Accelerate has to be told of them."""
    return PartialState(cpu=not torch.accelerator.is_available())


T = TypeVar("T")


def from_main_process(compute: Callable[[], T]) -> T:
    """What a function returns in the main process, in all processes: each would measure something else."""
    outcome: list[Any] = [None]
    if process_state().is_main_process:
        try:
            outcome = [compute()]
        except Exception as error:  # raised below, in all of them: the others are waiting
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result
