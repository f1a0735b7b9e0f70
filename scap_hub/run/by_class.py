"""How a model does on each class, and which classes it takes for another, measured along with the task's metric."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from scap_hub.tasks import Meter, Task

Counts = list[tuple[int, int]]
"""Right answers and images of each class."""
Mistakes = dict[int, dict[int, int]]
"""How many images of a class got another one for an answer, by class and answer; only those of which there are any."""


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
        return list(zip(right, images, strict=True)), mistakes
