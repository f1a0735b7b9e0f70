"""The training of the dense model before it is pruned: of a new classifier above all."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from scap_hub.progress import tell
from scap_hub.recipe import FinetuneSettings, Recipe
from scap_hub.run.report import Measures, Tuned
from scap_hub.run.stages import Stages
from scap_hub.text import counted
from scap_hub.training.data import Data
from scap_hub.training.data.batches import known_length
from scap_hub.training.finetune import finetune
from scap_hub.training.history import kept_epoch
from scap_hub.zoo import LoadedModel

NEW_HEAD_EPOCHS = 5
"""Passes that tune a model with a new classifier, where the recipe leaves it to us."""


@dataclass(frozen=True)
class Tuning:
    """How the dense model is trained before it is pruned.

    Attributes:
        epochs: Passes over the training images; 0 for none.
        new_head: Whether its classifier is new, and knows nothing.
    """

    epochs: int
    new_head: bool

    @classmethod
    def of(cls, settings: FinetuneSettings, new_head: bool) -> Tuning:
        """What the recipe says."""
        if settings.dense_epochs == "auto":
            return cls(NEW_HEAD_EPOCHS if new_head else 0, new_head)
        return cls(settings.dense_epochs, new_head)

    def trains(self, settings: FinetuneSettings) -> bool:
        """Whether a run with these settings trains anything, before or after it prunes."""
        return self.epochs > 0 or settings.epochs > 0


def tune_dense(
    loaded: LoadedModel, data: Data, recipe: Recipe, tuning: Tuning, stages: Stages, work: Path | None = None
) -> Tuned | None:
    """Tunes the dense model in place, all of it, if it shall be.

    To train a new classifier alone first does not pay: MobileNetV2 with ImageNet's weights on 600 images of
    Fashion-MNIST reached 72.7 % after five epochs of everything, and 69.4 % if the first was for the classifier alone.

    Args:
        loaded: The dense model.
        data: Its data.
        recipe: Its block `finetune`.
        tuning: For how long.
        stages: Where the seconds are counted.
        work: Where checkpoints are kept.

    Returns:
        What was done; None if nothing was.
    """
    if not tuning.epochs:
        return None
    head = f"gets a new head for the {loaded.num_classes} classes of {data.name!r} and " if tuning.new_head else ""
    tell(f"{loaded.name} {head}is tuned first, for {counted(tuning.epochs, 'epoch')} (finetune.dense_epochs)")
    settings = recipe.finetune.lasting(tuning.epochs)
    with stages("tune dense"):
        folder = work and work / "training-dense"
        history = finetune(loaded.module, data, settings, output_dir=folder, seed=recipe.seed)
    metric = data.task.metric
    kept = kept_epoch(history, metric.key, metric.lower_is_better)
    return Tuned(tuning.epochs, loaded.num_classes if tuning.new_head else None, history, kept)


def warn_if_guessing(measured: Measures, loaded: LoadedModel, data: Data, tuned: Tuned | None) -> None:
    """Warns of a dense model that is no better than guessing: all that follows would only imitate it."""
    chance = data.task.chance(loaded.num_classes)
    if chance is None or measured.top1 is None or data.measured_on is None:
        return
    count = known_length(data.measured_on) or 100  # a stream does not tell
    luck = 3 * math.sqrt(chance * (1 - chance) / count)
    if measured.top1 > chance + min(luck, (1 - chance) / 2):  # of few images all may be right by luck
        return
    advice = (
        f"tune it for longer than finetune.dense_epochs={tuned.epochs}, or at another finetune.learning_rate"
        if tuned
        else "tune it first with finetune.dense_epochs=5 if its weights are untrained; or, if they are trained, check "
        "that the labels are numbered as its classes are"
    )
    warnings.warn(
        f"the dense model has {data.task.metric.name} {measured.top1:.2%}, no more than guessing among "
        f"{loaded.num_classes} classes; a pruned one will not be better: {advice}",
        stacklevel=2,
    )
