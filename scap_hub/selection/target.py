"""What shall stay of a model, as one object: read from its short forms, checked, shared out over steps, priced."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scap_hub.errors import TargetError
from scap_hub.text import did_you_mean, shown

if TYPE_CHECKING:
    import numpy as np

    from scap_hub.channels.partition import Partition
    from scap_hub.timing.table import LatencyTable

BUDGETS = ("macs", "params", "latency")
"""Kinds of target that bound what the whole model costs."""
KINDS = (*BUDGETS, "ratio", "threshold")
EXAMPLES = ", ".join(f"{kind}=0.5" for kind in KINDS)

ModelCost = Callable[["np.ndarray"], float]
"""Takes a mask over all channels, (Partition.count,), and gives what the model costs when only those in it stay."""


@dataclass(frozen=True)
class Target:
    """What shall stay of a model.

    Attributes:
        kind: One of `KINDS`. "macs", "params" and "latency" are budgets for the whole model, "ratio" is a fraction of
            each group's channels, "threshold" a score that channels must reach.
        value: The fraction that stays, above 0 and at most 1; with "ratio" also {group name: fraction}; with
            "threshold" any finite number.

    Raises:
        TargetError: The kind is unknown, or the value is not of the kind that it asks for.
    """

    kind: str
    value: float | Mapping[str, float]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TargetError(f"target kind {self.kind!r} is unknown; take one of {', '.join(KINDS)}")
        object.__setattr__(self, "value", self._checked())

    def _checked(self) -> float | dict[str, float]:
        """The value in Python's own numbers."""
        if isinstance(self.value, Mapping) and self.kind == "ratio":
            if not self.value:
                raise TargetError("the target names no channel group; give {group name: fraction}")
            return {name: _fraction(f"target of {name!r}", fraction) for name, fraction in self.value.items()}
        if self.kind != "threshold":
            return _fraction(f"target {self.kind}", self.value)
        if not _is_number(self.value):
            raise TargetError(f"target threshold is {shown(self.value)}; give a number, such as threshold=0.6")
        return float(self.value)  # type: ignore[arg-type]

    @classmethod
    def of(cls, target: Target | str | Mapping[str, float]) -> Target:
        """Reads a short form.

        Args:
            target: "macs=0.5" or another of `KINDS`, or {group name: fraction}; a Target stands for itself.

        Raises:
            TargetError: It is none of these; says what to write.
        """
        if isinstance(target, Target):
            return target
        if isinstance(target, Mapping):
            return cls("ratio", dict(target))
        if not isinstance(target, str):
            raise TargetError(f"target {shown(target)} is not understood; {_meant(target)}write one of {EXAMPLES}")
        kind, _, text = (part.strip() for part in target.partition("="))
        try:
            value = float(text)
        except ValueError:
            kind = ""
        if kind not in KINDS:
            raise TargetError(f"target {shown(target)} is not understood; {_meant(target)}write one of {EXAMPLES}")
        return cls(kind, value)

    def __str__(self) -> str:
        """The short form, "macs=0.5"; fractions of single groups as "conv1=0.5, conv2=0.25"."""
        if isinstance(self.value, Mapping):
            return ", ".join(f"{name}={fraction!r}" for name, fraction in self.value.items())
        return f"{self.kind}={self.value!r}"

    def share(self, part: float) -> Target:
        """The target of a part of a run: those of all parts multiply to this one; a threshold is the same for each.

        Args:
            part: Of the run; 0.5 is the first of two equal steps.
        """
        if self.kind == "threshold":
            return self
        if isinstance(self.value, Mapping):
            return Target(self.kind, {name: fraction**part for name, fraction in self.value.items()})
        return Target(self.kind, self.value**part)

    @property
    def number(self) -> float:
        """The value, where it is one number."""
        assert not isinstance(self.value, Mapping)
        return self.value

    def fractions(self, names: Collection[str]) -> dict[str, float]:
        """What a ratio asks of single groups.

        Args:
            names: Of the prunable groups.

        Returns:
            The fraction of each group that the target names; of all of them, where it is one number.

        Raises:
            TargetError: It names a group that is not among them; offers the nearest one.
        """
        if not isinstance(self.value, Mapping):
            return dict.fromkeys(names, self.value)
        for name in self.value:
            if name not in names:
                raise TargetError(
                    f"target names {name!r}, which is no prunable channel group{did_you_mean(name, names)}"
                )
        return dict(self.value)

    def cost(self, partition: Partition, latency: LatencyTable | None) -> ModelCost:
        """What a budget counts: multiply-accumulates, parameters, or milliseconds as a table predicts them.

        Raises:
            TargetError: A latency target without a table.
        """
        if self.kind == "latency":
            if latency is None:
                raise TargetError(
                    "a latency target needs this device's layer times: pass latency=scap_hub.latency_table(model, "
                    "groups, images), or use scap_hub.prune, which measures them"
                )
            return latency.ms
        return {"macs": partition.macs, "params": partition.params}[self.kind]

    def unreachable(self, least: float) -> TargetError:
        """The error that says how far a budget can go.

        Args:
            least: Share of the cost that stays with every prunable group at its floor.
        """
        return TargetError(
            f"{self.kind}={self.number:g} cannot be reached: with every prunable group at its floor "
            f"{least:.3f} of the {self.kind} stay; ask for at least that, or lower the floor"
        )


def _meant(target: object) -> str:
    """What a bare number may have meant: the share of the operations that stays."""
    try:
        share = float(str(target).strip().removesuffix("%")) / (100 if str(target).strip().endswith("%") else 1)
    except ValueError:
        return ""
    return f"macs={share:g} keeps that share of the operations; " if 0 < share <= 1 else ""


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _fraction(what: str, value: object) -> float:
    if not _is_number(value) or not 0 < value <= 1:  # type: ignore[operator]
        raise TargetError(f"{what} is {shown(value)}; give the fraction that stays, above 0 and at most 1")
    return float(value)  # type: ignore[arg-type]
