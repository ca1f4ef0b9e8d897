"""`model.prune(...)`: the functions of hf_prune as methods of a model."""

import os
from typing import Any, ClassVar, TypeVar, cast

import transformers
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .hub import push_to_hub, save_pretrained
from .masks import PruningMask
from .methods import MethodConfig
from .pruning import PruningResult, prune
from .surgery import shrink
from .units import refuse_unprunable

M = TypeVar("M", bound=PreTrainedModel)


class PruningMixin:
    """Methods that [`prunable`] adds to a model.

    Attributes:
        pruning_result ([`PruningResult`], *optional*): Of the last [`~PruningMixin.prune`]. A save or a push takes its
            mask and its report, unless it is given others.
    """

    pruning_result: PruningResult | None = None

    def prune(self, config: MethodConfig, data: Any = None, **options: Any) -> PruningResult:
        """Same as [`prune`] on this model.

        Args:
            config ([`MethodConfig`]): The method, by the class of its config, and its options.
            data (*optional*): Calibration data.
            options: See [`prune`]: `processing_class`, `text_column`, `max_samples`, `batch_size`, `max_length`.

        Returns:
            [`PruningResult`]: The mask and the report, also kept in `pruning_result`.

        Raises:
            As [`prune`].
        """
        self.pruning_result = prune(cast(PreTrainedModel, self), config, data, **options)
        return self.pruning_result

    def shrink(self: M, mask: PruningMask | None = None) -> M:
        """Same as [`shrink`] on this model.

        Args:
            mask ([`PruningMask`], *optional*): Defaults to the one that the model carries.

        Returns:
            `PreTrainedModel`: The same object.

        Raises:
            As [`shrink`].
        """
        return cast(M, shrink(self, mask))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Same as [`~hf_prune.save_pretrained`] on this model, with the mask and the report of its last pruning.

        Args:
            save_directory (`str` or path): The folder.
            options: See [`~hf_prune.save_pretrained`]: `processing_class`, `standalone`, `compressed`, and whatever
                the stock method takes.

        Raises:
            As [`~hf_prune.save_pretrained`].
        """
        save_pretrained(cast(PreTrainedModel, self), save_directory, **self._with_result(options))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Same as [`~hf_prune.push_to_hub`] on this model, with the mask and the report of its last pruning.

        Args:
            repo_id (`str`): `"user/name"`; `"name"` is a repository of your own.
            options: See [`~hf_prune.push_to_hub`]: `processing_class`, `private`, `revision`, `token`, ...

        Returns:
            `CommitInfo`: As huggingface_hub returns it: `commit_url`, `oid`, `pr_url`.

        Raises:
            As [`~hf_prune.push_to_hub`].
        """
        return push_to_hub(cast(PreTrainedModel, self), repo_id, **self._with_result(options))

    def _with_result(self, options: dict[str, Any]) -> dict[str, Any]:
        done = self.pruning_result
        return options if done is None else {"report": done.report, "mask": done.mask, **options}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy remake it from the class of transformers.
        return _restore, (_stock_class(type(self)),), cast(Any, self).__dict__


_CLASSES: dict[type, type] = {}


def _stock_class(cls: type) -> type:
    return cls.__mro__[2] if issubclass(cls, PruningMixin) else cls


def _prunable_class(cls: type) -> type:
    if cls not in _CLASSES:
        # The name stays: pipelines, losses and `architectures` in the config look at it.
        _CLASSES[cls] = type(cls.__name__, (PruningMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return _CLASSES[cls]


def _restore(cls: type) -> PreTrainedModel:
    new: Any = _prunable_class(cls)
    return cast(PreTrainedModel, new.__new__(new))


def prunable(model: M) -> M:
    """Give a model the methods of [`PruningMixin`]: `prune`, `shrink`, and a verified, atomic `save_pretrained`.

    Args:
        model (`PreTrainedModel`): Any model of a registered family. Its class is replaced by one of the same name that
            derives from it; nothing else changes, and no class of transformers is touched.

    Returns:
        `PreTrainedModel`: The same object.

    Raises:
        UnsupportedModelError: The model can't be pruned, or has a method of one of these names already.
    """
    if isinstance(model, PruningMixin):
        return model
    refuse_unprunable(model)
    for name in ("prune", "shrink", "pruning_result"):
        if hasattr(model, name):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an attribute {name!r} of its own: use the functions of hf_prune."
            )
    model.__class__ = _prunable_class(type(model))
    return model


class _AutoPrunable:
    """`from_pretrained` and `from_config` of a transformers auto class, followed by [`prunable`]."""

    auto_class: ClassVar[str]

    def __init__(self) -> None:
        raise OSError(
            f"{type(self).__name__} is made with from_pretrained(...) or from_config(...), as {self.auto_class} is."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as the auto class of transformers does, ready to be pruned. Pickled weights are refused.

        Args:
            args, kwargs: As the auto class takes them. `use_safetensors` is `True` unless it is given.

        Returns:
            `PreTrainedModel`: With the methods of [`PruningMixin`].

        Raises:
            UnsupportedModelError: The model can't be pruned.
        """
        kwargs.setdefault("use_safetensors", True)
        return prunable(getattr(transformers, cls.auto_class).from_pretrained(*args, **kwargs))

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Build a model with random weights as the auto class of transformers does, ready to be pruned.

        Args:
            args, kwargs: As the auto class takes them.

        Returns:
            `PreTrainedModel`: With the methods of [`PruningMixin`].

        Raises:
            UnsupportedModelError: The model can't be pruned.
        """
        return prunable(getattr(transformers, cls.auto_class).from_config(*args, **kwargs))


def _auto(auto_class: str) -> type[_AutoPrunable]:
    """The prunable twin of an auto class: `AutoModelForX` -> `AutoPrunableModelForX`."""
    name = auto_class.replace("AutoModel", "AutoPrunableModel")
    return type(name, (_AutoPrunable,), {"auto_class": auto_class, "__doc__": f"`{auto_class}`, prunable."})


AutoPrunableModel = _auto("AutoModel")
AutoPrunableModelForCausalLM = _auto("AutoModelForCausalLM")
AutoPrunableModelForImageClassification = _auto("AutoModelForImageClassification")
AutoPrunableModelForMaskedLM = _auto("AutoModelForMaskedLM")
AutoPrunableModelForMultipleChoice = _auto("AutoModelForMultipleChoice")
AutoPrunableModelForQuestionAnswering = _auto("AutoModelForQuestionAnswering")
AutoPrunableModelForSeq2SeqLM = _auto("AutoModelForSeq2SeqLM")
AutoPrunableModelForSequenceClassification = _auto("AutoModelForSequenceClassification")
AutoPrunableModelForSpeechSeq2Seq = _auto("AutoModelForSpeechSeq2Seq")
AutoPrunableModelForTokenClassification = _auto("AutoModelForTokenClassification")
