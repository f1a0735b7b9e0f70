"""What fine-tuning minimises, for one batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from scap_hub.errors import DataError
from scap_hub.recipe import FinetuneSettings
from scap_hub.tasks import Task
from scap_hub.training.distillation import Maps, attention_loss, feature_maps
from scap_hub.training.evaluate import autocast


@dataclass(frozen=True)
class Objective:
    """The loss of the task, mixed with what the teacher says.

    Attributes:
        task: Knows the loss, and how outputs are compared.
        settings: The recipe's `finetune` block.
        teacher: The dense model; None to learn from the targets alone.
    """

    task: Task
    settings: FinetuneSettings
    teacher: nn.Module | None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, (images, targets) or (images,)."""
        images, targets = batch if len(batch) == 2 and not self.task.from_teacher else (batch[0], None)
        if targets is None and not self._weight:
            raise DataError(
                "these images have no labels: training the dense model (finetune.dense_epochs) needs them, fine-tuning "
                "the pruned one does not if finetune.distillation.weight is above 0"
            )
        share = self._share()
        if share < 1:
            # The batch is shuffled, so its reverse is a random partner for each image.
            images = images.lerp(images.flip(0), 1 - share)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        output, maps = self._run(model, images, targets)
        loss = images.new_zeros((), dtype=torch.float32)
        if targets is not None and self._weight < 1:
            loss = self._loss(output, targets, share)
        return loss if self.teacher is None else self._taught(self.teacher, loss, images, targets, output, maps)

    @property
    def _weight(self) -> float:
        """Share of the loss that follows the teacher's outputs."""
        return self.settings.distillation.weight if self.teacher is not None else 0.0

    def _share(self) -> float:
        """The share of its own image in each mixture (mixup: Zhang et al., arXiv 1710.09412); 1 without mixup."""
        alpha = self.settings.mixup
        return float(Beta(alpha, alpha).sample()) if alpha else 1.0

    def _loss(self, output: Any, targets: Any, share: float) -> Tensor:
        """The loss of the targets; of a mixture, that of both images' targets in the shares of the images."""
        smoothing = self.settings.label_smoothing
        loss = share * self.task.loss(output, targets, smoothing)
        if share < 1:
            loss = loss + (1 - share) * self.task.loss(output, self.task.partners(targets), smoothing)
        return loss

    def _taught(
        self, teacher: nn.Module, loss: Tensor, images: Tensor, targets: Any, output: Any, maps: Maps
    ) -> Tensor:
        """The loss with what the teacher says of the same images."""
        learn = self.settings.distillation
        with torch.no_grad():
            guide, theirs = self._run(teacher, images)
        if self._weight:
            soft = self.task.distance(output, guide, learn.temperature)
            loss = soft if targets is None else (1 - self._weight) * loss + self._weight * soft
        return loss + learn.features * attention_loss(maps, theirs) if learn.features else loss

    def _run(self, network: nn.Module, images: Tensor, targets: Any = None) -> tuple[Any, Maps]:
        watches = self.teacher is not None and self.settings.distillation.features
        watched: AbstractContextManager[Maps] = feature_maps(network) if watches else nullcontext({})
        with autocast(self.settings.precision), watched as maps:
            return self.task.output_for(network, images, targets), maps
