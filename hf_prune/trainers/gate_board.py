"""Gates in TensorBoard."""

import os
from typing import Any

import torch


class GateBoard:
    """A heat map of gates (modules x heads) and numbers about them.

    Args:
        args (`TrainingArguments`): Of the run. The board is in `$TENSORBOARD_LOGGING_DIR`, by default in
            `runs/head_gates` of its `output_dir`.
    """

    def __init__(self, args: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.getenv("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs", "head_gates")
        self.writer = SummaryWriter(log_dir=folder)

    def show(self, gates: torch.Tensor, sizes: list[int], numbers: dict[str, float], step: int) -> None:
        """Add a step.

        Args:
            gates (`torch.Tensor`): All gates, (n,), from 0 to 1.
            sizes (`list[int]`): Heads of each module.
            numbers (`dict[str, float]`): Go to scalars `head_gates/...`.
            step (`int`): Which.
        """
        rows = torch.nn.utils.rnn.pad_sequence(list(torch.split(gates, sizes)), batch_first=True)
        self.writer.add_image("head_gates", rows[None].float().kron(torch.ones(1, 16, 16)), step)
        for name, value in numbers.items():
            self.writer.add_scalar(f"head_gates/{name}", value, step)

    def close(self) -> None:
        self.writer.close()
