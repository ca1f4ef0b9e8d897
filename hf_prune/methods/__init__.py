"""One file per one-shot method: its config, its mathematics, its pruner. Importing this package registers them all."""

from .auto import AutoPruner, AutoPruningConfig
from .base import BasePruner, Paper, Pruner, get_pruner, known_pruners, register_pruner
from .config import MethodConfig, PruningConfig, RecoverableConfig
from .fisher import FisherConfig, FisherPruner
from .flap import FLAPConfig, FLAPPruner
from .kcm import KCMConfig, KCMPruner
from .kprune import KPruneConfig, KPrunePruner
from .layer_drop import LayerDropConfig, LayerDropPruner
from .magnitude import MagnitudeConfig, MagnitudePruner
from .random import RandomConfig, RandomPruner
from .ria import RIAConfig, RIAPruner
from .sparsegpt import SparseGPTConfig, SparseGPTPruner
from .wanda import WandaConfig, WandaPruner
from .weight_magnitude import WeightMagnitudeConfig, WeightMagnitudePruner
from .weights import WeightPruner, WeightPruningConfig

__all__ = [
    "AutoPruner",
    "AutoPruningConfig",
    "BasePruner",
    "FLAPConfig",
    "FLAPPruner",
    "FisherConfig",
    "FisherPruner",
    "KCMConfig",
    "KCMPruner",
    "KPruneConfig",
    "KPrunePruner",
    "LayerDropConfig",
    "LayerDropPruner",
    "MagnitudeConfig",
    "MagnitudePruner",
    "MethodConfig",
    "Paper",
    "Pruner",
    "PruningConfig",
    "RIAConfig",
    "RIAPruner",
    "RandomConfig",
    "RandomPruner",
    "RecoverableConfig",
    "SparseGPTConfig",
    "SparseGPTPruner",
    "WandaConfig",
    "WandaPruner",
    "WeightMagnitudeConfig",
    "WeightMagnitudePruner",
    "WeightPruner",
    "WeightPruningConfig",
    "get_pruner",
    "known_pruners",
    "register_pruner",
]
