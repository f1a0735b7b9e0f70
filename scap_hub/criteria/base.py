"""One interface for every importance criterion, and the registry of their names."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria.files import class_in_file
from scap_hub.errors import RecipeError
from scap_hub.plan import PruningPlan
from scap_hub.text import did_you_mean

_CRITERIA: dict[str, type[Criterion]] = {}


class Criterion(ABC):
    """Scores the channels of groups; a higher importance is kept.

    A subclass is a keyword-only dataclass of its options with a `name`; defining it registers it.

    Attributes:
        name: Of the criterion.
        scope: How `target.scope: auto` compares its scores across groups, see `select`.
        passes: As how many forward passes over the calibration images scoring takes about as long, for the forecast of
            a run; None where nobody has measured it.

    Raises:
        RecipeError: While a subclass is defined: another class has its name. A definition that runs again, such as a
            notebook's cell, replaces its former self.
    """

    name: ClassVar[str]
    scope: ClassVar[str] = "global"
    passes: ClassVar[float | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        former = _CRITERIA.get(cls.name)
        if former is not None and _definition(former) != _definition(cls):
            raise RecipeError(
                f"two criteria are named {cls.name!r}: {_definition(former)} and {_definition(cls)}; "
                "give the new one another name"
            )
        _CRITERIA[cls.name] = cls

    @abstractmethod
    def score(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Mapping[str, Tensor]:
        """Scores the channels of the given groups.

        Args:
            model: The dense model, unchanged on return.
            groups: Prunable groups of that model.
            batches: Calibration batches; this process's share where several processes run.

        Returns:
            `Scores`, or a plain {group.name: (group.size,) float tensor of importances}.
        """

    def seconds_beside(self, model: nn.Module) -> float:
        """About how long scoring takes beside its passes, however many images there are; nothing by default.

        Args:
            model: The dense model, on the device on which it will be scored.
        """
        return 0.0

    def ranking(self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any]) -> Mapping[str, Tensor]:
        """Scores that order the channels of each group as `score` does; for criteria where that alone is cheaper."""
        return self.score(model, groups, batches)

    def refine(
        self, model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any], plan: PruningPlan
    ) -> PruningPlan:
        """Chooses anew which channels stay, at the numbers that a plan gives every group; by default, the same ones.

        For criteria that judge sets of channels, and need to know how many will stay.

        Args:
            model: As for `score`.
            groups: As for `score`.
            batches: As for `score`.
            plan: What `select` made of the scores; the same on all processes.
        """
        return plan


def known_criteria() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_CRITERIA)


def criterion(name: str, options: Mapping[str, Any] | None = None, seed: int | None = None) -> Criterion:
    """Builds a criterion by name.

    Args:
        name: Of a registered criterion, or "path.py:MyCriterion" for a class in a Python file, which is run.
        options: Its own.
        seed: Of what it draws, for one that has a seed among its options and is given none there.

    Raises:
        RecipeError: Unknown name or option, a value out of range, or a file that has no such criterion.
    """
    kind, given = _class_named(name), dict(options or {})
    if seed is not None and "seed" in inspect.signature(kind).parameters:
        given.setdefault("seed", seed)
    try:
        return kind(**given)
    except TypeError as error:
        raise RecipeError(f"criterion {name!r}: {error}") from None


def _class_named(name: str) -> type[Criterion]:
    if ":" in name:
        return class_in_file(name, Criterion)  # type: ignore[type-abstract]
    return _CRITERIA[one_of("criterion", name, _CRITERIA)]


def one_of(option: str, value: str, choices: Iterable[str]) -> str:
    """Returns an option's value if it is one of its choices.

    Raises:
        RecipeError: It is not; the message offers the nearest one.
    """
    choices = sorted(choices)
    if value not in choices:
        near = did_you_mean(value, choices)
        raise RecipeError(f"unknown {option} {value!r}{near} (known: {', '.join(choices)})")
    return value


def whole_number(option: str, value: int, least: int, why: str = "") -> None:
    """Checks an option that counts something.

    Args:
        option: Its name.
        value: What was given.
        least: The smallest value allowed.
        why: The reason for that, as the end of a sentence.

    Raises:
        RecipeError: It is no whole number, or too small.
    """
    if not isinstance(value, int) or value < least:
        raise RecipeError(f"{option} = {value!r}: give at least {least}{why}")


def share(option: str, value: float, of_what: str) -> None:
    """Checks an option that is a share.

    Raises:
        RecipeError: It is not from 0 to 1.
    """
    if not 0 <= value <= 1:
        raise RecipeError(f"{option} = {value}: give the share of {of_what}, from 0 to 1")


def _definition(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
