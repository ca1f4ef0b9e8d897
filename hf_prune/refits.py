"""What a refit writes into a projection of the dense model: new weights for its kept inputs, or a map before it."""

from dataclasses import dataclass
from typing import TypeAlias

import torch

from .least_squares import NormalEquations, ridge_solve
from .units import Projection, output_matrix


@dataclass(frozen=True)
class OutputRefit:
    """New rows of the output matrix of a projection that writes a block's output, and its new bias.

    Args:
        columns (`torch.Tensor`): Indices of the inputs that stay.
        weight (`torch.Tensor`): (kept inputs, outputs).
        bias (`torch.Tensor`, *optional*): (outputs,).
    """

    columns: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def write(self, module: Projection) -> None:
        """Put them into the projection of the uncut model.

        Args:
            module (`nn.Linear` or `Conv1D`): The projection. The rows of its matrix that don't stay keep their values.
        """
        matrix = output_matrix(module)
        matrix[self.columns.to(matrix.device)] = self.weight.to(matrix.dtype)
        if self.bias is not None:
            module.bias.copy_(self.bias)


@dataclass(frozen=True)
class InputRefit:
    """A map from what the student's projections read to what the teacher's read, x_t ≈ x_s·M + c.

    W becomes M·W and b becomes b + c·W. That is the least-squares solution for each output of the projection, with a
    ridge towards the old weights, so that it does not matter which outputs are kept.

    Args:
        matrix (`torch.Tensor`): M, (inputs, inputs).
        shift (`torch.Tensor`, *optional*): c, (inputs,). `None` for projections without a bias.
    """

    matrix: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def solve(cls, equations: NormalEquations, bias: bool, ridge: float) -> "InputRefit":
        """The map for projections with, or without, a bias.

        Args:
            equations ([`NormalEquations`]): Features x_s, targets x_t.
            bias (`bool`): Whether there may be a shift.
            ridge (`float`): How firmly the map holds on to the identity, see [`ridge_solve`].
        """
        eye = torch.eye(len(equations.gram), dtype=torch.float64, device=equations.gram.device)
        return cls(*ridge_solve(equations, eye, eye.new_zeros(len(eye)) if bias else None, ridge))

    def write(self, module: Projection) -> None:
        """Put it before a projection, in place.

        Args:
            module (`nn.Linear` or `Conv1D`): The projection, of the cut or of the uncut model.
        """
        matrix = output_matrix(module)
        old = matrix.double()
        matrix.copy_(self.matrix @ old)
        if self.shift is not None:
            module.bias.copy_(module.bias.double() + self.shift @ old)


Refit: TypeAlias = OutputRefit | InputRefit
