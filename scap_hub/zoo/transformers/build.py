"""Builds transformers' models and describes them; imports transformers."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from scap_hub.errors import ModelError
from scap_hub.text import one_line
from scap_hub.zoo.base import LoadedModel, Preprocessing, Wanted, Zoo, default_preprocessing
from scap_hub.zoo.transformers.processor import observed_preprocessing, resized
from scap_hub.zoo.transformers.tasks import WITH_CLASSES, model_class, task_of

_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors store them


_FETCHES = re.compile(r"_.*|.*_implementation|auto_map|quantization_config|use_kernels|kernel_config")


def from_folder(zoo: Zoo, folder: Path, source: str, wanted: Wanted) -> LoadedModel:
    """Builds a model from a folder with a transformers config.json; remote code is refused.

    It is of the class that `model_class` says.

    Raises:
        ModelError: Not a model that the installed transformers knows, or weights that do not fit.
    """
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        if wanted.num_classes not in (None, config.num_labels):
            config.num_labels = wanted.num_classes  # renames the labels too
        kind = model_class(config, wanted)
        if wanted.pretrained:
            module = kind.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **local)
        else:
            module = kind._from_config(config)
    except Exception as error:
        raise ModelError(f"transformers cannot load {source!r}: {one_line(error)}") from error
    return from_module(zoo, module, source, wanted.input_size, image_processor(str(folder)))


def from_module(
    zoo: Zoo,
    module: Any,
    source: str,
    input_size: tuple[int, int, int] | None,
    processor: dict[str, Any] | None,
) -> LoadedModel:
    """Describes a transformers model.

    Args:
        zoo: transformers'.
        module: The model.
        source: What the user asked for.
        input_size: Overrides the image processor's.
        processor: The image processor's document, None where there is none.

    Raises:
        ModelError: The model does not take that number of channels.
    """
    config: Any = module.config
    of_images: Any = getattr(config, "vision_config", config)  # such as CLIP's, beside that of its texts
    channels = getattr(of_images, "num_channels", 3)
    if input_size and input_size[0] != channels:
        raise ModelError(f"input_size {input_size}: the model takes {channels} channels; build it with that many")
    size = getattr(of_images, "image_size", None)
    own = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if processor is None:
        preprocessing = default_preprocessing((channels, *(own or (224, 224))))
    else:
        preprocessing = observed_preprocessing(processor, _preprocessing(processor, channels, own))
    if input_size and input_size != preprocessing.input_size:
        processor = processor and resized(processor, preprocessing, input_size)
        preprocessing = replace(preprocessing, input_size=input_size)
    num_classes = config.num_labels if task_of(type(module)) in (None, *WITH_CLASSES) else 0
    # Some configs, such as PVT's default one, count their classes and name none of them.
    labels = [config.id2label[index] for index in range(num_classes)] if config.id2label else []
    return LoadedModel(
        module=module.eval(),
        zoo=zoo,
        name=type(module).__name__,
        source=source,
        preprocessing=preprocessing,
        num_classes=num_classes,
        labels=None if labels[:1] in ([], ["LABEL_0"]) else labels,
        config=_config(module),
        image_processor=processor,
    )


def rebuild(config: dict[str, Any]) -> nn.Module:
    """Builds an untrained model: the class that `architectures` names, from the installed transformers only.

    Raises:
        ModelError: No such class, or a config that it refuses.
    """
    name, config = config["architectures"][0], _inert(config)
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ModelError(f"transformers {transformers.__version__} has no model {name!r}: upgrade transformers")
    if model_class.__module__.startswith("transformers.models.timm"):
        raise ModelError(f"{name!r} only wraps a timm model: give the timm model itself")
    try:
        built = model_class(AutoConfig.for_model(**config))
        built.config.to_json_string()  # some values are taken, and cannot be written again
    except Exception as error:
        raise ModelError(f"transformers cannot build {name!r}: {one_line(error)}") from error
    return built


def _inert(value: Any) -> Any:
    """A config without what fetches code, kernels or other weights."""
    if isinstance(value, dict):
        kept = {key: _inert(own) for key, own in value.items() if not _FETCHES.fullmatch(str(key))}
        return kept | ({"use_pretrained_backbone": False} if "use_pretrained_backbone" in value else {})
    return [_inert(item) for item in value] if isinstance(value, list) else value


def _config(module: Any) -> dict[str, Any]:
    document = json.loads(module.config.to_json_string())
    document.pop("auto_map", None)  # points at code
    document.pop("scap", None)  # what is pruned already cannot be rebuilt as the dense model of a new plan
    document["architectures"] = [type(module).__name__]
    return document


def image_processor(source: str) -> dict[str, Any] | None:
    """The document of the image processor in a folder or a cached Hub repository; None where there is none."""
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        if any(Path(source, name).is_file() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
            warnings.warn(
                f"the image processor in {source} cannot be loaded ({one_line(error)}): images are normalised with "
                "ImageNet's mean, so give a DataLoader of images that are ready for the model",
                stacklevel=2,
            )
        return None
    return json.loads(processor.to_json_string())


def _preprocessing(processor: dict[str, Any], channels: int, own: tuple[int, ...] | None) -> Preprocessing:
    """What the entries say; `own` is the (height, width) that the model's config names, of a processor without one."""
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    if processor.get("do_resize") is False and own:
        size = dict(zip(("height", "width"), own, strict=True))
    shortest = size.get("shortest_edge")
    if processor.get("do_center_crop") and "height" in crop:
        height, width = crop["height"], crop["width"]
        crop_pct, crop_mode = height / (shortest or size.get("height", height)), "center"
    elif shortest:
        height = width = shortest
        # transformers' ConvNext processor crops small images and squashes large ones.
        crop_pct, crop_mode = (processor.get("crop_pct") or 1.0, "center") if shortest < 384 else (1.0, "squash")
    else:
        height, width = (size.get(side) or size.get(f"max_{side}") or 224 for side in ("height", "width"))
        crop_pct, crop_mode = 1.0, "squash"
    preprocessing = default_preprocessing((channels, height, width))
    return replace(
        preprocessing,
        mean=_by_channel(processor.get("image_mean"), preprocessing.mean),
        std=_by_channel(processor.get("image_std"), preprocessing.std),
        interpolation=_INTERPOLATION.get(processor.get("resample", 3), "bicubic"),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )


def _by_channel(written: float | list[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    """A number of an image processor for each channel; one number is that of all."""
    if isinstance(written, (int, float)):
        return (float(written),) * len(default)
    return tuple(written or default)
