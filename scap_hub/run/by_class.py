"""How a model does on each class, and which classes it takes for another, measured along with the task's metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from scap_hub.tasks import Meter, Task

Counts = dict[int, tuple[int, int]]
"""Right answers and images by class."""
Mistakes = dict[int, dict[int, int]]
"""How many images of a class got another one for an answer, by class and answer; only those of which there are any."""

PAIRS = 500
"""Of how many pairs of class and answer a report counts the mistakes at most: all of up to 22 classes."""
CLASSES = 1000
"""Of how many classes a report has the right answers at most."""


@dataclass(frozen=True)
class Changed:
    """What became of all classes.

    Attributes:
        classes: How many have images.
        lost: How many of these have fewer right answers than before.
        won: How many have more.
    """

    classes: int
    lost: int
    won: int


def changed(before: Counts, after: Counts) -> Changed:
    """What became of all classes, from the counts of the dense and the pruned model."""
    changes = [after[name][0] - right for name, (right, images) in before.items() if images]
    return Changed(len(changes), sum(change < 0 for change in changes), sum(change > 0 for change in changes))


def most_changed(before: Counts, after: Counts) -> tuple[Counts, Counts]:
    """The counts of at most `CLASSES` classes, the same ones of both models: of more, those that changed most."""
    if len(before) <= CLASSES:
        return before, after

    def change(name: int) -> tuple[float, int, int]:
        right, images = before[name]
        return -abs(after[name][0] - right) / images, -images, name

    kept = sorted(sorted((name for name, (_, images) in before.items() if images), key=change)[:CLASSES])
    return {name: before[name] for name in kept}, {name: after[name] for name in kept}


def foremost(before: Mistakes, after: Mistakes) -> tuple[Mistakes, Mistakes]:
    """The mistakes of dense and pruned model for at most `PAIRS` pairs, the same ones of both.

    Those stay whose number changed most, and of equal ones the most frequent. A pair that is kept for one model is kept
    for the other too, so that what is missing there is 0, and not unknown.
    """
    pairs = {(truth, answer) for found in (before, after) for truth, own in found.items() for answer in own}

    def weight(pair: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
        truth, answer = pair
        old, new = (found.get(truth, {}).get(answer, 0) for found in (before, after))
        return -abs(new - old), -(old + new), pair

    kept = set(sorted(pairs, key=weight)[:PAIRS])
    return _only(before, kept), _only(after, kept)


def _only(mistakes: Mistakes, pairs: Collection[tuple[int, int]]) -> Mistakes:
    rows = {
        truth: {answer: count for answer, count in own.items() if (truth, answer) in pairs}
        for truth, own in mistakes.items()
    }
    return {truth: own for truth, own in rows.items() if own}


class ByClass(Meter):
    """A task's meter that also counts answers by class, where there is a class to an image."""

    def __init__(self, task: Task, classes: int, device: torch.device) -> None:
        """Starts at nothing; `classes` is the width of the classifier, 0 where there is none."""
        self._task, self._meter, self._classes = task, task.meter(device), classes
        self._pairs: list[Tensor] = []

    def add(self, output: Any, targets: Any) -> None:
        """See `Meter.add`."""
        self._meter.add(output, targets)
        sure = self._task.confidence(output) if self._classes else None
        if sure is None or not isinstance(targets, Tensor) or targets.ndim != 1:
            return
        # Kept where they are and counted at the end: counting here would wait for the device at each batch.
        self._pairs.append(targets.to(sure.device) * self._classes + sure.argmax(1))

    def result(self) -> dict[str, float]:
        """See `Meter.result`."""
        return self._meter.result()

    def counted(self) -> tuple[Counts, Mistakes] | tuple[None, None]:
        """Right answers and mistakes over all processes; call it on each of them. None where nothing was counted."""
        own = torch.cat(self._pairs).cpu().tolist() if self._pairs else []
        pairs: Counter[int] = sum(gather_object([Counter(own)]), Counter())
        if not pairs:
            return None, None
        right, images = [0] * self._classes, [0] * self._classes
        mistakes: Mistakes = {}
        for pair, count in sorted(pairs.items()):
            truth, answer = divmod(pair, self._classes)
            images[truth] += count
            if truth == answer:
                right[truth] = count
            else:
                mistakes.setdefault(truth, {})[answer] = count
        return dict(enumerate(zip(right, images, strict=True))), mistakes
