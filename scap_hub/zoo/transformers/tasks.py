"""What transformers' models are for, by its own lists of classes; imports transformers."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from scap_hub.zoo.base import Wanted

_LISTS = {
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "semantic-segmentation": ("SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION"),
    "object-detection": ("OBJECT_DETECTION",),
    "depth-estimation": ("DEPTH_ESTIMATION",),
    "image-feature-extraction": ("BACKBONE", "IMAGE", ""),
}
_SETS_OF_MASKS = ("maskformer", "mask2former", "eomt", "eomt_dinov3")
"""Of the models for every kind of segmentation, those whose masks and classes can be read as a class for each pixel."""
WITH_CLASSES = ("image-classification", "semantic-segmentation", "object-detection")
"""Tasks in which a config's `num_labels` means something."""


def task_of(kind: type[nn.Module]) -> str | None:
    """The task of a class of models: "outputs" where transformers has it for another; None for a class of a user's."""
    names = [base.__name__ for base in kind.__mro__]
    found = next((task for name in names for task, classes in _classes().items() if name in classes), None)
    return "outputs" if found is None and kind.__module__.startswith("transformers.") else found


@functools.cache
def _classes() -> dict[str, frozenset[str]]:
    """Names of classes, by task."""
    found = {}
    for task, lists in _LISTS.items():
        names: set[str] = set()
        for part in lists:
            prefix = f"MODEL_FOR_{part}" if part else "MODEL"
            for family, classes in getattr(modeling_auto, f"{prefix}_MAPPING_NAMES", {}).items():
                if part == "UNIVERSAL_SEGMENTATION" and family not in _SETS_OF_MASKS:
                    continue
                names |= {classes} if isinstance(classes, str) else set(classes)
        found[task] = frozenset(names)
    return found


def model_class(config: Any, wanted: Wanted) -> Any:
    """The class to build of a config: for the task that is wanted, else the one that `architectures` names.

    A classifier is also built where a number of classes is wanted of a model without a head, or nothing is named.

    Raises:
        ValueError: There is no model of this family for that task.
    """
    name = (config.architectures or [None])[0]
    named = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(named, type) and issubclass(named, PreTrainedModel)) or "Timm" in named.__name__:
        named = None
    found = None if named is None else task_of(named)
    task = wanted.task if wanted.task in _LISTS else found
    if task == "outputs" or (found not in WITH_CLASSES and wanted.task is None and wanted.num_classes is not None):
        task = "image-classification"
    if named is not None and found == task:
        return named
    for part in _LISTS[task or "image-classification"]:
        prefix = f"MODEL_FOR_{part}_MAPPING" if part else "MODEL_MAPPING"
        classes = getattr(modeling_auto, prefix, {}).get(type(config), None)
        if classes is not None:
            return classes if isinstance(classes, type) else classes[0]
    raise ValueError(f"transformers has no {config.model_type!r} model for {task}")
