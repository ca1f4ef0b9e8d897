"""KCM, kernelized convex masking: Nova et al., "Gradient-Free Structured Pruning with Unlabeled Data", ICML 2023.

Prunes feed-forward neurons with unlabelled data and no gradients. The score of a neuron is how well its output vector
represents those of its layer (R2, from the weights) times how active it is (D2, from the data); the best of all layers
are kept.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..errors import CalibrationError, check_whole
from ..masks import PruningMask
from ..statistics import Moments
from ..units import PrunableUnits, output_matrix, site
from .base import Paper, Pruner, register_pruner
from .config import Recover, RecoverableConfig


@dataclass(kw_only=True)
class KCMConfig(RecoverableConfig):
    """Options of KCM. See [`PruningConfig`] for the others.

    Args:
        score (`"r2d2"`, `"r2"` or `"d2"`, *optional*, defaults to `"r2d2"`): The paper's merge of both scores, or one
            alone.
        r2 (`"density"` or `"iterated"`, *optional*, defaults to `"density"`): The closed form of one multiplicative
            update, which costs N²·d for N neurons of width d; or up to `max_iterations` updates of N³ each (Algorithm
            2).
        d2 (`"rms"`, `"mean_abs"` or `"mean"`, *optional*, defaults to `"rms"`): What is averaged over real
            tokens, before each layer is divided by its Euclidean norm. The paper gives neither sign nor normaliser:
            this is the project's reading.
        sigma (`float` or `"median"`, *optional*, defaults to 1.0): Width of the kernel exp(−‖w_i − w_j‖² / σ²);
            `"median"` takes the median distance of each layer, for weights so large that σ = 1 makes all neurons
            equally far apart.
        alpha (`float`, *optional*, defaults to 0.01): `"iterated"` stops when the relative L1 change falls to this.
        max_iterations (`int`, *optional*, defaults to 20): Cap on the updates.
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"lstsq"`): How
            what is kept is refitted to the dense model, see [`RecoverableConfig`]; `"scale"` is the paper's choice.

    Raises:
        ConfigError: An option is out of range.
    """

    score: Literal["r2d2", "r2", "d2"] = "r2d2"
    r2: Literal["density", "iterated"] = "density"
    d2: Literal["rms", "mean_abs", "mean"] = "rms"
    sigma: float | Literal["median"] = 1.0
    alpha: float = 0.01
    max_iterations: int = 20
    recover: Recover = "lstsq"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("score", ("r2d2", "r2", "d2"))
        self.check_choice("r2", ("density", "iterated"))
        self.check_choice("d2", ("rms", "mean_abs", "mean"))
        self.check_positive("alpha")
        if self.sigma != "median":
            self.check_positive("sigma")
        check_whole(1, max_iterations=self.max_iterations)


def gaussian_kernel(vectors: torch.Tensor, sigma: float | Literal["median"] = 1.0) -> torch.Tensor:
    """K_ij = exp(−‖w_i − w_j‖² / σ²) (Eq. 5).

    Args:
        vectors (`torch.Tensor`): w, (N, d): a row for each neuron.
        sigma (`float` or `"median"`, *optional*, defaults to 1.0): σ; `"median"` the median of all distances, those of
            neurons to themselves included.

    Returns:
        `torch.Tensor`: K, of shape (N, N) and the dtype of `vectors`.
    """
    # Distances do not depend on the origin, and are most exact around the mean.
    centred = vectors - vectors.mean(0)
    squares = torch.cdist(centred, centred).square()
    width = sigma**2 if sigma != "median" else squares.median().clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.exp(-squares / width)


def density_score(kernel: torch.Tensor) -> torch.Tensor:
    """diag(C) after one update of Algorithm 2 from C = 1/N, an inverse kernel density: 1 / sqrt(N·Σ_j K_ij) -> (N,)"""
    return (len(kernel) * kernel.sum(1)).rsqrt()


def representative_score(
    kernel: torch.Tensor, alpha: float = 0.01, max_iterations: int = 20
) -> tuple[torch.Tensor, int]:
    """R2, Algorithm 2: diag(C) of the convex mask C that minimises ‖φ(W) − φ(W)·C‖² by C ← C ∘ sqrt(K ⊘ K·C).

    The printed stopping rule compares signed sums and always stops after one update; this one compares ‖ΔC‖₁ with
    ‖C‖₁.

    Args:
        kernel (`torch.Tensor`): K, (N, N).
        alpha (`float`, *optional*, defaults to 0.01): Relative change at which to stop.
        max_iterations (`int`, *optional*, defaults to 20): Cap on the updates.

    Returns:
        Scores of shape (N,), and the number of updates.
    """
    tiny = torch.finfo(kernel.dtype).tiny  # far-apart neurons underflow to K = C = 0, and 0/0 is NaN
    mask = torch.full_like(kernel, 1 / len(kernel))
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        updated = mask * (kernel / (kernel @ mask).clamp_min(tiny)).sqrt()
        change = (updated - mask).abs().sum() / mask.sum()
        mask = updated
        if change <= alpha:
            break
    return mask.diagonal(), iterations


def merged_score(r2: torch.Tensor, activity: torch.Tensor) -> torch.Tensor:
    """S = R2 ∘ D2 / ‖D2‖₂ for one layer (Algorithm 1, lines 9-13).

    Args:
        r2 (`torch.Tensor`): R2, (N,).
        activity (`torch.Tensor`): D2, (N,).

    Returns:
        `torch.Tensor`: S, (N,).
    """
    norm = torch.linalg.vector_norm(activity).clamp_min(torch.finfo(activity.dtype).tiny)
    merged: torch.Tensor = r2 * activity / norm
    return merged


@register_pruner("kcm", KCMConfig)
class KCMPruner(Pruner[KCMConfig]):
    """Keeps the neurons with the best scores over all layers; heads stay whole."""

    kinds = ("neurons",)
    paper = Paper(
        "Gradient-Free Structured Pruning with Unlabeled Data",
        "ICML 2023",
        "2303.04185",
        "Azade Nova and Hanjun Dai and Dale Schuurmans",
    )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        assert calibrator is not None
        selector = self.selector(model, units, calibrator)
        moments = {g.name: Moments(g.size, site(model, g).weight.device) for g in selector.groups}
        calls = calibrator.collect(moments, "score neurons", record=self.walks(model, units))

        scores, energy = {}, {}
        for group in selector.groups:
            vectors = output_matrix(site(model, group)).detach().float()
            moment = moments[group.name]
            scores[group.name] = self._score(vectors, moment, group.name)
            energy[group.name] = vectors.norm(dim=1).double() * moment.rms
        mask = selector.select(scores)
        # ‖w‖·rms(h) needs no kernel: where it keeps nearly the same neurons, the kernel has added little.
        plain = selector.select(energy)
        self.facts["shared_with_norm_times_rms"] = round((mask & plain).kept("neurons") / mask.kept("neurons"), 4)

        self.recover(model, units, mask, calibrator, calls, moments)
        return mask

    def _score(self, vectors: torch.Tensor, moment: Moments, name: str) -> torch.Tensor:
        config = self.config
        r2 = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
        if config.score != "d2":
            kernel = gaussian_kernel(vectors, config.sigma)
            if config.r2 == "density":
                r2 = density_score(kernel).double()
            else:
                diagonal, iterations = representative_score(kernel, config.alpha, config.max_iterations)
                r2 = diagonal.double()
                self.facts.setdefault("r2_iterations", {})[name] = iterations
        if config.score == "r2":
            return r2
        activity: torch.Tensor = {"mean_abs": moment.mean_absolute, "mean": moment.mean, "rms": moment.rms}[config.d2]
        if not activity.any():
            raise CalibrationError(f"No neuron of {name} is ever active on the calibration data.")
        return merged_score(r2, activity)
