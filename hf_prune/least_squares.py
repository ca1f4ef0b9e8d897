"""Least squares from sums over the data: new weights, or one factor for each unit."""

import torch


class NormalEquations:
    """Streaming sums for a least-squares problem features @ weight + bias ~ targets, in float64.

    Args:
        inputs, outputs (`int`): Number of features and of targets.
        device (`torch.device`): Where the sums are kept.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the products of one batch.

    Attributes:
        gram, cross (`torch.Tensor`): FᵀF, (inputs, inputs), and FᵀY, (inputs, outputs).
        feature_sum, target_sum (`torch.Tensor`): (inputs,) and (outputs,).
        count (`torch.Tensor`): Number of tokens, ().
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross = zeros(inputs, inputs), zeros(inputs, outputs)
        self.feature_sum, self.target_sum, self.count = zeros(inputs), zeros(outputs), zeros()

    def update(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Take some tokens.

        Args:
            features (`torch.Tensor`): What goes into the projection, (tokens, inputs).
            targets (`torch.Tensor`): What shall come out, (tokens, outputs).
        """
        features, targets = features.to(self.dtype), targets.to(self.dtype)
        self.gram += features.T @ features
        self.cross += features.T @ targets
        self.feature_sum += features.sum(0)
        self.target_sum += targets.sum(0)
        self.count += len(features)

    def sums(self) -> list[torch.Tensor]:
        """The tensors to reduce over processes."""
        return [self.gram, self.cross, self.feature_sum, self.target_sum, self.count]


def ridge_solve(
    equations: NormalEquations, weight: torch.Tensor, bias: torch.Tensor | None, ridge: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Least squares with a ridge towards the old weight; the bias, where there is one, is refitted without a ridge.

    Args:
        equations ([`NormalEquations`]): The sums.
        weight (`torch.Tensor`): The old weight, (inputs, outputs).
        bias (`torch.Tensor`, *optional*): The old bias, (outputs,).
        ridge (`float`, *optional*, defaults to 1.0): Strength, in tokens for each input: the old weight counts as much
            as that many tokens whose inputs are independent, and as large as those of the data (around their mean
            where there is a bias). Ten times as much, as often as need be, where the sum with the Gram matrix is not
            positive definite.

    Returns:
        The new weight, (inputs, outputs), and the new bias, (outputs,), or `None` without an old one, in float64.
        Nothing changes where the old ones fit already.
    """
    old = weight.double()
    gram, cross, mean = equations.gram, equations.cross, equations.feature_sum / equations.count
    target = equations.target_sum / equations.count
    if bias is not None:
        gram = gram - equations.count * mean.outer(mean)
        cross = cross - equations.count * mean.outer(target)
    spread, size = gram.diagonal().mean(), equations.gram.diagonal().mean()
    if not spread > 1e-6 * size:  # constant features: the old weight is as good as any
        new = old
    else:
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        strength = ridge * gram.trace() / equations.count
        factor, failed = torch.linalg.cholesky_ex(gram + strength * eye)
        while failed:  # the products of float32 features round a semi-definite matrix below zero
            strength = strength * 10
            factor, failed = torch.linalg.cholesky_ex(gram + strength * eye)
        # The correction, not the weight, is solved for: it is zero where the old weight fits.
        new = old + torch.cholesky_solve(cross - gram @ old, factor)
    return new, None if bias is None else target - mean @ new


def scale_solve(equations: NormalEquations, weight: torch.Tensor, width: int, limit: float = 10.0) -> torch.Tensor:
    """One factor per unit instead of a new weight: the mask tuning of Kwon et al. 2022, in closed form.

    With A_u the output of unit u and G = AᵀA, x = 1 + (G² + I)⁻¹ G (AᵀB − G·1): LSMR on the normal equations with
    damping 1.

    Args:
        equations ([`NormalEquations`]): The sums; targets without the bias.
        weight (`torch.Tensor`): The old weight, (inputs, outputs).
        width (`int`): Inputs per unit.
        limit (`float`, *optional*, defaults to 10.0): Largest factor in absolute value.

    Returns:
        The scaled weight, float64 of shape (inputs, outputs).
    """
    old = weight.double()
    units = len(old) // width

    def per_unit(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(units, width, *x.shape[1:]).sum(1)

    gram = per_unit(per_unit((old @ old.T) * equations.gram).T)
    right = per_unit((equations.cross * old).sum(1))
    eye = torch.eye(units, dtype=old.dtype, device=old.device)
    factor = 1 + torch.linalg.solve(gram @ gram + eye, gram @ (right - gram.sum(1)))
    scaled: torch.Tensor = old * factor.clamp(-limit, limit).repeat_interleave(width)[:, None]
    return scaled
