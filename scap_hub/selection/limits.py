"""How many channels a group may keep."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from scap_hub.errors import TargetError

LEAST = 4
"""Channels that stay in each group, unless the floor is 0."""


@dataclass(frozen=True)
class Limits:
    """The numbers of channels that a group may keep.

    Attributes:
        round_to: Numbers are multiples of this, or the whole group; of half of it, a quarter and so on in groups with
            fewer than four such steps.
        floor: Smallest fraction of a group's channels that stays, and never fewer than 4; 0 allows a single channel.

    Raises:
        TargetError: `round_to` is no whole number above 0, or `floor` is outside 0 to 1.
    """

    round_to: int = 8
    floor: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, numbers.Integral) or self.round_to < 1:
            raise TargetError(f"round_to is {self.round_to!r}; give a whole number, 1 or more")
        number = isinstance(self.floor, numbers.Real) and not isinstance(self.floor, bool)
        if not number or not 0 <= self.floor <= 1:
            raise TargetError(f"floor is {self.floor!r}; give a fraction, 0 to 1")

    def step(self, size: int) -> int:
        """What the numbers of a group with `size` channels are multiples of."""
        step = self.round_to
        while step > 1 and size < 4 * step:
            step //= 2
        return step

    def at_least(self, size: int, wanted: float) -> int:
        """The smallest allowed number that is not below `wanted`."""
        least = max(LEAST, math.ceil(self.floor * size)) if self.floor else 1
        step = self.step(size)
        return min(size, math.ceil(max(wanted, least) / step) * step)

    def nearest(self, size: int, wanted: float) -> int:
        """The allowed number nearest to `wanted`, which is `size` at most; the larger of two that are as near."""
        step = self.step(size)
        below = int(wanted / step) * step
        above = min(size, below + step)
        return self.at_least(size, above if above - wanted <= wanted - below else below)
