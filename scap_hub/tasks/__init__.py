"""Tasks: what a model is for."""

from scap_hub.tasks.base import Batch, Meter, Metric, Task
from scap_hub.tasks.classification import IMAGE_CLASSIFICATION, ImageClassification
from scap_hub.tasks.depth import DepthEstimation
from scap_hub.tasks.detection import ObjectDetection
from scap_hub.tasks.features import ImageFeatureExtraction
from scap_hub.tasks.outputs import Outputs, unlabelled
from scap_hub.tasks.placed import PlacedTask
from scap_hub.tasks.registry import task_named, task_of
from scap_hub.tasks.segmentation import SemanticSegmentation

__all__ = [
    "IMAGE_CLASSIFICATION",
    "Batch",
    "DepthEstimation",
    "ImageClassification",
    "ImageFeatureExtraction",
    "Meter",
    "Metric",
    "ObjectDetection",
    "Outputs",
    "PlacedTask",
    "SemanticSegmentation",
    "Task",
    "task_named",
    "task_of",
    "unlabelled",
]
