"""PruningPlan: the one small document that surgery, checkpoints, cards and reports read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from scap_hub.errors import PlanError

if TYPE_CHECKING:
    from scap_hub.channels.groups import ChannelGroup

VERSION: Literal[1] = 1
_LIBRARIES = ("torch", "timm", "transformers")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupCut(_Strict):
    """What stays of one channel group.

    Attributes:
        size: Channels before.
        keep: Number of the entry of `PruningPlan.keeps` that lists the channels that stay.
    """

    size: PositiveInt
    keep: NonNegativeInt


class TensorCut(_Strict):
    """What stays of one parameter or buffer.

    Attributes:
        shape: Shape before.
        keep: Entry of `PruningPlan.keeps` for each dimension that shrinks alike everywhere.
        blocks: For the weight of a grouped convolution, where each block of rows keeps its own columns: the entry
            of each block, for dimension 1.
    """

    shape: tuple[NonNegativeInt, ...]
    keep: dict[NonNegativeInt, NonNegativeInt] = Field(default_factory=dict)
    blocks: tuple[NonNegativeInt, ...] | None = None


class PruningPlan(_Strict):
    """Says by name what leaves a model: kept indices, new attribute values, never code.

    Attributes:
        version: Version of this document's layout.
        libraries: Versions of the libraries that it was made with.
        keeps: Lists of kept indices as ascending ranges, "0-3,5,8-9"; the other fields refer to them by number.
        groups: The channel groups that shrink.
        tensors: The parameters and buffers that shrink.
        attributes: New values of integers (or lists of them) that modules hold, by module path and name.
    """

    version: Literal[1] = VERSION
    libraries: dict[str, str] = Field(default_factory=lambda: {name: version(name) for name in _LIBRARIES})
    keeps: tuple[str, ...]
    groups: dict[str, GroupCut]
    tensors: dict[str, TensorCut]
    attributes: dict[str, dict[str, PositiveInt | list[PositiveInt]]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> PruningPlan:
        for name, group in self.groups.items():
            self._check(f"group {name!r}", group.keep, group.size)
        for name, cut in self.tensors.items():
            for dim, entry in cut.keep.items():
                if dim >= len(cut.shape):
                    raise ValueError(f"tensor {name!r} has no dimension {dim}")
                self._check(f"tensor {name!r}", entry, cut.shape[dim])
            if cut.blocks is not None:
                if len(cut.shape) < 2 or not cut.blocks or cut.shape[0] % len(cut.blocks) or 1 in cut.keep:
                    raise ValueError(f"tensor {name!r} cannot have {len(cut.blocks)} blocks")
                if len({self._check(f"tensor {name!r}", entry, cut.shape[1]) for entry in cut.blocks}) > 1:
                    raise ValueError(f"tensor {name!r} keeps unequal blocks")
        return self

    def _check(self, what: str, entry: int, size: int) -> int:
        """Number of kept indices of an entry, which must lie within `size`."""
        if entry >= len(self.keeps):
            raise ValueError(f"{what} refers to keeps[{entry}], which is missing")
        return _length(what, self.keeps[entry], size)

    def kept(self, group: str) -> list[int]:
        """Kept channels of a group, ascending."""
        return self.indices(self.groups[group].keep)

    def indices(self, entry: int) -> list[int]:
        """The indices that an entry of `keeps` lists."""
        return [index for first, last in _ranges(self.keeps[entry]) for index in range(first, last + 1)]

    @classmethod
    def from_keep(cls, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> PruningPlan:
        """The plan that keeps `keep[group.name]` of each named group and all of the others.

        Args:
            groups: Result of `scap_hub.channel_groups`.
            keep: Channel numbers, 0 <= number < group.size, in any order.

        Raises:
            PlanError: A name is unknown or pinned, a keep is empty or out of range, or channels that must stay
                balanced are not.
        """
        known = {group.name: group for group in groups}
        for name in keep:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise PlanError(f"no channel group {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if not known[name].prunable and len(keep[name]) < known[name].size:
                raise PlanError(f"group {name!r} cannot be pruned: it {known[name].pinned_because}")
        if not groups:
            return cls(keeps=(), groups={}, tensors={})
        channels = {name: group.channels for name, group in known.items()}
        return cls(**groups[0].space.document(channels, keep))

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Reads and validates a plan.

        Raises:
            PlanError: Not a plan, an unknown version, or inconsistent.
        """
        try:
            document: Any = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON ({error}); save it again with PruningPlan.to_json()") from None
        found = document.get("version") if isinstance(document, dict) else None
        if found != VERSION:
            raise PlanError(f"the plan has version {found!r}, this scap_hub reads version {VERSION}: upgrade scap_hub")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the plan"
            raise PlanError(f"the plan is invalid at {where}: {first['msg']}") from None


def ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text, "0-3,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _ranges(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("-") for part in text.split(",")]
    return [(int(pair[0]), int(pair[-1])) for pair in pairs]


def _length(what: str, text: str, size: int) -> int:
    """Validates before anything is allocated: an entry may claim any number."""
    try:
        pairs = _ranges(text)
    except ValueError:
        raise ValueError(f"{what}: {text[:40]!r} is not a list of ranges") from None
    before = -1
    for first, last in pairs:
        if not before < first <= last < size:
            raise ValueError(f"{what}: {first}-{last} is not ascending within 0-{size - 1}")
        before = last
    return sum(last - first + 1 for first, last in pairs)
