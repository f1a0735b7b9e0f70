"""How a model does on each class, measured along with the task's metric."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from scap_hub.tasks import Meter, Task


class ByClass(Meter):
    """A task's meter that also counts right answers by class, where there is a class to an image."""

    def __init__(self, task: Task, classes: int, device: torch.device) -> None:
        """Starts at nothing; `classes` is the width of the classifier, 0 where there is none."""
        self._task, self._meter = task, task.meter(device)
        self._counts = torch.zeros(classes, 2, dtype=torch.int64, device=device)

    def add(self, output: Any, targets: Any) -> None:
        """See `Meter.add`."""
        self._meter.add(output, targets)
        sure = self._task.confidence(output) if len(self._counts) else None
        if sure is None or not isinstance(targets, Tensor) or targets.ndim != 1:
            return
        targets = targets.to(self._counts.device)
        right = (sure.argmax(1).to(targets.device) == targets).long()
        self._counts.index_add_(0, targets, torch.stack([right, torch.ones_like(right)], 1))

    def result(self) -> dict[str, float]:
        """See `Meter.result`."""
        return self._meter.result()

    def counts(self) -> list[tuple[int, int]] | None:
        """Right answers and images of each class, over all processes; None where nothing was counted."""
        rows = reduce(self._counts, reduction="sum").tolist()
        return [(right, images) for right, images in rows] if any(images for _, images in rows) else None
