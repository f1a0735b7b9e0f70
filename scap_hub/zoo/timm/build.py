"""Builds timm's models and describes them; imports timm."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import filter_pretrained_cfg, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

from scap_hub.errors import ModelError
from scap_hub.placement import placement
from scap_hub.private import tree_leaves
from scap_hub.text import did_you_mean, one_line
from scap_hub.zoo.base import LoadedModel, Preprocessing, Wanted, Zoo
from scap_hub.zoo.remote import NO_NETWORK, fetch_dense
from scap_hub.zoo.timm.private import arguments_known, get_model_args, note_model_args, resolve_input_data_config

# Arguments of timm.create_model that open files; a config.json that we rebuild from may not hold them.
_OPENS_FILES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def is_name(name: str) -> bool:
    """Whether timm's registry knows the architecture, whatever its tag."""
    return timm.is_model(split_model_name_tag(name)[0])


def nearest(name: str) -> list[str]:
    """Up to three architectures that an unknown name may have meant, the nearest first."""
    known = timm.list_models() + timm.list_modules()
    return list(dict.fromkeys(difflib.get_close_matches(split_model_name_tag(name)[0], known, n=3)))


CLASSES, FEATURES = "image-classification", "image-feature-extraction"
"""The tasks of models with and without a classifier."""


def task_of(module: Any) -> str:
    """What a model is for."""
    return CLASSES if _num_classes(module) else FEATURES


def from_name(zoo: Zoo, name: str, wanted: Wanted) -> LoadedModel:
    """Builds a model of timm's registry, with its tag's weights.

    Raises:
        ModelError: Unknown tag, no such weights, or no network for them.
    """
    architecture, tag = split_model_name_tag(name)
    try:
        cfg = resolve_pretrained_cfg(architecture, tag)
    except RuntimeError:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise ModelError(f"{architecture!r} has no weights {tag!r}; it has: {', '.join(tags) or 'none'}") from None
    overlay = None
    if wanted.pretrained and cfg.hf_hub_id:
        # Given a file, timm skips its own download, which without a network takes 47 s to fail.
        overlay = {"file": str(min(fetch_dense(cfg.hf_hub_id, pretrained=True).glob("*model.*")))}
    module = _create(
        name,
        pretrained=wanted.pretrained,
        pretrained_cfg_overlay=overlay,
        num_classes=0 if wanted.task == FEATURES else wanted.num_classes,
        **_input_arguments(cfg.to_dict(), wanted.input_size),
    )
    module.pretrained_cfg.pop("file", None)
    loaded = from_module(zoo, module, name, wanted.input_size)
    if wanted.pretrained:
        loaded.base_model, loaded.license = cfg.hf_hub_id, cfg.license
    return loaded


def from_folder(zoo: Zoo, folder: Path, config: dict[str, Any], source: str, wanted: Wanted) -> LoadedModel:
    """Builds a model from a folder with a timm config.json.

    Raises:
        ModelError: Unknown architecture, or weights that are absent or do not fit.
    """
    architecture = config["architecture"]
    if not is_name(architecture):
        raise ModelError(
            f"config.json of {source!r} names the unknown model {architecture!r}"
            f"{did_you_mean(architecture, nearest(architecture)) or ': upgrade timm'}"
        )
    module = _create(
        f"local-dir:{folder}",
        pretrained=wanted.pretrained,
        num_classes=0 if wanted.task == FEATURES else wanted.num_classes,
        **_input_arguments(config.get("pretrained_cfg", config), wanted.input_size),
    )
    return from_module(zoo, module, source, wanted.input_size)


@contextlib.contextmanager
def malformed_told() -> Iterator[None]:
    """Takes what fails for a fault of the config, which a stranger may have written."""
    try:
        yield
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ModelError(
            f"the preprocessing or the class names in pretrained_cfg are malformed ({one_line(error)}): save it again"
        ) from error


