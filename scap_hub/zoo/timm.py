"""timm models: by name, from a folder in timm's layout, or as a module that timm built."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import filter_pretrained_cfg, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

from scap_hub.errors import ModelError
from scap_hub.zoo.base import LoadedModel, Preprocessing, one_line
from scap_hub.zoo.remote import NO_NETWORK, fetch_dense

try:
    from timm.data import resolve_input_data_config
    from timm.models import get_model_args
except ImportError:  # older timm, down to 1.0.20

    def resolve_input_data_config(model: nn.Module, args: dict[str, Any]) -> dict[str, Any]:  # type: ignore[misc]
        """Without the checks of newer timm; statistics of other channels than three are averages."""
        data = resolve_data_config({key: value for key, value in args.items() if value}, model=model)
        averages = {key: (sum(data[key]) / len(data[key]),) for key in ("mean", "std")}
        return data if data["input_size"][0] == 3 else data | averages

    def get_model_args(model: nn.Module) -> dict[str, Any]:  # type: ignore[misc]
        """What `_create` noted; of a module that somebody else built, nothing is known."""
        return dict(getattr(model, "_model_args", {}))


# Arguments of timm.create_model that open files; a config.json that we rebuild from may not hold them.
_OPENS_FILES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def is_name(name: str) -> bool:
    """Whether timm's registry knows the architecture, whatever its tag."""
    return timm.is_model(split_model_name_tag(name)[0])


def is_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is in timm's layout."""
    return "architecture" in config and "model_type" not in config


def is_module(module: nn.Module) -> bool:
    """Whether timm built the module; what is pruned already counts as its owner's."""
    architecture = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
    return architecture not in (None, "scap_pruned")


def unknown_name(name: str) -> ModelError:
    """The error for a name that is no timm model, with the nearest names."""
    known = timm.list_models() + timm.list_modules()
    near = dict.fromkeys(difflib.get_close_matches(split_model_name_tag(name)[0], known, n=3))
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see timm.list_models();"
    return ModelError(f"unknown model {name!r}: {hint} A Hub id has the form 'owner/name'.")


def from_name(
    name: str, pretrained: bool, num_classes: int | None, input_size: tuple[int, int, int] | None
) -> LoadedModel:
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
    if pretrained and cfg.hf_hub_id:
        # Given a file, timm skips its own download, which without a network takes 47 s to fail.
        overlay = {"file": str(min(fetch_dense(cfg.hf_hub_id, pretrained).glob("*model.*")))}
    arguments = _input_arguments(cfg.to_dict(), input_size)
    module = _create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=num_classes, **arguments)
    module.pretrained_cfg.pop("file", None)
    loaded = from_module(module, name, input_size)
    if pretrained:
        loaded.base_model, loaded.license = cfg.hf_hub_id, cfg.license
    return loaded


def from_folder(
    folder: Path,
    config: dict[str, Any],
    source: str,
    pretrained: bool,
    num_classes: int | None,
    input_size: tuple[int, int, int] | None,
) -> LoadedModel:
    """Builds a model from a folder with a timm config.json.

    Raises:
        ModelError: Unknown architecture, or weights that are absent or do not fit.
    """
    if not is_name(config["architecture"]):
        raise unknown_name(config["architecture"])
    arguments = _input_arguments(config.get("pretrained_cfg", config), input_size)
    module = _create(f"local-dir:{folder}", pretrained=pretrained, num_classes=num_classes, **arguments)
    return from_module(module, source, input_size)


def from_module(module: Any, source: str, input_size: tuple[int, int, int] | None = None) -> LoadedModel:
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
        library="timm",
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
    arguments = config["model_args"]
    if opens := _OPENS_FILES & arguments.keys():
        raise ModelError(f"model_args in config.json would open files ({', '.join(sorted(opens))}): remove them")
    return _create(
        config["architecture"],
        pretrained=False,
        pretrained_cfg=config["pretrained_cfg"],
        num_classes=config["num_classes"],
        **arguments,
    )


def _create(name: str, **arguments: Any) -> Any:
    try:
        model: Any = timm.create_model(name, **arguments)
        if not hasattr(model, "_model_args"):  # timm before 1.0.31 does not keep them
            skipped = _OPENS_FILES | {"num_classes"}
            model._model_args = {k: v for k, v in arguments.items() if k not in skipped and v is not None}
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
    return getattr(head, "out_features", None) or getattr(head, "out_channels", None) or module.num_classes


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
        "num_features": module.num_features,
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }
    # An argument that JSON cannot hold shows by its repr, and then fails to rebuild with that in the message.
    return json.loads(json.dumps(document, default=repr))
