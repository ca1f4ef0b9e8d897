"""hf_prune: make Hugging Face transformers physically smaller and faster, and load them again with one line.

Importing hf_prune lets `from_pretrained` load checkpoints that it shrunk; everything else is imported on first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version as _version
from typing import TYPE_CHECKING, Any

from .layout import enable as _enable

if TYPE_CHECKING:
    from .architectures import (
        Architecture as Architecture,
        AttentionSpec as AttentionSpec,
        FeedForwardSpec as FeedForwardSpec,
        StackSpec as StackSpec,
        known_model_types as known_model_types,
        register_architecture as register_architecture,
    )
    from .calibration import Calibrator as Calibrator
    from .costs import Costs as Costs, CostTable as CostTable, model_costs as model_costs
    from .errors import (
        CalibrationError as CalibrationError,
        ConfigError as ConfigError,
        InfeasibleBudgetError as InfeasibleBudgetError,
        LayoutError as LayoutError,
        MaskError as MaskError,
        PruningError as PruningError,
        SaveError as SaveError,
        UnsupportedModelError as UnsupportedModelError,
    )
    from .export import export_model as export_model
    from .gates import apply_mask as apply_mask, current_mask as current_mask, remove_mask as remove_mask
    from .hub import (
        push_to_hub as push_to_hub,
        render_card as render_card,
        save_pretrained as save_pretrained,
        write_card as write_card,
    )
    from .latency import LatencyTable as LatencyTable, latency_table as latency_table
    from .masks import PruningMask as PruningMask
    from .methods import (
        AutoPruningConfig as AutoPruningConfig,
        FisherConfig as FisherConfig,
        FLAPConfig as FLAPConfig,
        KCMConfig as KCMConfig,
        KPruneConfig as KPruneConfig,
        LayerDropConfig as LayerDropConfig,
        MagnitudeConfig as MagnitudeConfig,
        MethodConfig as MethodConfig,
        Paper as Paper,
        Pruner as Pruner,
        PruningConfig as PruningConfig,
        RandomConfig as RandomConfig,
        RecoverableConfig as RecoverableConfig,
        RIAConfig as RIAConfig,
        SparseGPTConfig as SparseGPTConfig,
        WandaConfig as WandaConfig,
        WeightMagnitudeConfig as WeightMagnitudeConfig,
        WeightPruner as WeightPruner,
        WeightPruningConfig as WeightPruningConfig,
        known_pruners as known_pruners,
        register_pruner as register_pruner,
    )
    from .modeling import (
        AutoPrunableModel as AutoPrunableModel,
        AutoPrunableModelForCausalLM as AutoPrunableModelForCausalLM,
        AutoPrunableModelForImageClassification as AutoPrunableModelForImageClassification,
        AutoPrunableModelForMaskedLM as AutoPrunableModelForMaskedLM,
        AutoPrunableModelForMultipleChoice as AutoPrunableModelForMultipleChoice,
        AutoPrunableModelForQuestionAnswering as AutoPrunableModelForQuestionAnswering,
        AutoPrunableModelForSeq2SeqLM as AutoPrunableModelForSeq2SeqLM,
        AutoPrunableModelForSequenceClassification as AutoPrunableModelForSequenceClassification,
        AutoPrunableModelForSpeechSeq2Seq as AutoPrunableModelForSpeechSeq2Seq,
        AutoPrunableModelForTokenClassification as AutoPrunableModelForTokenClassification,
        PruningMixin as PruningMixin,
        prunable as prunable,
    )
    from .pruning import PruningResult as PruningResult, prune as prune
    from .reconstruction import reconstruct as reconstruct
    from .recovery import recover_with_lora as recover_with_lora
    from .report import PruningReport as PruningReport
    from .search import (
        LargeSpace as LargeSpace,
        LayerSpace as LayerSpace,
        MediumSpace as MediumSpace,
        SearchSpace as SearchSpace,
        SmallSpace as SmallSpace,
        order_units as order_units,
        search_space as search_space,
    )
    from .search.engine import search_subnetworks as search_subnetworks
    from .search.front import ParetoFront as ParetoFront, SubNetwork as SubNetwork
    from .search.standard import standard_nas as standard_nas
    from .slicing import subnetwork as subnetwork
    from .sparse_kernels import accelerate_sparse as accelerate_sparse
    from .surgery import shrink as shrink
    from .trainers import (
        GradualSparsityCallback as GradualSparsityCallback,
        KeepMaskCallback as KeepMaskCallback,
        PassCallback as PassCallback,
        PassTrainer as PassTrainer,
        PassTrainingArguments as PassTrainingArguments,
        PruningTrainer as PruningTrainer,
        PruningTrainingArguments as PruningTrainingArguments,
        Seq2SeqPassTrainer as Seq2SeqPassTrainer,
        Seq2SeqPassTrainingArguments as Seq2SeqPassTrainingArguments,
        Seq2SeqPruningTrainer as Seq2SeqPruningTrainer,
        Seq2SeqPruningTrainingArguments as Seq2SeqPruningTrainingArguments,
        Seq2SeqSuperNetTrainer as Seq2SeqSuperNetTrainer,
        Seq2SeqSuperNetTrainingArguments as Seq2SeqSuperNetTrainingArguments,
        SuperNetTrainer as SuperNetTrainer,
        SuperNetTrainingArguments as SuperNetTrainingArguments,
    )
    from .units import PrunableUnits as PrunableUnits, UnitGroup as UnitGroup, prunable_units as prunable_units
    from .verification import verify_architecture as verify_architecture
    from .weight_masks import WeightMask as WeightMask

_MODULES = {
    "architectures": (
        "Architecture",
        "AttentionSpec",
        "FeedForwardSpec",
        "StackSpec",
        "known_model_types",
        "register_architecture",
    ),
    "calibration": ("Calibrator",),
    "costs": ("CostTable", "Costs", "model_costs"),
    "errors": (
        "CalibrationError",
        "ConfigError",
        "InfeasibleBudgetError",
        "LayoutError",
        "MaskError",
        "PruningError",
        "SaveError",
        "UnsupportedModelError",
    ),
    "export": ("export_model",),
    "gates": ("apply_mask", "current_mask", "remove_mask"),
    "hub": ("push_to_hub", "render_card", "save_pretrained", "write_card"),
    "latency": ("LatencyTable", "latency_table"),
    "masks": ("PruningMask",),
    "methods": (
        "AutoPruningConfig",
        "FLAPConfig",
        "FisherConfig",
        "KCMConfig",
        "KPruneConfig",
        "LayerDropConfig",
        "MagnitudeConfig",
        "MethodConfig",
        "Paper",
        "Pruner",
        "PruningConfig",
        "RIAConfig",
        "RandomConfig",
        "RecoverableConfig",
        "SparseGPTConfig",
        "WandaConfig",
        "WeightMagnitudeConfig",
        "WeightPruner",
        "WeightPruningConfig",
        "known_pruners",
        "register_pruner",
    ),
    "modeling": (
        "AutoPrunableModel",
        "AutoPrunableModelForCausalLM",
        "AutoPrunableModelForImageClassification",
        "AutoPrunableModelForMaskedLM",
        "AutoPrunableModelForMultipleChoice",
        "AutoPrunableModelForQuestionAnswering",
        "AutoPrunableModelForSeq2SeqLM",
        "AutoPrunableModelForSequenceClassification",
        "AutoPrunableModelForSpeechSeq2Seq",
        "AutoPrunableModelForTokenClassification",
        "PruningMixin",
        "prunable",
    ),
    "pruning": ("PruningResult", "prune"),
    "reconstruction": ("reconstruct",),
    "recovery": ("recover_with_lora",),
    "report": ("PruningReport",),
    "search": ("LargeSpace", "LayerSpace", "MediumSpace", "SearchSpace", "SmallSpace", "order_units", "search_space"),
    "search.engine": ("search_subnetworks",),
    "search.front": ("ParetoFront", "SubNetwork"),
    "search.standard": ("standard_nas",),
    "slicing": ("subnetwork",),
    "sparse_kernels": ("accelerate_sparse",),
    "surgery": ("shrink",),
    "trainers": (
        "GradualSparsityCallback",
        "KeepMaskCallback",
        "PassCallback",
        "PassTrainer",
        "PassTrainingArguments",
        "PruningTrainer",
        "PruningTrainingArguments",
        "Seq2SeqPassTrainer",
        "Seq2SeqPassTrainingArguments",
        "Seq2SeqPruningTrainer",
        "Seq2SeqPruningTrainingArguments",
        "Seq2SeqSuperNetTrainer",
        "Seq2SeqSuperNetTrainingArguments",
        "SuperNetTrainer",
        "SuperNetTrainingArguments",
    ),
    "units": ("PrunableUnits", "UnitGroup", "prunable_units"),
    "verification": ("verify_architecture",),
    "weight_masks": ("WeightMask",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605

try:
    __version__ = _version("hf_prune")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


_enable()
