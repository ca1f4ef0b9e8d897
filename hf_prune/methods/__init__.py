"""One file per one-shot method: its config, its mathematics, its pruner. Importing this package registers them all."""

from .auto import AutoPruner, AutoPruningConfig
from .base import Paper, Pruner, PruningConfig, RecoverableConfig, get_pruner, known_pruners, register_pruner
from .fisher import FisherConfig, FisherPruner
from .flap import FLAPConfig, FLAPPruner
from .kcm import KCMConfig, KCMPruner
from .kprune import KPruneConfig, KPrunePruner
from .layer_drop import LayerDropConfig, LayerDropPruner
from .magnitude import MagnitudeConfig, MagnitudePruner
from .random import RandomConfig, RandomPruner

__all__ = [
    "AutoPruner",
    "AutoPruningConfig",
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
    "Paper",
    "Pruner",
    "PruningConfig",
    "RandomConfig",
    "RandomPruner",
    "RecoverableConfig",
    "get_pruner",
    "known_pruners",
    "register_pruner",
]
