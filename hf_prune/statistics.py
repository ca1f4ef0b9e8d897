"""What adds up over tokens, batches and processes."""

from typing import Protocol

import torch


class Sums(Protocol):
    """Something that adds up over tokens, and so over processes."""

    def sums(self) -> list[torch.Tensor]:
        """The tensors in which it is kept, reduced over processes in place."""


class Statistic(Sums, Protocol):
    """What a method wants to know about the inputs of one site."""

    def update(self, inputs: torch.Tensor) -> None:
        """Take the inputs of some real tokens, of shape (tokens, columns)."""


class Comparison(Sums, Protocol):
    """What a method wants to know about the hidden states around one layer."""

    def update(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take the hidden states of some real tokens.

        Args:
            before, after (`torch.Tensor`): What goes into the layer and what comes out, both (tokens, hidden).
        """


class Moments:
    """Sums of x, |x| and x² over tokens, per column, in float64.

    Args:
        columns (`int`): Columns of the inputs.
        device (`torch.device`): Where the sums are kept.

    Attributes:
        total, absolute, square (`torch.Tensor`): float64 of shape (columns,).
        count (`torch.Tensor`): Number of tokens, of shape ().
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total, self.absolute, self.square = torch.zeros(3, columns, dtype=torch.float64, device=device).unbind()
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, inputs: torch.Tensor) -> None:
        """Take the inputs of some real tokens, of shape (tokens, columns). They are squared in float32."""
        x = inputs.float()
        self.total += x.sum(0, dtype=torch.float64)
        self.absolute += x.abs().sum(0, dtype=torch.float64)
        self.square += x.square().sum(0, dtype=torch.float64)
        self.count += len(x)

    def sums(self) -> list[torch.Tensor]:
        """The four sums, to reduce over processes."""
        return [self.total, self.absolute, self.square, self.count]

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean of |x| per column, float64 of shape (columns,)."""
        return self.absolute / self.count

    @property
    def mean(self) -> torch.Tensor:
        """Mean of x per column, float64 of shape (columns,)."""
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        """Sample variance of x per column (the divisor is n − 1), float64 of shape (columns,). Exactly 0 for
        constants.
        """
        deviation = self.square - self.total.square() / self.count
        # The squares of a constant are as far from its mean as float32 rounds them.
        return torch.where(deviation > 1e-7 * self.square, deviation, 0) / (self.count - 1).clamp_min(1)

    @property
    def rms(self) -> torch.Tensor:
        """Root of the mean of x² per column, float64 of shape (columns,)."""
        return (self.square / self.count).sqrt()
