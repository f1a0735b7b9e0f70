"""What a run starts from: the dense model, and the data as that model wants it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scap_hub.channels.part import offered
from scap_hub.errors import CalibrationError, DataError, ModelError, RecipeError
from scap_hub.placement import fed, placement
from scap_hub.private import versioned
from scap_hub.progress import track
from scap_hub.recipe import DataSettings, ModelSettings, Recipe
from scap_hub.run.deploying import check_deploy, check_export
from scap_hub.run.parts import LoadedPart, check_part, on_part
from scap_hub.run.selecting import for_the_runtime
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import Tuning
from scap_hub.tasks import Outputs, Task, task_named, task_of
from scap_hub.training.data import Data, load_data
from scap_hub.training.data.classes import WITHOUT_LABELS, NewHead
from scap_hub.training.data.first import image_size
from scap_hub.training.data.sources import ensure_there
from scap_hub.training.distributed import accelerator, main_first
from scap_hub.training.feed import steps_at_ends
from scap_hub.zoo import LoadedModel, load_model
from scap_hub.zoo.registry import PLAIN, zoo_of

CALIBRATION_SET = "timm/mini-imagenet"
"""Small public set for models trained on ImageNet or a superset of it; used without its labels."""
_IMAGENET_CLASSES = (1000, 1001, 11821, 21841, 21843)


def recipe_of(
    model: Any,
    dataset: Any,
    recipe: Any,
    overrides: Mapping[str, Any],
    checkpoint: str | Path | None = None,
    task: str | Task | None = None,
) -> Recipe:
    """The recipe of a call of `prune`, with the names of model, data, checkpoint and task in it.

    Raises:
        RecipeError: Unknown recipe, key or value.
    """
    names = {"model_name": model, "data_dataset": dataset, "model_checkpoint": checkpoint, "task": task}
    given = {key: str(name) for key, name in names.items() if isinstance(name, str | Path)}
    resolved = Recipe.resolve(recipe, **{**overrides, **given})
    check_deploy(resolved.deploy)
    check_part(resolved, task)
    return for_the_runtime(resolved)


def load_dense(
    model: Any, dataset: Any, recipe: Recipe, stages: Stages, task: str | Task | None = None
) -> tuple[LoadedModel, Data, Tuning]:
    """The dense model as it comes, its data, and how it shall be trained before it is pruned.

    Args:
        model: As for `prune`.
        dataset: As for `prune`.
        recipe: Its blocks `model`, `data` and `finetune`; what it exports is tried.
        stages: Where the seconds are counted.
        task: As for `prune`; the recipe's if left out.
    """
    with stages("load"):
        loaded, data, tuning = _loaded(model, dataset, recipe, task)
        check_export(loaded, data, recipe)
        if recipe.model.part is not None:
            loaded, data = on_part(loaded, data, recipe.model.part)
    if tuning.trains(recipe.finetune):
        steps_at_ends(data.train, recipe.finetune.lasting(1))  # what cannot be trained on is told before any work
    return loaded, data, tuning


def _loaded(model: Any, dataset: Any, recipe: Recipe, task: str | Task | None) -> tuple[LoadedModel, Data, Tuning]:
    """Both, fitted to each other: the model gets a new head, or names of its classes, from the data."""
    settings = recipe.model
    source = settings.name if model is None else model
    if source is None:
        raise RecipeError("no model; pass a name or a module, or set model.name in the recipe")
    wanted = recipe.data.dataset if dataset is None else dataset
    if isinstance(wanted, str | Path):
        main_first(lambda: ensure_there(str(wanted), recipe.data))  # a typo is told before a model is downloaded
    if isinstance(source, nn.Module):
        source = copy.deepcopy(source)  # the caller's stays as it is, on its own device
    if recipe.task is not None:
        task_named(recipe.task)  # likewise
    splits = wanted if isinstance(wanted, Mapping) else {"the data set": wanted}
    sizes = {split: image_size(source, recipe.seed) for split, source in splits.items()}
    images = next(iter(sizes.values()), None) if settings.input_size is None else None
    loaded, settings = _of_the_images(source, images, settings, recipe.task)
    _warn_of_sizes(sizes, loaded.preprocessing.input_size)
    wanted_task = _task_for(loaded, recipe, task)
    data = data_for(loaded, dataset, recipe, wanted_task)
    new_head = False
    if data.labels and len(data.labels) != loaded.num_classes:
        loaded, new_head = _with_head(source, data, loaded, settings), True
    elif settings.num_classes is not None and _from_the_zoo(source, settings):
        new_head = load_model(source, False, None, settings.input_size).num_classes != settings.num_classes
    if data.labels and len(data.labels) == loaded.num_classes:
        loaded = replace(loaded, labels=data.labels)
    return loaded, data, Tuning.of(recipe.finetune, new_head)


def _warn_of_sizes(sizes: Mapping[str, tuple[int, int, int] | None], size: tuple[int, int, int]) -> None:
    """Warns of tensors that the model is measured with, and that are of another size than its MACs are of."""
    for split, images in sizes.items():
        if images is not None and images[1:] != size[1:]:
            theirs, ours = (f"{height}x{width}" for _, height, width in (images, size))
            warnings.warn(
                f"the images of {split} are {theirs} pixels, and MACs, latency and what is published are of {ours}: "
                f"give images of one size, or set model.input_size={[*images]} if the model is for theirs",
                stacklevel=2,
            )


def _of_the_images(
    source: Any, images: tuple[int, int, int] | None, settings: ModelSettings, task: str | None
) -> tuple[LoadedModel, ModelSettings]:
    """The model, for images of the size that is set, or else of that of the caller's tensors, and settings that say so.

    Tensors are not resized, so all that depends on a size (MACs, latency, what is published) has to be of theirs.

    Args:
        source: The module, or the name of a model.
        images: (C, H, W) of the tensors that a caller hands over; None where a size is set, or images get the model's.
        settings: The recipe's block `model`.
        task: What it is for, where the recipe says it.
    """

    def load(size: tuple[int, int, int] | None) -> LoadedModel:
        return load_model(
            source, settings.pretrained, settings.num_classes, size, checkpoint=settings.checkpoint, task=task
        )

    known = settings.input_size
    if known is None and isinstance(source, nn.Module) and zoo_of(source) is PLAIN:
        known = images  # nobody else knows how many channels they have
    loaded = load(known)
    own = loaded.preprocessing.input_size
    if images in (None, known, own) or images[0] != own[0]:  # other channels are told later
        return loaded, settings
    return load(images), settings.model_copy(update={"input_size": images})


def _task_for(loaded: LoadedModel, recipe: Recipe, asked: str | Task | None) -> Task:
    """What the model is for; where a part of it is pruned, that matters if the whole can be trained by it afterwards.

    Raises:
        ModelError: All of it is to be pruned, and only a part can be.
    """
    if recipe.model.part is not None:
        # Else outputs, of the part: the whole may return what has no row for each image.
        found = task_of(loaded) if loaded.zoo.task(loaded.module) is not None else Outputs()
        return found if found.by_part else Outputs()
    found = task_of(loaded, recipe.task if asked is None else asked)
    if found.by_part:
        images = torch.zeros(1, *loaded.preprocessing.input_size)
        raise ModelError(
            f"{loaded.name} chooses boxes by their scores, so that all of it cannot be recorded"
            f"{offered(loaded.module, (fed(loaded.module, images),))}"
        )
    return found


def _from_the_zoo(source: Any, settings: ModelSettings) -> bool:
    """Whether the weights are those that a name stands for."""
    return settings.pretrained and settings.checkpoint is None and not isinstance(source, nn.Module)


def _with_head(source: Any, data: Data, loaded: LoadedModel, settings: ModelSettings) -> LoadedModel:
    """The model with a new classifier for the data's classes."""
    assert data.labels is not None
    if isinstance(source, nn.Module):
        count = len(data.labels)
        raise DataError(
            f"{data.name!r} has {count} classes, the module's classifier {loaded.num_classes}: give it a new one of "
            f"{count} first, which finetune.dense_epochs=5 trains, or set {WITHOUT_LABELS}"
        )
    headed = load_model(
        source, _from_the_zoo(source, settings), len(data.labels), settings.input_size, task=data.task.name
    )
    if settings.checkpoint is not None:
        state, known = headed.module.state_dict(), loaded.module.state_dict()
        fitting = {name: known[name] for name, tensor in state.items() if known[name].shape == tensor.shape}
        headed.module.load_state_dict(versioned(headed.module, state | fitting))
    return headed


