"""What is told of each epoch, and to whom: callbacks of the caller, and trackers of experiments."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available
from torch import nn

from scap_hub.errors import RecipeError
from scap_hub.recipe import FinetuneSettings
from scap_hub.training.distributed import accelerator

PROJECT, FOLDER = "scap_hub", Path("runs")
_AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}


class Callback(Protocol):
    """Anything with this method."""

    def on_epoch_end(self, row: Mapping[str, float], model: nn.Module) -> bool | None:
        """Called on every process after each epoch, when its checkpoint is kept; of the last one again on a resume.

        Args:
            row: What `finetune` returns of the epoch.
            model: The weights that were measured; to look at, not to change.

        Returns:
            True to end the training here, with the best weights so far; on several processes the main one's counts. An
            exception ends the run; with an output folder the same call goes on after this epoch.
        """


def check_tracker(settings: FinetuneSettings) -> None:
    """Finds out whether what the settings log with is installed.

    Raises:
        RecipeError: It is not.
    """
    name = settings.log_with
    if name is not None and not _AVAILABLE[name]():
        raise RecipeError(f"finetune.log_with is {name!r}, which is not installed: pip install {name}, or leave it out")


class Tracking:
    """Logs rows from the main process."""

    def __init__(self, settings: FinetuneSettings) -> None:
        """Begins a run in the tracker that the settings name, if they name one."""
        self._tracker: GeneralTracker | None = None
        if settings.log_with is None or not accelerator().is_main_process:
            return
        kind = LOGGER_TYPE_TO_CLASS[settings.log_with]
        folder = FOLDER / time.strftime("%Y%m%d-%H%M%S")
        options: dict[str, Any] = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        self._tracker = kind(PROJECT, **options)
        self._tracker.start()
        flat = {key: value for key, value in settings.model_dump().items() if not isinstance(value, dict)}
        self._tracker.store_init_configuration({key: value for key, value in flat.items() if value is not None})

    def log(self, row: Mapping[str, float]) -> None:
        """Logs an epoch under the names that its row has."""
        if self._tracker is not None:
            # The epoch is a value as well as the step, which accelerate hands on to trackio since 1.14 only.
            self._tracker.log(dict(row), step=int(row["epoch"]))

    def finish(self) -> None:
        """Ends the run in the tracker."""
        if self._tracker is not None:
            self._tracker.finish()
