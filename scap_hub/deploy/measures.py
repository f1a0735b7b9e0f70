"""How good exported files are: the task's metric, and how far a file is from the one in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scap_hub.deploy.runtimes import Runtime
from scap_hub.graph.record import evaluating
from scap_hub.progress import track
from scap_hub.tasks import Task
from scap_hub.tasks.outputs import OUTPUT_ERROR, Outputs
from scap_hub.training.distributed import accelerator, shard
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo.base import logits


@dataclass(frozen=True)
class Judged:
    """What was measured of a file.

    Attributes:
        metric: The task's; None without labels, or where the task has none but likeness to the dense model.
        difference: From the file in float32, 0 if there is none: the share of other answers, or the relative output
            error.
    """

    metric: float | None
    difference: float


class Judge:
    """Measures files of one model on the same images.

    Models that answer by logits alone are compared by their answers, all others by their outputs.

    Attributes:
        own: What was measured of the file in float32.
        compared: What the difference is of.
        decides: What a loss is of.
    """

    def __init__(self, reference: Runtime, by_answers: bool, loader: DataLoader, task: Task, labelled: bool) -> None:
        """Measures the file in float32.

        Args:
            reference: The file in float32.
            by_answers: Whether logits are all that it gives; a runtime may not know the names.
            loader: Batches of (images, targets), in a fixed order.
            task: What the model is for.
            labelled: Whether there are targets; without them there is no metric. Nor is there for a task that compares
                with the dense model: that may be at hand without its weights.
        """
        self._reference, self._loader, self._task = reference, loader, task
        self._labelled = labelled and not task.from_teacher
        self._answers: Tensor | None = None
        self._by_answers = by_answers
        self.compared = "same answers" if by_answers else OUTPUT_ERROR.name
        self.own = self(reference)
        self.decides = self.compared if self.own.metric is None else task.metric.name

    def __call__(self, file: Runtime) -> Judged:
        """Measures a file, on all processes."""
        return self._answered(file) if self._by_answers else Judged(self._metric(_Told(file)), self._error(file))

    def loss(self, file: Runtime) -> float:
        """What a file loses against the one in float32, as a fraction: of the metric, or else the difference."""
        judged = self(file)
        if judged.metric is None or self.own.metric is None:
            return judged.difference
        lost = self.own.metric - judged.metric
        return -lost if self._task.metric.lower_is_better else lost

    def _metric(self, model: nn.Module) -> float | None:
        if not self._labelled:
            return None
        return evaluate(model, self._loader, task=self._task)[self._task.metric.key]

    def _error(self, file: Runtime) -> float:
        if file is self._reference:
            return 0.0
        found = evaluate(_Listed(file), self._loader, task=Outputs(), teacher=_Listed(self._reference))
        return found[OUTPUT_ERROR.key]

    def _answered(self, file: Runtime) -> Judged:
        recorder = _Recorder(file)
        metric = self._metric(recorder)
        if metric is None:
            with evaluating(recorder), torch.no_grad():
                for batch in track(shard(self._loader), "answers", delay=1):
                    self._task.output(recorder, batch[0])
        if self._answers is None:
            self._answers = recorder.answers
        return Judged(metric, 1 - _agreement(recorder.answers, self._answers))


class _Recorder(nn.Module):
    """A model that remembers its answers: the class with the largest logit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._answers: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits, as the model gives them."""
        output = logits(self.model(images))
        self._answers.append(output.argmax(1).cpu())
        return output

    @property
    def answers(self) -> Tensor:
        """Of all images of this process so far, int64 (images, ...)."""
        return torch.cat(self._answers)


class _Told(nn.Module):
    """A file for tasks that tell a model the targets, for its own loss. A file has none, and nobody looks at it."""

    def __init__(self, file: Runtime) -> None:
        super().__init__()
        self.file = file

    def forward(self, pixel_values: Tensor, labels: Any = None) -> Any:
        """What the file gives, with a loss of 0 if there are targets."""
        found = self.file(pixel_values)
        if labels is None:
            return found
        from transformers.utils import ModelOutput  # takes a second to import, and runs may do without

        return ModelOutput(found, loss=torch.zeros(()))


class _Listed(nn.Module):
    """A file whose outputs come in a list."""

    def __init__(self, file: Runtime) -> None:
        super().__init__()
        self.file = file

    def forward(self, images: Tensor) -> list[Tensor]:
        """Tensors (N, ...)."""
        found = self.file(images)
        return [*found.values()] if isinstance(found, Mapping) else [found]


def _agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of the answers of all processes that are the same, 0 to 1."""
    counts = torch.tensor([(ours == theirs).sum().item(), ours.numel()], dtype=torch.int64)
    same, all_of_them = accelerator().reduce(counts.to(accelerator().device)).tolist()
    return same / all_of_them