@malformed_told()
def from_module(zoo: Zoo, module: Any, source: str, input_size: tuple[int, int, int] | None) -> LoadedModel:
    """Describes a model that timm built.

    Raises:
        ModelError: The model does not take that input size.
    """
    try:
        data = resolve_input_data_config(module, {"input_size": input_size})
    except ValueError as error:
        raise ModelError(f"input_size {input_size}: {one_line(error)}") from None
    channels = data["input_size"][0]
    spread = {key: tuple(data[key]) * (channels // len(data[key])) for key in ("mean", "std")}
    cfg: dict[str, Any] = module.pretrained_cfg
    num_classes = _num_classes(module)
    labels = cfg.get("label_names")
    return LoadedModel(
        module=module.eval(),
        zoo=zoo,
        name=cfg["architecture"],
        source=source,
        preprocessing=Preprocessing(
            input_size=tuple(data["input_size"]),
            interpolation=data["interpolation"],
            crop_pct=data["crop_pct"],
            crop_mode=data["crop_mode"],
            **spread,
        ),
        num_classes=num_classes,
        labels=list(labels) if labels and len(labels) == num_classes else None,
        config=_config(module, num_classes, tuple(data["input_size"])),
    )


def rebuild(config: dict[str, Any]) -> nn.Module:
    """Builds an untrained model from timm's config.json layout.

    Raises:
        ModelError: Unknown architecture, or arguments that timm refuses.
    """
    arguments, name = config["model_args"], config["architecture"]
    if not isinstance(name, str) or not is_name(name) or ":" in name:
        raise ModelError(f"config.json names the unknown model {name!r}: upgrade timm")
    if not isinstance(arguments, dict) or not isinstance(config["pretrained_cfg"], dict):
        raise ModelError("model_args and pretrained_cfg in config.json are JSON objects: save the checkpoint again")
    if opens := _OPENS_FILES & arguments.keys():
        raise ModelError(f"model_args in config.json would open files ({', '.join(sorted(opens))}): remove them")
    return _create(
        name,
        pretrained=False,
        pretrained_cfg=config["pretrained_cfg"],
        num_classes=config["num_classes"],
        **arguments,
    )


def same(loaded: LoadedModel) -> bool:
    """Whether a module whose arguments nobody noted computes what its architecture's defaults do."""
    if arguments_known(loaded.module):
        return True
    place = placement(loaded.module)
    copy = rebuild(loaded.config).eval().to(*place)
    copy.load_state_dict(loaded.module.state_dict())
    image = torch.rand(1, *loaded.preprocessing.input_size, generator=torch.Generator().manual_seed(0)).to(*place)
    with torch.no_grad():
        ours, theirs = (tree_leaves(model(image)) for model in (loaded.module, copy))
    return all(map(torch.allclose, ours, theirs))


def _create(name: str, **arguments: Any) -> Any:
    try:
        model: Any = timm.create_model(name, **arguments)
        skipped = _OPENS_FILES | {"num_classes"}
        note_model_args(model, {key: value for key, value in arguments.items() if key not in skipped})
        return model
    except OSError as error:  # weights that timm itself downloads from elsewhere
        raise ModelError(f"no weights for {name!r} ({one_line(error)}): {NO_NETWORK}") from None
    except Exception as error:
        raise ModelError(f"timm cannot build {name!r}: {one_line(error)}") from error


def _input_arguments(cfg: dict[str, Any], input_size: tuple[int, int, int] | None) -> dict[str, Any]:
    """The constructor arguments for an input size; only fixed-size models have one for height and width."""
    if input_size is None:
        return {}
    channels, *size = input_size
    return {"in_chans": channels, "img_size": tuple(size) if cfg.get("fixed_input_size") else None}


def _num_classes(module: Any) -> int:
    """Width of the classifier in place, which may not be the one that timm built."""
    head = module.get_classifier() if hasattr(module, "get_classifier") else None
    width: int | None = getattr(head, "out_features", None) or getattr(head, "out_channels", None)
    return width or int(getattr(module, "num_classes", 0))


def _config(module: Any, num_classes: int, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The layout of timm's own config.json; num_classes only at the top, as transformers' wrapper passes it too."""
    arguments = get_model_args(module)
    arguments.pop("num_classes", None)
    cfg = filter_pretrained_cfg(module.pretrained_cfg, remove_source=True)
    for obsolete in ("state_dict", "label_offset", "label_names", "label_descriptions"):
        cfg.pop(obsolete, None)
    if tuple(cfg["input_size"]) != input_size:
        for other in ("test_input_size", "test_pool_size", "test_crop_pct", "pool_size"):
            cfg.pop(other, None)
    # Whatever the weights' first format was, what we save is timm's.
    cfg |= {"num_classes": num_classes, "input_size": input_size, "custom_load": False}
    document = {
        "architecture": cfg.pop("architecture"),
        "num_classes": num_classes,
        "num_features": getattr(module, "num_features", 0),
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }
    # An argument that JSON cannot hold shows by its repr, and then fails to rebuild with that in the message.
    return json.loads(json.dumps(document, default=repr))
