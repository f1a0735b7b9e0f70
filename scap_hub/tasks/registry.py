"""The tasks there are, by name, and which of them a model is for."""

from __future__ import annotations

from scap_hub.errors import DataError, RecipeError
from scap_hub.tasks.base import Task
from scap_hub.tasks.classification import IMAGE_CLASSIFICATION
from scap_hub.tasks.depth import DepthEstimation
from scap_hub.tasks.detection import ObjectDetection
from scap_hub.tasks.features import ImageFeatureExtraction
from scap_hub.tasks.outputs import Outputs
from scap_hub.tasks.segmentation import SemanticSegmentation
from scap_hub.tasks.whole_detection import WholeDetection
from scap_hub.text import did_you_mean
from scap_hub.zoo.base import LoadedModel
from scap_hub.zoo.plain import torchvision_detector

_SHIPPED = (
    IMAGE_CLASSIFICATION,
    SemanticSegmentation(),
    ObjectDetection(),
    DepthEstimation(),
    ImageFeatureExtraction(),
    Outputs(),
)
TASKS: dict[str, Task] = {task.name: task for task in _SHIPPED}
"""By name. A model of which no more is known has outputs."""


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
        RecipeError: There is none.
    """
    if name not in TASKS:
        near = did_you_mean(name, list(TASKS)) or f": it is one of {', '.join(TASKS)}"
        raise RecipeError(f"no task {name!r}{near}; in Python, task= also takes a Task of your own")
    return TASKS[name]


def task_of(loaded: LoadedModel, asked: str | Task | None = None) -> Task:
    """What a model is for.

    Args:
        loaded: The model.
        asked: The task's name, or one of the caller's own; found from the model if left out.

    Raises:
        RecipeError: No such task.
        DataError: The model has no head for it.
    """
    if isinstance(asked, Task):
        return asked.fitted(loaded)
    found = loaded.zoo.task(loaded.module)
    if asked is None:
        default = IMAGE_CLASSIFICATION.name if loaded.num_classes else Outputs.name
        return _for(loaded, TASKS.get(found or default, TASKS[Outputs.name])).fitted(loaded)
    task = task_named(asked)
    if found is not None and asked not in (found, *_ANY_MODEL):
        raise DataError(
            f"{loaded.name} is a model for {found} and has no head for {asked}: give the whole model, or leave out task"
        )
    return _for(loaded, task).fitted(loaded)


def _for(loaded: LoadedModel, task: Task) -> Task:
    """A task, as models of this kind do it."""
    whole = isinstance(task, ObjectDetection) and torchvision_detector(loaded.module)
    return WholeDetection() if whole else task


_ANY_MODEL = (Outputs.name,)
"""What any model can be taken for."""
