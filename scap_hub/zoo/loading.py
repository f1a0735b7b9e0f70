"""Models of every zoo, loaded and rebuilt through one call."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.errors import ModelError, ScapHubError
from scap_hub.files import path_of
from scap_hub.markdown import metadata
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan
from scap_hub.zoo.base import LoadedModel, Wanted, first_difference, remembered
from scap_hub.zoo.building import skeleton
from scap_hub.zoo.checkpoint_file import load_weights
from scap_hub.zoo.pruned import read_pruned, resized
from scap_hub.zoo.registry import PLAIN, nearest, pruned_entry, zoo_named, zoo_of, zoo_of_config, zoo_with_name


def load_model(
    model: str | Path | nn.Module,
    pretrained: bool = True,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    labels: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    task: str | None = None,
) -> LoadedModel:
    """Loads a vision model with all that is needed to feed, rebuild and publish it.

    Args:
        model: A name that a zoo knows (timm's "resnet18.a1_in1k"), a Hub id or local folder of a model that one
            knows (also as "hf-hub:owner/name@revision" or "local-dir:folder"), dense or pruned, or an nn.Module.
        pretrained: Whether to load weights; of no effect on an nn.Module.
        num_classes: Width of the classifier; a new head where the weights have another. By default len(labels).
        input_size: (C, H, W) in pixels, instead of the model's own.
        labels: Class names by index, instead of the model's own.
        checkpoint: File with the weights, instead of those that the model comes with; a module gets them in place.
        task: What a model given by name shall be for, with a new head if need be; by default what its weights are for.

    Returns:
        The model in eval mode, and its description. A module that its zoo would not rebuild as it is is described
        as its owner's own, with a warning.

    Raises:
        ModelError: Unknown name, no network for it, or arguments that do not fit the model.
    """
    if num_classes is None and labels is not None:
        num_classes = len(labels)
    if isinstance(model, nn.Module):
        loaded = _checked(_described(model, input_size))
    else:
        wanted = Wanted(pretrained and checkpoint is None, num_classes, input_size, task)
        loaded = _checked(_from_name(str(model), wanted))
    if num_classes not in (None, loaded.num_classes):
        raise ModelError(
            f"{loaded.name} has {loaded.num_classes} classes, not {num_classes}: give it a new head first, "
            "or pass the model by name"
        )
    if checkpoint is not None:
        load_weights(loaded.module, checkpoint)
    if labels is not None:
        if len(labels) != loaded.num_classes:
            raise ModelError(f"{len(labels)} labels for {loaded.num_classes} classes: give one label a class")
        loaded.labels = list(labels)
    return loaded


def _from_name(name: str, wanted: Wanted) -> LoadedModel:
    from scap_hub.zoo.remote import fetch_dense  # huggingface_hub is slow to import

    prefix, _, rest = name.partition(":")
    place = rest if prefix in ("hf-hub", "hf_hub", "local-dir") else name
    if place == name and (zoo := zoo_with_name(name)):
        return zoo.from_name(name, wanted)
    folder, base_model = path_of(place), None
    if folder.is_file():
        raise ModelError(
            f"{name!r} is a file: a saved model is given as its folder, and a file of weights as checkpoint= "
            "(--checkpoint) beside the name of its model"
        )
    if not folder.is_dir():
        if prefix == "local-dir":
            raise ModelError(f"no folder {place!r}")
        if place == name and "/" not in name:
            near = " or ".join(map(repr, nearest(name)))
            hint = f"did you mean {near}?" if near else "see timm.list_models()."
            raise ModelError(f"unknown model {name!r}: {hint} A Hub id has the form 'owner/name'.")
        base_model, _, revision = place.partition("@")
        folder = fetch_dense(base_model, wanted.pretrained, revision or None)
    config = _read_config(folder, name)
    if pruned_entry(config) is not None:
        return _pruned(folder, name, wanted)
    loaded = zoo_of_config(config).from_folder(folder, config, name, wanted)
    return replace(loaded, base_model=base_model if wanted.pretrained else None, license=_license(folder))


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{name!r} has no config.json: it is no model of a known zoo") from None
    except ValueError as error:
        raise ModelError(f"config.json of {name!r} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {name!r} is no JSON object, but {json.dumps(config)[:40]}")
    return config


def _pruned(folder: Path, name: str, wanted: Wanted) -> LoadedModel:
    """A pruned model as it lies there."""
    try:
        loaded = replace(read_pruned(folder, wanted), source=name)
    except ScapHubError as error:
        raise ModelError(f"{name!r} is already pruned, and cannot be opened to be pruned further: {error}") from None
    if wanted.num_classes not in (None, loaded.num_classes):
        raise ModelError(
            f"{name!r} is already pruned, with {loaded.num_classes} classes, not {wanted.num_classes}: give the dense "
            "model a new head, and prune that"
        )
    return loaded


def _described(module: nn.Module, input_size: tuple[int, int, int] | None) -> LoadedModel:
    """A module that the caller has."""
    known = remembered(module)
    if known is None:
        return zoo_of(module).from_module(module, type(module).__name__, input_size)
    loaded = LoadedModel(module=module.eval(), **{**known, "zoo": zoo_named(known["zoo"])})
    return loaded if input_size is None else resized(loaded, input_size)


def _license(folder: Path) -> str | None:
    readme = folder / "README.md"
    found = metadata(readme.read_text("utf-8", "replace"))[0].get("license") if readme.is_file() else None
    return found if isinstance(found, str) else None


def _altered(loaded: LoadedModel) -> str | None:
    """Where a module is not what its description says; None if it is."""
    if not loaded.zoo.rebuilds:
        path = _other_shape(loaded.module, loaded.earlier) if loaded.earlier else None
        return path and f"its {path!r} is not what pruning left"
    copy = skeleton(loaded.zoo, loaded.config)
    path = first_difference(loaded.module, apply_plan(copy, loaded.earlier) if loaded.earlier else copy)
    if path is None and (loaded.earlier or loaded.zoo.same(loaded)):
        return None
    return f"its {path or 'forward pass'!r} {loaded.zoo.unlike(loaded.name)}"


def _other_shape(module: nn.Module, plan: PruningPlan) -> str | None:
    """The first tensor that has not the shape that a plan leaves."""
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    return next((name for name in plan.tensors if shapes.get(name) != plan.left(name)), None)


def _checked(loaded: LoadedModel) -> LoadedModel:
    """Makes sure now, not after hours of work, that the config rebuilds the model."""
    if not loaded.zoo.rebuilds and loaded.earlier is None:
        return loaded
    try:
        reason = _altered(loaded)
    except ScapHubError as error:
        reason = str(error)
    if not reason:
        return loaded
    warnings.warn(
        f"{loaded.name} can be pruned, but not rebuilt by name ({reason}): pass it by name, "
        "or reload the result with scap_hub.load(folder, model=<the dense model>)",
        stacklevel=3,
    )
    # Something was changed, so the zoo's config is no longer true: ask the module itself.
    plain = PLAIN.from_module(loaded.module, loaded.source, loaded.preprocessing.input_size)
    labels = loaded.labels if plain.num_classes == loaded.num_classes else None
    return replace(
        plain,
        preprocessing=loaded.preprocessing,
        labels=labels,
        config={"reason": reason},
        image_processor=loaded.image_processor,
    )