def data_for(loaded: LoadedModel, dataset: Any, recipe: Recipe, task: Task) -> Data:
    """The data as the model wants it for a task; the recipe's seed chooses the calibration images."""
    choices = recipe.data
    if isinstance(loaded, LoadedPart):
        loaded = loaded.whole
    if dataset is None and choices.dataset is None:
        choices = _public_images(loaded, choices)
    return load_data(
        dataset,
        loaded.preprocessing,
        choices,
        num_classes=loaded.num_classes,
        new_head=recipe.model.num_classes is None and _new_head(recipe.finetune.dense_epochs),
        seed=recipe.seed,
        task=task,
        model_classes=loaded.labels,
        pixels=loaded.zoo.pixels(loaded),
    )


def _new_head(dense_epochs: int | Literal["auto"]) -> NewHead:
    return dense_epochs if dense_epochs == "auto" else dense_epochs > 0


def _public_images(loaded: LoadedModel, settings: DataSettings) -> DataSettings:
    """Data settings for a model that was given no data: images of what it was trained on."""
    if loaded.num_classes not in _IMAGENET_CLASSES or loaded.preprocessing.input_size[0] != 3:
        raise DataError(
            f"{loaded.name} with {loaded.num_classes} classes was given no data set, and no public one is known to fit "
            "it; pass dataset=..., unlabelled images like those that it was trained on suffice"
        )
    return settings.model_copy(update={"dataset": CALIBRATION_SET, "streaming": True, "labels": False})


def shard_calibration(data: Data, batch_size: int) -> list[Tensor]:
    """This process's calibration images in batches, kept for the whole run; every image is on exactly one process."""
    here = accelerator()
    batches = (batch[0] for batch in track(data.calibration, "calibration images"))
    found = [data.task.inputs(images) for images in batches if len(images)]
    images = torch.cat(found) if found else torch.empty(0)
    if len(images) < here.num_processes:
        raise CalibrationError(
            f"{len(images)} calibration images cannot be shared out over {here.num_processes} processes: give more"
        )
    return list(images[here.process_index :: here.num_processes].split(batch_size))


def example(model: nn.Module, loaded: LoadedModel, images: int = 1) -> Tensor:
    """Zeros in the shape of so many images, (images, C, H, W), where the model is."""
    device, dtype = placement(model)
    return torch.zeros(images, *loaded.preprocessing.input_size, device=device, dtype=dtype)
