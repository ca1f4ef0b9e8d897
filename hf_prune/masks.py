"""[`PruningMask`]: which units stay. `True` = keep."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import MaskError, unknown
from .units import KINDS, Kind, PrunableUnits, UnitGroup

MASK_FILE = "pruning_mask.safetensors"
_VERSION = 1


class PruningMask(Mapping[str, torch.Tensor]):
    """For each unit group one bool vector of shape (units,) on the CPU: `True` = keep.

    A mask belongs to the shapes of one model, whatever its head: it remembers the family, and the kind and size of
    each group. `&` and `|` combine masks of the same shapes, `~` inverts, `==` compares.

    Args:
        keep (`dict[str, torch.Tensor]`): The vectors by group name. Groups that are missing are kept whole.
        units ([`PrunableUnits`]): The units of the model it is for.

    Raises:
        MaskError: A name is unknown, or a vector is not bool or has the wrong length.

    Examples:
        ```python
        >>> units = hf_prune.prunable_units(model)
        >>> mask = hf_prune.PruningMask({"encoder.layer.0.attention.output.dense": torch.tensor([True, False])}, units)
        >>> mask.kept("heads"), mask.density("heads")
        (3, 0.75)
        ```
    """

    def __init__(self, keep: Mapping[str, torch.Tensor], units: PrunableUnits) -> None:
        for name, vector in keep.items():
            if name not in units:
                raise MaskError(unknown("unit group", name, units))
            if (
                not isinstance(vector, torch.Tensor)
                or vector.dtype != torch.bool
                or vector.shape != (units[name].size,)
            ):
                got = (
                    f"{vector.dtype} of shape {tuple(vector.shape)}"
                    if isinstance(vector, torch.Tensor)
                    else type(vector).__name__
                )
                raise MaskError(f"The mask of {name} must be a bool tensor of shape ({units[name].size},), got {got}.")
        self.model_type = units.model_type
        self._kinds: dict[str, Kind] = {name: group.kind for name, group in units.items()}
        self._keep = {
            name: keep[name].detach().cpu().clone() if name in keep else torch.ones(group.size, dtype=torch.bool)
            for name, group in units.items()
        }

    # The mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._keep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    def __repr__(self) -> str:
        kinds = [kind for kind in KINDS if self.total(kind)]
        return (
            f"PruningMask({self.model_type}: " + ", ".join(f"{self.kept(k)}/{self.total(k)} {k}" for k in kinds) + ")"
        )

    # Algebra

    def __and__(self, other: "PruningMask") -> "PruningMask":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "PruningMask") -> "PruningMask":
        return self._combine(other, torch.logical_or)

    def __invert__(self) -> "PruningMask":
        return self._with({name: ~vector for name, vector in self.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruningMask):
            return NotImplemented
        return self._shape() == other._shape() and all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]  # the vectors are mutable

    def _combine(
        self, other: "PruningMask", op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> "PruningMask":
        if not isinstance(other, PruningMask):
            return NotImplemented
        if self._shape() != other._shape():
            raise MaskError(f"Masks of different models don't combine: {self!r} and {other!r}.")
        return self._with({name: op(self[name], other[name]) for name in self})

    def _with(self, keep: dict[str, torch.Tensor]) -> "PruningMask":
        mask = object.__new__(PruningMask)
        mask.model_type, mask._kinds, mask._keep = self.model_type, self._kinds, keep
        return mask

    def _shape(self) -> tuple[str, dict[str, tuple[str, int]]]:
        return self.model_type, {name: (self._kinds[name], len(vector)) for name, vector in self.items()}

    # Counting

    def kept(self, kind: Kind) -> int:
        """Number of kept units of a kind."""
        return sum(int(vector.sum()) for name, vector in self.items() if self._kinds[name] == kind)

    def total(self, kind: Kind) -> int:
        """Number of units of a kind."""
        return sum(len(vector) for name, vector in self.items() if self._kinds[name] == kind)

    def density(self, kind: Kind) -> float:
        """Kept share of the units of a kind. 1.0 where the model has none."""
        return self.kept(kind) / max(self.total(kind), 1) if self.total(kind) else 1.0

    def drops(self, group: UnitGroup) -> bool:
        """Whether a group of heads or neurons goes with its layer, whatever its own vector says.

        Args:
            group ([`UnitGroup`]): The group. `False` for a group of layers.
        """
        return group.kind != "layers" and not bool(self[group.stack][group.layer])

    def check(self, units: PrunableUnits) -> None:
        """Raise unless this mask is for a model with these units.

        Args:
            units ([`PrunableUnits`]): Units of the model. Family, names, kinds and sizes are compared.

        Raises:
            MaskError: It is for another model.
        """
        theirs = units.model_type, {name: (group.kind, group.size) for name, group in units.items()}
        if self._shape() == theirs:
            return
        if self.model_type != units.model_type:
            raise MaskError(f"This mask is for a {self.model_type} model, the model is a {units.model_type}.")
        mine = self._shape()[1]
        name = next(n for n in [*mine, *theirs[1]] if mine.get(n) != theirs[1].get(n))
        raise MaskError(
            f"This mask is for a {self.model_type} model of another shape: {name} has "
            f"{mine.get(name, ('', 'no'))[1]} units in the mask and {theirs[1].get(name, ('', 'no'))[1]} in the model."
        )

    # Files

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form: for each group its kind, its size, and the indices of the kept units.

        Returns:
            `dict`: `version`, `model_type`, and `groups`, by name.
        """
        groups = {
            name: {"kind": self._kinds[name], "size": len(vector), "keep": vector.nonzero().flatten().tolist()}
            for name, vector in self.items()
        }
        return {"version": _VERSION, "model_type": self.model_type, "groups": groups}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PruningMask":
        """Inverse of [`~PruningMask.to_dict`].

        Args:
            data (`dict`): What `to_dict` returned. Whether a model has these groups says [`~PruningMask.check`].

        Raises:
            MaskError: The data are malformed, or of another version.
        """
        try:
            if data["version"] != _VERSION:
                raise MaskError(
                    f"This mask has version {data['version']!r}, this hf_prune reads {_VERSION}: update hf_prune."
                )
            kinds, keep = {}, {}
            for name, group in data["groups"].items():
                if group["kind"] not in KINDS:
                    raise MaskError(unknown(f"kind of {name}", group["kind"], KINDS))
                size, kept = group["size"], group["keep"]
                if (
                    type(size) is not int
                    or not 0 <= size <= 10**7
                    or not all(type(i) is int and 0 <= i < size for i in kept)
                ):
                    raise MaskError(f"The mask of {name} names units outside 0..{size}.")
                vector = torch.zeros(size, dtype=torch.bool)
                vector[torch.tensor(kept, dtype=torch.long)] = True
                kinds[name], keep[name] = group["kind"], vector
            mask = object.__new__(cls)
            mask.model_type, mask._kinds, mask._keep = str(data["model_type"]), kinds, keep
            return mask
        except (KeyError, TypeError, AttributeError) as error:
            raise MaskError(f"Not a pruning mask: {type(error).__name__} {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a `.json` or `.safetensors` file. A folder gets `pruning_mask.safetensors`.

        Args:
            path (`str` or path): A file that is written over if need be, or a folder that exists.

        Raises:
            MaskError: The path has another ending, and is no folder.
        """
        path = _mask_path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict()), encoding="utf-8")
        else:
            shape = json.dumps({"version": _VERSION, "model_type": self.model_type, "kinds": self._kinds})
            save_file(
                {name: vector.contiguous() for name, vector in self.items()}, path, metadata={"hf_prune_mask": shape}
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningMask":
        """Read a file written by [`~PruningMask.save`].

        Args:
            path (`str` or path): The file, or the folder that holds `pruning_mask.safetensors`.

        Raises:
            MaskError: There is no such file, or it holds no mask.
        """
        path = _mask_path(path)
        try:
            if path.suffix == ".json":
                return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})["hf_prune_mask"])
                groups = {
                    name: {
                        "kind": kind,
                        "size": len(v := file.get_tensor(name)),
                        "keep": v.nonzero().flatten().tolist(),
                    }
                    for name, kind in head["kinds"].items()
                }
            return cls.from_dict({"version": head["version"], "model_type": head["model_type"], "groups": groups})
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            if isinstance(error, MaskError):
                raise
            raise MaskError(f"{path} holds no pruning mask: {error}.") from error


def _mask_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        return path / MASK_FILE
    if path.suffix not in (".json", ".safetensors"):
        raise MaskError(f"A mask file ends in .json or .safetensors, got {path.name!r}.")
    return path
