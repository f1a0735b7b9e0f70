"""transformers as a zoo: what it recognises, its config.json, its doors. It is imported when a model is built."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.placement import placement
from scap_hub.zoo.auto import auto_door, auto_map, class_door
from scap_hub.zoo.base import Door, LoadedModel, Pixels, Uniform, Wanted, Zoo
from scap_hub.zoo.described import Shape, Widths
from scap_hub.zoo.transformers.uniform import width_arguments
from scap_hub.zoo.transformers.widths import TransformersFeatures, transformers_features, transformers_widths


class TransformersZoo(Zoo):
    """Models of transformers: from a folder in its layout, or as a PreTrainedModel."""

    name = "transformers"
    shards = True

    def knows_config(self, config: Mapping[str, Any]) -> bool:
        """Any: of old repositories transformers reads the kind of model off their name. To be asked last."""
        return True

    def knows_module(self, module: nn.Module) -> bool:
        """Whether the module is one of transformers' models."""
        modeling: Any = sys.modules.get("transformers.modeling_utils")
        return modeling is not None and isinstance(module, modeling.PreTrainedModel)

    def from_folder(self, folder: Path, config: dict[str, Any], source: str, wanted: Wanted) -> LoadedModel:
        """A model from a folder with a transformers config.json; remote code is refused."""
        from scap_hub.zoo.transformers import build

        return build.from_folder(self, folder, source, wanted)

    def from_module(self, module: nn.Module, source: str, input_size: tuple[int, int, int] | None) -> LoadedModel:
        """One of transformers' models."""
        from scap_hub.zoo.transformers import build

        name: Any = module
        return build.from_module(self, module, source, input_size, build.image_processor(name.name_or_path))

    def describe(
        self,
        module: nn.Module,
        config: dict[str, Any],
        processor: dict[str, Any] | None,
        source: str,
        input_size: tuple[int, int, int] | None,
    ) -> LoadedModel:
        """With the image processor that lies beside the weights."""
        from scap_hub.zoo.transformers import build

        return build.from_module(self, module, source, input_size, processor)

    def rebuild(self, config: dict[str, Any]) -> nn.Module:
        """An untrained model of the class that `architectures` names."""
        from scap_hub.zoo.transformers import build

        return build.rebuild(config)

    def task(self, module: nn.Module) -> str | None:
        """By transformers' own lists."""
        from scap_hub.zoo.transformers.tasks import task_of

        return task_of(type(module))

    def pixels(self, loaded: LoadedModel) -> Pixels | None:
        """Those of the image processor."""
        from scap_hub.zoo.transformers.processor import processor_pixels

        return processor_pixels(loaded.image_processor, loaded.preprocessing) if loaded.image_processor else None

    def makes_other_sizes(self, loaded: LoadedModel) -> bool:
        """Seen by using it: some keep the proportions of images, pad them or do not resize them."""
        from scap_hub.zoo.transformers.processor import makes_other_sizes

        document = loaded.image_processor
        return document is not None and makes_other_sizes(document, loaded.preprocessing.input_size)

    def write_config(
        self,
        config: dict[str, Any],
        entry: dict[str, Any],
        cut: dict[str, Any] | None,
        loaded: LoadedModel,
        model: nn.Module,
    ) -> dict[str, Any]:
        """Transformers hands all of its config on, so the cut lies in our entry."""
        config = {**config, "dtype": str(placement(model).dtype).removeprefix("torch.")}
        if loaded.labels:
            config["id2label"] = dict(enumerate(loaded.labels))
            config["label2id"] = {label: index for index, label in enumerate(loaded.labels)}
        if cut is None:
            return {**config, "scap": entry}
        from scap_hub.zoo.transformers.doors import auto_classes

        if autos := auto_map(loaded.name, auto_classes(model)):
            config["auto_map"] = autos
        return {**config, "scap": {**entry, "cut": cut}}

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """All but what we added."""
        return {key: value for key, value in config.items() if key not in ("scap", "auto_map")}

    def doors(self, place: str, loaded: LoadedModel) -> list[Door]:
        """The auto classes that build it, or else its own class."""
        from scap_hub.zoo.transformers.doors import auto_classes

        return [auto_door(place, name) for name in auto_classes(loaded.module)] or [class_door(place, loaded.name)]

    def features(self, model: nn.Module, inputs: tuple[Any, ...]) -> TransformersFeatures:
        """The shapes that transformers' conventions describe."""
        return transformers_features(model, inputs)

    def widths(self, model: nn.Module, dense: Any, small: Any) -> Widths:
        """Sizes in the config, `num_features` of a backbone, and those of blocks."""
        return transformers_widths(model, dense, small)

    def uniform(self, loaded: LoadedModel, shapes: Mapping[str, Shape]) -> Uniform | None:
        """Widths as entries of the config."""
        arguments = width_arguments(type(loaded.module).__name__, shapes)
        if arguments is None:
            return None
        config = {**loaded.config, **arguments}
        return Uniform(arguments, config, self.rebuild(config))
