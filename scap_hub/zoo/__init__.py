"""Models of every zoo, loaded through one call."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scap_hub.errors import ModelError
from scap_hub.zoo import module
from scap_hub.zoo.base import Library, LoadedModel, Preprocessing, first_difference, logits
from scap_hub.zoo.remote import fetch_dense

__all__ = ["LoadedModel", "Preprocessing", "load_model", "logits", "rebuild", "skeleton"]


def load_model(
    model: str | Path | nn.Module,
    pretrained: bool = True,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    labels: Sequence[str] | None = None,
) -> LoadedModel:
    """Loads an image classifier with all that is needed to feed, rebuild and publish it.

    Args:
        model: A timm name ("resnet18.a1_in1k"), a Hub id or local folder of a timm or transformers model
            (also as "hf-hub:owner/name@revision" or "local-dir:folder"), or an nn.Module.
        pretrained: Whether to load weights; of no effect on an nn.Module.
        num_classes: Width of the classifier; a new head where the weights have another. By default len(labels).
        input_size: (C, H, W) in pixels, instead of the model's own.
        labels: Class names by index, instead of the model's own.

    Returns:
        The model in eval mode, and its description. A module that cannot be rebuilt by name is described as
        library "module", with a warning.

    Raises:
        ModelError: Unknown name, no network for it, or arguments that do not fit the model.
    """
    if num_classes is None and labels is not None:
        num_classes = len(labels)
    if isinstance(model, nn.Module):
        loaded = _checked(_from_module(model, input_size))
    else:
        loaded = _checked(_from_name(str(model), pretrained, num_classes, input_size))
    if num_classes not in (None, loaded.num_classes):
        raise ModelError(
            f"{loaded.name} has {loaded.num_classes} classes, not {num_classes}: give it a new head first, "
            "or pass the model by name"
        )
    if labels is not None:
        if len(labels) != loaded.num_classes:
            raise ModelError(f"{len(labels)} labels for {loaded.num_classes} classes: give one label a class")
        loaded.labels = list(labels)
    return loaded


def rebuild(library: Library, config: dict[str, Any]) -> nn.Module:
    """Builds an untrained copy of a model from `LoadedModel.config`; runs no code but the zoo's own.

    Raises:
        ModelError: A model that only its owner can build, or a config that the zoo refuses.
    """
    if library == "module":
        reason = config.get("reason", "it comes from no zoo")
        raise ModelError(f"the model cannot be built by name ({reason}): pass the dense one, load(folder, model=dense)")
    try:
        if library == "timm":
            from scap_hub.zoo import timm

            return timm.rebuild(config)
        from scap_hub.zoo import transformers

        return transformers.rebuild(config)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"config.json lacks what it takes to build a {library} model: {error!r}") from None


def skeleton(library: Library, config: dict[str, Any]) -> nn.Module:
    """As `rebuild`, without memory for the weights where the zoo can.

    Raises:
        ModelError: As `rebuild`.
    """
    try:
        with torch.device("meta"):
            return rebuild(library, config)
    except ModelError:
        # Some constructors compute with tensors, which have no values there.
        return rebuild(library, config)


def _from_module(model: nn.Module, input_size: tuple[int, int, int] | None) -> LoadedModel:
    from scap_hub.zoo import timm, transformers

    for zoo in (timm, transformers):
        if zoo.is_module(model):
            return zoo.from_module(model, type(model).__name__, input_size)
    return module.from_module(model, type(model).__name__, input_size)


def _from_name(
    name: str, pretrained: bool, num_classes: int | None, input_size: tuple[int, int, int] | None
) -> LoadedModel:
    from scap_hub.zoo import timm

    prefix, _, rest = name.partition(":")
    place = rest if prefix in ("hf-hub", "hf_hub", "local-dir") else name
    if place == name and timm.is_name(name):
        return timm.from_name(name, pretrained, num_classes, input_size)
    folder, base_model = Path(place).expanduser(), None
    if not folder.is_dir():
        if prefix == "local-dir":
            raise ModelError(f"no folder {place!r}")
        if place == name and "/" not in name:
            raise timm.unknown_name(name)
        base_model, _, revision = place.partition("@")
        folder = fetch_dense(base_model, pretrained, revision or None)
    config = _read_config(folder, name)
    if timm.is_config(config):
        loaded = timm.from_folder(folder, config, name, pretrained, num_classes, input_size)
    else:
        from scap_hub.zoo import transformers

        loaded = transformers.from_folder(folder, name, pretrained, num_classes, input_size)
    return replace(loaded, base_model=base_model if pretrained else None, license=_license(folder))


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{name!r} has no config.json: it is neither a timm nor a transformers model") from None
    except ValueError as error:
        raise ModelError(f"config.json of {name!r} is no JSON: {error}") from None
    if "scap" in config:
        raise ModelError(f"{name!r} is already pruned: load it with scap_hub.load({name!r}), and pass that model")
    return config


def _license(folder: Path) -> str | None:
    from huggingface_hub import ModelCard

    readme = folder / "README.md"
    return ModelCard.load(readme).data.get("license") if readme.is_file() else None


def _checked(loaded: LoadedModel) -> LoadedModel:
    """Makes sure now, not after hours of work, that the config rebuilds the model."""
    if loaded.library == "module":
        return loaded
    try:
        copy = skeleton(loaded.library, loaded.config)
        path = first_difference(loaded.module, copy)
        reason = path and f"its {path!r} is not what {loaded.library} builds for {loaded.name!r}"
    except ModelError as error:
        reason = str(error)
    if not reason:
        return loaded
    warnings.warn(
        f"{loaded.name} can be pruned, but not rebuilt by name ({reason}): pass it by name, "
        "or reload the result with scap_hub.load(folder, model=<the dense model>)",
        stacklevel=3,
    )
    # Whatever was changed, the zoo's config no longer tells: ask the module itself.
    plain = module.from_module(loaded.module, loaded.source, loaded.preprocessing.input_size)
    labels = loaded.labels if plain.num_classes == loaded.num_classes else None
    return replace(plain, preprocessing=loaded.preprocessing, labels=labels, config={"reason": reason})
