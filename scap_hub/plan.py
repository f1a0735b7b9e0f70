"""PruningPlan: the one small document that surgery, checkpoints, cards and reports read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from scap_hub.documents import parse_json
from scap_hub.errors import PlanError
from scap_hub.tables import html_table

VERSION: Literal[2] = 2
_LIBRARIES = ("torch", "timm", "transformers")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupCut(_Strict):
    """What stays of one channel group.

    Attributes:
        size: Channels before.
        keep: Number of the entry of `PruningPlan.keeps` that lists the channels that stay.
    """

    size: Annotated[PositiveInt, Field(le=2**20)]
    keep: NonNegativeInt


class TensorCut(_Strict):
    """What stays of one parameter or buffer.

    Attributes:
        shape: Shape before.
        keep: Entry of `PruningPlan.keeps` for each dimension that shrinks alike everywhere.
        refers: For a buffer of channel numbers, such as a fixed permutation: entry of the channels that stay of those
            that it refers to; its numbers become their positions among these.
        blocks: For the weight of a grouped convolution, where each block of rows keeps its own columns: the entry
            of each block, for dimension 1.
    """

    shape: tuple[NonNegativeInt, ...]
    keep: dict[NonNegativeInt, NonNegativeInt] = Field(default_factory=dict)
    blocks: tuple[NonNegativeInt, ...] | None = None
    refers: NonNegativeInt | None = None


class CallNumber(_Strict):
    """A number that a module's forward pass gives to a torch function, and the one that it gives once it is pruned.

    It is for sizes that are written into the code, such as 400 in `x.view(-1, 400)`. Numbers of arithmetic do not
    change, but for the scale of an attention: it comes from a width, and must stay the dense one's, both where the code
    computes it and where it leaves it to torch.

    Attributes:
        function: Name of the function, such as "view" or "__getitem__".
        call: The how manyth call of that function in the module's forward pass, from 1; calls by the modules inside
            count too.
        position: Position of the number among the numbers in the call's arguments.
        old: The number that comes from the code; another one means that the model is used in a way that the plan was
            not made for, and is an error. None for the scale of an attention whose code leaves it out.
        new: The number to use.
    """

    function: Annotated[str, StringConstraints(pattern=r"^[a-z_0-9]{1,40}$")]
    call: PositiveInt
    position: NonNegativeInt
    old: StrictInt | FiniteFloat | None = None
    new: StrictInt | FiniteFloat


class Cuttable(Protocol):
    """The channel groups of one model, as a plan needs them."""

    def cut(self, keep: Mapping[str, Sequence[int]]) -> PruningPlan:
        """The plan that keeps these channels of the named groups, and all of the others."""


class PruningPlan(_Strict):
    """Says by name what leaves a model: kept indices, new attribute values, never code.

    Attributes:
        version: Version of this document's layout.
        libraries: Versions of the libraries that it was made with.
        keeps: Lists of kept indices as ascending ranges, "0-3,5,8-9"; the other fields refer to them by number.
        groups: The channel groups that shrink.
        tensors: The parameters and buffers that shrink.
        attributes: New values of integers (or lists of them) that modules hold, by module path and name.
        calls: New numbers in the forward passes of modules, by module path.
    """

    version: Literal[2] = VERSION
    libraries: dict[str, str] = Field(default_factory=lambda: {name: version(name) for name in _LIBRARIES})
    keeps: tuple[str, ...]
    groups: dict[str, GroupCut]
    tensors: dict[str, TensorCut]
    attributes: dict[str, dict[str, PositiveInt | list[StrictInt]]] = Field(default_factory=dict)
    calls: dict[str, tuple[CallNumber, ...]] = Field(default_factory=dict)

    def __repr__(self) -> str:
        before, after = sum(cut.size for cut in self.groups.values()), sum(len(self.kept(name)) for name in self.groups)
        return (
            f"<PruningPlan: {len(self.groups)} groups keep {after:,} of {before:,} channels, "
            f"{len(self.tensors)} tensors shrink>"
        )

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [(name, cut.size, len(self.kept(name))) for name, cut in self.groups.items()]
        return html_table(repr(self).strip("<>"), ("group", "before", "after"), rows)

    @model_validator(mode="after")
    def _consistent(self) -> PruningPlan:
        # Each list is read once, however many tensors refer to it.
        spans = [_span(f"keeps[{entry}]", text) for entry, text in enumerate(self.keeps)]
        for name, group in self.groups.items():
            self._check(f"group {name!r}", group.keep, group.size, spans)
        for name, cut in self.tensors.items():
            for dim, entry in cut.keep.items():
                if dim >= len(cut.shape):
                    raise ValueError(f"tensor {name!r} has no dimension {dim}")
                self._check(f"tensor {name!r}", entry, cut.shape[dim], spans)
            if cut.refers is not None and (cut.refers >= len(self.keeps) or cut.blocks is not None):
                raise ValueError(f"tensor {name!r} refers to keeps[{cut.refers}], which is missing")
            if cut.blocks is not None:
                if len(cut.shape) < 2 or not cut.blocks or cut.shape[0] % len(cut.blocks) or 1 in cut.keep:
                    raise ValueError(f"tensor {name!r} cannot have {len(cut.blocks)} blocks")
                if len({self._check(f"tensor {name!r}", entry, cut.shape[1], spans) for entry in cut.blocks}) > 1:
                    raise ValueError(f"tensor {name!r} keeps unequal blocks")
        return self

    def _check(self, what: str, entry: int, size: int, spans: Sequence[tuple[int, int]]) -> int:
        """Number of kept indices of an entry, which must lie within `size`."""
        if entry >= len(self.keeps):
            raise ValueError(f"{what} refers to keeps[{entry}], which is missing")
        last, count = spans[entry]
        if last >= size:
            raise ValueError(f"{what}: keeps[{entry}] goes to {last}, which is not ascending within 0-{size - 1}")
        return count

    def kept(self, group: str) -> list[int]:
        """Kept channels of a group, ascending."""
        return self.indices(self.groups[group].keep)

    def left(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor is left with."""
        cut = self.tensors[name]
        sizes = {dim: len(self.indices(entry)) for dim, entry in cut.keep.items()}
        if cut.blocks is not None:
            sizes[1] = len(self.indices(cut.blocks[0]))
        return tuple(sizes.get(dim, size) for dim, size in enumerate(cut.shape))

    def indices(self, entry: int) -> list[int]:
        """The indices that an entry of `keeps` lists."""
        return [index for first, last in _ranges(self.keeps[entry]) for index in range(first, last + 1)]

    @classmethod
    def from_keep(cls, groups: Cuttable | Sequence[Any], keep: Mapping[str, Sequence[int]]) -> PruningPlan:
        """The plan that keeps `keep[group.name]` of each named group and all of the others.

        It depends on the groups and the keep alone.

        Args:
            groups: Result of `scap_hub.channel_groups`, or some of its groups.
            keep: Channel numbers, 0 <= number < group.size, in any order.

        Raises:
            PlanError: A name is unknown or pinned, a keep is empty, out of range or no integers, channels that must
                stay balanced are not, or the pruned model would not compute the same.
        """
        if not len(groups):  # type: ignore[arg-type]
            if keep:
                raise PlanError(f"no channel groups were given, so {next(iter(keep))!r} cannot be kept")
            return cls(keeps=(), groups={}, tensors={})
        whole: Cuttable = groups if hasattr(groups, "cut") else groups[0].whole
        return whole.cut(keep)

    def then(self, later: PruningPlan) -> PruningPlan:
        """One plan for the dense model that does this one, and then another that was made for the smaller model.

        Raises:
            PlanError: The other one was made for another model.
        """
        cutting = Cutting()
        return PruningPlan(
            libraries=later.libraries,
            groups={
                name: GroupCut(size=size, keep=cutting.entry(stays))
                for name, (size, stays) in _joined_groups(self, later).items()
            },
            tensors={
                name: _joined_tensor(name, self, later, cutting)
                for name in dict.fromkeys([*self.tensors, *later.tensors])
            },
            attributes={
                path: {**self.attributes.get(path, {}), **later.attributes.get(path, {})}
                for path in dict.fromkeys([*self.attributes, *later.attributes])
            },
            calls={
                path: _joined_calls(self.calls.get(path, ()), later.calls.get(path, ()))
                for path in dict.fromkeys([*self.calls, *later.calls])
            },
            keeps=cutting.entries(),
        )

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
            document: Any = parse_json(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON ({error}); save it again with PruningPlan.to_json()") from None
        found = document.get("version") if isinstance(document, dict) else None
        if found != VERSION:
            raise PlanError(
                f"the plan has version {found!r}, this scap_hub reads version {VERSION}: use the scap_hub that "
                "wrote it, or upgrade scap_hub"
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the plan"
            raise PlanError(f"the plan is invalid at {where}: {first['msg']}") from None


class Cutting:
    """Collects the lists of kept indices of a plan; equal ones get the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def entry(self, indices: Iterable[int]) -> int:
        """The number of a list of ascending indices."""
        return self._numbers.setdefault(ranges([int(index) for index in indices]), len(self._numbers))

    def entries(self) -> tuple[str, ...]:
        """All lists, as `PruningPlan.keeps` has them."""
        return tuple(self._numbers)


def _joined_calls(first: Sequence[CallNumber], later: Sequence[CallNumber]) -> tuple[CallNumber, ...]:
    """Changes after changes: of one place, the last one counts, as it knows what arrives from the code by then."""
    changes = {(change.function, change.call, change.position): change for change in (*first, *later)}
    return tuple(changes.values())


def _joined_groups(first: PruningPlan, later: PruningPlan) -> dict[str, tuple[int, list[int]]]:
    """Size and kept channels of each group that one of two plans cuts."""
    joined = {name: (group.size, first.kept(name)) for name, group in first.groups.items()}
    for name, group in later.groups.items():
        size, stayed = joined.get(name, (group.size, list(range(group.size))))
        if group.size != len(stayed):
            raise PlanError(
                f"group {name!r} was left with {len(stayed)} channels, but the next plan was made for {group.size}: "
                "it belongs to another model; make it anew"
            )
        joined[name] = size, [stayed[index] for index in later.kept(name)]
    return joined


def _joined_tensor(name: str, first: PruningPlan, later: PruningPlan, cutting: Cutting) -> TensorCut:
    """What stays of a tensor after two plans."""
    one = first.tensors.get(name) or TensorCut(shape=later.tensors[name].shape)
    shape, left = one.shape, first.left(name) if name in first.tensors else one.shape
    two = later.tensors.get(name) or TensorCut(shape=left)
    if two.shape != left:
        raise PlanError(
            f"tensor {name!r} was left with shape {left}, but the next plan was made for {two.shape}: "
            "it belongs to another model; make it anew"
        )
    keep = {}
    for dim in one.keep.keys() | two.keep.keys():
        if dim != 1 or not (one.blocks or two.blocks):
            stayed = first.indices(one.keep[dim]) if dim in one.keep else list(range(shape[dim]))
            chosen = later.indices(two.keep[dim]) if dim in two.keep else range(len(stayed))
            keep[dim] = cutting.entry(stayed[index] for index in chosen)
    blocks = _joined_blocks(first, one, later, two, cutting) if one.blocks or two.blocks else None
    refers = [(plan, cut.refers) for plan, cut in ((first, one), (later, two)) if cut.refers is not None]
    kept: list[int] = []
    for plan, entry in refers:
        kept = [kept[index] for index in plan.indices(entry)] if kept else plan.indices(entry)
    return TensorCut(shape=shape, keep=keep, blocks=blocks, refers=cutting.entry(kept) if kept else None)


def _joined_blocks(
    first: PruningPlan, one: TensorCut, later: PruningPlan, two: TensorCut, cutting: Cutting
) -> tuple[int, ...]:
    """The columns that stay of each row of a grouped weight: one block a row, as whole blocks may leave."""
    columns = _columns(first, one)
    stay = first.indices(one.keep[0]) if 0 in one.keep else list(range(one.shape[0]))
    for row, chosen in zip(stay, _columns(later, two), strict=True):
        columns[row] = [columns[row][index] for index in chosen]
    # Rows that leave keep as many as the others, whichever.
    width = len(columns[stay[0]])
    return tuple(cutting.entry(own[:width]) for own in columns)


def _columns(plan: PruningPlan, cut: TensorCut) -> list[list[int]]:
    """The columns that stay of each row, before rows leave."""
    if cut.blocks is not None:
        lists = [plan.indices(entry) for entry in cut.blocks]
    else:
        lists = [plan.indices(cut.keep[1]) if 1 in cut.keep else list(range(cut.shape[1]))]
    return [list(lists[row * len(lists) // cut.shape[0]]) for row in range(cut.shape[0])]


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
    if not re.fullmatch(r"[0-9]{1,18}(-[0-9]{1,18})?(,[0-9]{1,18}(-[0-9]{1,18})?)*", text):
        raise ValueError
    pairs = [part.split("-") for part in text.split(",")]
    return [(int(pair[0]), int(pair[-1])) for pair in pairs]


def _span(what: str, text: str) -> tuple[int, int]:
    """Last index and number of indices of a list; an entry may claim any number, so nothing is allocated."""
    try:
        pairs = _ranges(text)
    except ValueError:
        raise ValueError(f"{what}: {text[:40]!r} is not a list of ranges") from None
    before, count = -1, 0
    for first, last in pairs:
        if not before < first <= last:
            raise ValueError(f"{what}: {first}-{last} is not ascending within what precedes it")
        before, count = last, count + last - first + 1
    return before, count
