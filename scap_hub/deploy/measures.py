"""How good and how fast exported files are: metric, agreement of answers, latency in turns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scap_hub.graph.record import evaluating
from scap_hub.progress import track
from scap_hub.tasks import Task
from scap_hub.training.distributed import accelerator, shard
from scap_hub.training.evaluate import evaluate
from scap_hub.zoo.base import logits


class Recorder(nn.Module):
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


def measured(model: nn.Module, loader: DataLoader, task: Task, labelled: bool) -> tuple[float | None, Tensor]:
    """The task's metric, on all processes, and this process's answers.

    Args:
        model: Any that gives logits.
        loader: Batches of (images, targets), in a fixed order.
        task: What the model is for.
        labelled: Whether there are targets; without them there is no metric.
    """
    recorder = Recorder(model)
    if labelled:
        return evaluate(recorder, loader, task=task)[task.metric.key], recorder.answers
    with evaluating(recorder), torch.no_grad():
        for batch in track(shard(loader), "answers", delay=1):
            task.output(recorder, batch[0])
    return None, recorder.answers


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of the answers of all processes that are the same, 0 to 1."""
    counts = torch.tensor([(ours == theirs).sum().item(), ours.numel()], dtype=torch.int64)
    same, all_of_them = accelerator().reduce(counts.to(accelerator().device)).tolist()
    return same / all_of_them
