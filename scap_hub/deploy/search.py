"""Looks for int8 that loses no more than is allowed: other schemes first, then the layers that hurt."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from scap_hub.deploy.quantizers.base import Scheme
from scap_hub.text import counted

MOST_KEPT = 0.5
"""Share of the layers that may stay in float32; with more, little of int8 is left."""


@dataclass(frozen=True)
class Attempt:
    """One way to int8 that was tried.

    Attributes:
        scheme: How numbers were mapped.
        kept: Layers that stayed in float32.
        loss: What was lost on the images that decide, as a fraction.
    """

    scheme: Scheme
    kept: tuple[str, ...]
    loss: float

    def __str__(self) -> str:
        kept = f", {counted(len(self.kept), 'layer')} in float32" if self.kept else ""
        return f"{self.scheme}{kept}: {100 * self.loss:.2f} points"


@dataclass
class Found:
    """What the search came to.

    Attributes:
        best: The first attempt that loses no more than was allowed, or else the one that loses least.
        attempts: All of them, in their order.
    """

    best: Attempt
    attempts: list[Attempt] = field(default_factory=list)


def search(
    schemes: Sequence[Scheme],
    layers: Sequence[str],
    allowed: float,
    loss: Callable[[Scheme, Sequence[str]], float],
    harm: Callable[[Scheme, Sequence[str]], float],
) -> Found:
    """Tries schemes on all layers, and keeps ever more of the layers that hurt in float32 where none is enough.

    Args:
        schemes: Those to try, in their order.
        layers: Names of what can stay in float32.
        allowed: Loss to stay within, as a fraction.
        loss: What is lost with a scheme when some layers stay in float32, as a fraction.
        harm: How much the outputs change when only some layers are quantised; any positive unit.
    """
    attempts: list[Attempt] = []

    def tried(scheme: Scheme, kept: Sequence[str] = ()) -> bool:
        attempts.append(Attempt(scheme, tuple(kept), loss(scheme, kept)))
        return attempts[-1].loss <= allowed

    if not any(tried(scheme) for scheme in schemes):
        scheme = min(attempts, key=lambda attempt: attempt.loss).scheme
        kept: list[str] = []
        most = int(MOST_KEPT * len(layers))
        for name in harmful(layers, lambda names: harm(scheme, names)):
            if len(kept) == most:
                break
            kept.append(name)
            # 1, 2, 4, 8 and so on: each try measures all images that decide.
            if len(kept) & (len(kept) - 1) == 0 and tried(scheme, kept):
                break
    return Found(min(attempts, key=lambda attempt: (attempt.loss > allowed, attempt.loss)), attempts)


def harmful(layers: Sequence[str], harm: Callable[[Sequence[str]], float]) -> Iterator[str]:
    """Layers, those that hurt most first, found by halving: the half that hurts more is looked into first.

    So a few layers among hundreds are found without each being tried alone.
    """
    queue: list[tuple[float, int, Sequence[str]]] = [(0.0, 0, list(layers))] if layers else []
    while queue:
        _, start, names = heapq.heappop(queue)
        if len(names) == 1:
            yield names[0]
            continue
        middle = len(names) // 2
        for half, offset in ((names[:middle], 0), (names[middle:], middle)):
            heapq.heappush(queue, (-harm(half), start + offset, half))
