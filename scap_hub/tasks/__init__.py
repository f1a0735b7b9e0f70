"""Tasks: what a model is for."""

from scap_hub.tasks.base import Batch, Meter, Metric, Task
from scap_hub.tasks.classification import IMAGE_CLASSIFICATION, ImageClassification

__all__ = ["IMAGE_CLASSIFICATION", "Batch", "ImageClassification", "Meter", "Metric", "Task"]
