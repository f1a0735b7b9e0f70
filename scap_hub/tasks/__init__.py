"""Tasks: what a model is for."""

from scap_hub.tasks.base import Batch, Meter, Metric, Task
from scap_hub.tasks.classification import IMAGE_CLASSIFICATION, ImageClassification
from scap_hub.tasks.outputs import Outputs, unlabelled
from scap_hub.tasks.placed import PlacedTask
from scap_hub.tasks.registry import task_named, task_of
from scap_hub.tasks.segmentation import SemanticSegmentation

__all__ = [
    "IMAGE_CLASSIFICATION",
    "Batch",
    "ImageClassification",
    "Meter",
    "Metric",
    "Outputs",
    "PlacedTask",
    "SemanticSegmentation",
    "Task",
    "task_named",
    "task_of",
    "unlabelled",
]
