"""timm as a zoo: what it recognises, its config.json, its doors. timm itself is imported when a model is built."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from scap_hub.errors import CheckpointError, ModelError
from scap_hub.zoo.auto import auto_door, auto_map
from scap_hub.zoo.base import FORMAT, LOCAL, Door, LoadedModel, Uniform, Wanted, Zoo
from scap_hub.zoo.described import Shape, Widths
from scap_hub.zoo.timm.uniform import width_arguments
from scap_hub.zoo.timm.widths import TimmFeatures, timm_features, timm_widths

ARCHITECTURE = "scap_pruned"
"""The name of pruned models in timm's registry."""


class TimmZoo(Zoo):
    """Models of timm: by name, from a folder in timm's layout, or as a module that timm built."""

    name = "timm"

    def knows_name(self, name: str) -> bool:
        """Whether timm's registry knows the architecture, whatever its tag."""
        from scap_hub.zoo.timm import build

        return build.is_name(name)

    def nearest(self, name: str) -> list[str]:
        """The nearest architectures."""
        from scap_hub.zoo.timm import build

        return build.nearest(name)

    def knows_config(self, config: Mapping[str, Any]) -> bool:
        """Whether it has timm's way to name an architecture, and not transformers'."""
        return "architecture" in config and "model_type" not in config

    def knows_module(self, module: nn.Module) -> bool:
        """Whether timm built the module."""
        cfg = getattr(module, "pretrained_cfg", None)
        return "timm" in sys.modules and isinstance(cfg, dict) and cfg.get("architecture") is not None

    def from_name(self, name: str, wanted: Wanted) -> LoadedModel:
        """A model of timm's registry, with its tag's weights."""
        from scap_hub.zoo.timm import build

        return build.from_name(self, name, wanted)

    def from_folder(self, folder: Path, config: dict[str, Any], source: str, wanted: Wanted) -> LoadedModel:
        """A model from a folder with a timm config.json."""
        from scap_hub.zoo.timm import build

        return build.from_folder(self, folder, config, source, wanted)

    def from_module(self, module: nn.Module, source: str, input_size: tuple[int, int, int] | None) -> LoadedModel:
        """A model that timm built."""
        from scap_hub.zoo.timm import build

        return build.from_module(self, module, source, input_size)

    def describe(
        self,
        module: nn.Module,
        config: dict[str, Any],
        processor: dict[str, Any] | None,
        source: str,
        input_size: tuple[int, int, int] | None,
    ) -> LoadedModel:
        """As any model; one that takes images of one size alone was built for it."""
        from scap_hub.zoo.timm import build

        cfg: Any = config["pretrained_cfg"]
        with build.malformed_told():
            fits = not (input_size and cfg.get("fixed_input_size")) or tuple(cfg["input_size"]) == tuple(input_size)
        if not fits:
            raise ModelError(
                f"{source} takes images of {cfg['input_size']} alone, not {input_size}: set the size before"
            )
        return self.from_module(module, source, input_size)

    def rebuild(self, config: dict[str, Any]) -> nn.Module:
        """An untrained model from timm's config.json layout."""
        from scap_hub.zoo.timm import build

        if config.get("architecture") == ARCHITECTURE:
            raise ModelError("timm does not tell what it was pruned from; scap_hub.load does")
        return build.rebuild(config)

    def same(self, loaded: LoadedModel) -> bool:
        """Whether it computes the same, where timm does not note what the module was made with."""
        from scap_hub.zoo.timm import build

        return build.same(loaded)

    def unlike(self, name: str) -> str:
        """Also what an older timm does not know of a module: the arguments that it was made with."""
        from scap_hub.zoo.timm.private import NOTES_ARGUMENTS

        unknown = "" if NOTES_ARGUMENTS else ", or was made with arguments, which timm notes since 1.0.31"
        return super().unlike(name) + unknown

    def task(self, module: nn.Module) -> str | None:
        """Classification, unless it has no classifier."""
        from scap_hub.zoo.timm import build

        return build.task_of(module)

    def write_config(
        self,
        config: dict[str, Any],
        entry: dict[str, Any],
        cut: dict[str, Any] | None,
        loaded: LoadedModel,
        model: nn.Module,
    ) -> dict[str, Any]:
        """The cut lies in `model_args`: timm and its wrapper in transformers hand nothing else on."""
        config = dict(config)
        if loaded.labels:
            config["label_names"] = loaded.labels
        if cut is not None:
            config["model_args"] = {"base": config["architecture"], **config["model_args"], "cut": cut}
            config["architecture"] = ARCHITECTURE
            config["num_features"] = cut["attributes"].get("", {}).get("num_features", config["num_features"])
            if wrapper := _wrapper(loaded):
                config["auto_map"] = auto_map(*wrapper)
            if config["model_args"].pop("features_only", False):  # of a user, it asks for features of a whole model
                config["model_args"]["wrapped"] = True
        return {**config, "scap": entry}

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The base's own name and arguments, without the cut."""
        dense = {key: value for key, value in config.items() if key not in ("scap", "auto_map")}
        try:
            arguments = dict(dense["model_args"])
            for ours in ("cut", "num_classes"):
                arguments.pop(ours, None)
            if dense["architecture"] == ARCHITECTURE:
                dense["architecture"] = arguments.pop("base")
            if arguments.pop("wrapped", False):
                arguments["features_only"] = True
            dense["model_args"] = arguments
            labels = {"label_names": dense["label_names"]} if "label_names" in dense else {}
            dense["pretrained_cfg"] = dense["pretrained_cfg"] | labels
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json lacks what it takes to rebuild a timm model: {error!r}") from None
        return dense

    def cut_in(self, config: dict[str, Any]) -> Any:
        """The cut among the constructor's arguments."""
        arguments = config.get("model_args")
        return arguments.get("cut") if isinstance(arguments, dict) else None

    def lost_entry(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Timm saves no entries but its own; the name of the architecture and the input size are among these."""
        if config.get("architecture") != ARCHITECTURE:
            return None
        return {"version": FORMAT, "library": self.name, "preprocessing": config.get("pretrained_cfg")}

    def doors(self, place: str, loaded: LoadedModel) -> list[Door]:
        """Timm's own, and its wrapper in transformers."""
        wrapper = _wrapper(loaded)
        option = "" if wrapper else ", features_only=True"
        own = Door("import timm", f'model = timm.create_model("{LOCAL}{place}", pretrained=True{option})')
        return [own, *(auto_door(place, name) for name in (wrapper.auto_classes if wrapper else ()))]

    def features(self, model: nn.Module, inputs: tuple[Any, ...]) -> TimmFeatures:
        """The shapes that timm's conventions describe."""
        return timm_features(model, inputs)

    def widths(self, model: nn.Module, dense: Any, small: Any) -> Widths:
        """`num_features`, `head_hidden_size`, `feature_info` and those of blocks."""
        return timm_widths(model, dense, small)

    def uniform(self, loaded: LoadedModel, shapes: Mapping[str, Shape]) -> Uniform | None:
        """Widths as arguments of the architecture's constructor."""
        arguments = width_arguments(type(loaded.module).__name__, shapes)
        if arguments is None:
            return None
        config = {**loaded.config, "model_args": {**loaded.config["model_args"], **arguments}}
        model: Any = self.rebuild(config)
        return Uniform(arguments, {**config, "num_features": model.num_features}, model)


class _Wrapper(NamedTuple):
    """The class of transformers that wraps a model of timm's, and the auto classes that stand for it."""

    model_class: str
    auto_classes: tuple[str, ...]


def _wrapper(loaded: LoadedModel) -> _Wrapper | None:
    """None for what timm itself has wrapped for its features, which transformers cannot read."""
    if loaded.config["model_args"].get("features_only"):
        return None
    if loaded.config["num_classes"]:
        return _Wrapper("TimmWrapperForImageClassification", ("AutoModelForImageClassification",))
    return _Wrapper("TimmWrapperModel", ("AutoModel",))
