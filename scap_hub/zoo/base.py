"""What the rest of scap_hub needs to know about a model, whatever zoo it came from: `LoadedModel` and its `Zoo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch import Tensor, nn

from scap_hub.errors import ModelError
from scap_hub.plan import PruningPlan
from scap_hub.zoo.described import Features, Shape, Widths, block_widths, observed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FORMAT = 1
"""Version of our entry "scap" in config.json."""

CODE = "modeling_scap.py"
"""The file of ours that lies beside the weights, for those who load them without scap_hub."""

LOCAL, ON_HUB = "local-dir:", "hf-hub:"
"""What timm wants to read in front of a folder, and in front of a repository."""

Pixels = Callable[[Image.Image], Tensor]
"""Resizes and crops an 8-bit grey or RGB image to what a model takes: (C, H, W) uint8, not normalised."""


@dataclass(frozen=True)
class Preprocessing:
    """How the model wants its images.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: Per-channel mean, on a 0..1 scale.
        std: Per-channel standard deviation, on a 0..1 scale.
        interpolation: PIL resampling by name: "nearest", "bilinear" or "bicubic".
        crop_pct: Share of the resized image that the centre crop keeps.
        crop_mode: "center" keeps the aspect ratio and crops, "squash" resizes straight to the input size.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"


@dataclass
class LoadedModel:
    """A model with everything that is needed to feed, rebuild and publish it.

    Attributes:
        module: The model, in eval mode.
        zoo: Where it comes from, which knows how to rebuild and describe it.
        name: timm architecture name, transformers class name, or the module's class name.
        source: What the user asked for: a name, a Hub id, a folder.
        preprocessing: How to feed it.
        num_classes: Width of the classifier, 0 where there is none. Classification only.
        labels: Class names by index, None where unknown. Classification only.
        config: JSON-able document to rebuild an untrained copy, in the zoo's own config.json layout; of the dense
            model where the module was pruned before.
        image_processor: The transformers image processor's JSON-able document, None where there is none.
        base_model: Hub id of the pretrained weights, None where there are none.
        license: Licence of those weights, None where unknown.
        earlier: What was removed before from what `config` rebuilds; None if nothing was.
    """

    module: nn.Module
    zoo: Zoo
    name: str
    source: str
    preprocessing: Preprocessing
    num_classes: int
    labels: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    base_model: str | None = None
    license: str | None = None
    earlier: PruningPlan | None = None


class Wanted(NamedTuple):
    """What a model shall be, beyond its name.

    Attributes:
        pretrained: Whether to load weights.
        num_classes: Width of the classifier, None for the model's own. Classification only.
        input_size: (channels, height, width) in pixels, None for the model's own.
        task: What it shall be for, where a zoo builds models for several tasks; None for what its weights are for.
    """

    pretrained: bool = True
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    task: str | None = None


class Door(NamedTuple):
    """Code that loads a published model through a library that people use already.

    Attributes:
        imports: The import lines, without scap_hub's.
        call: The call; it works once scap_hub is imported.
        code_call: The call that works without scap_hub, as it runs the repository's `CODE`; None where there is none.
    """

    imports: str
    call: str
    code_call: str | None = None


class Uniform(NamedTuple):
    """A smaller model that the zoo built by itself, from the arguments of its own constructor.

    Attributes:
        arguments: The arguments that set the widths.
        config: The config.json that they stand in, with the zoo's own layout.
        model: What the zoo built from it.
    """

    arguments: dict[str, Any]
    config: dict[str, Any]
    model: nn.Module


class Zoo(Protocol):
    """A family of models that are built, stored and described alike: timm's, transformers', or a user's own.

    Everything that is particular to one zoo stands behind these methods; the rest of scap_hub never asks which it is.
    A new zoo is a subclass without state, given to `scap_hub.zoo.register`. It has to define `name`, `from_module` and
    `rebuild`; what the other methods do here suits a zoo that has no names, no folders, or no doors of its own.

    Attributes:
        name: As it stands in config.json under "library".
        rebuilds: Whether a model can be built from its config alone. If not, whoever loads has to give the dense model.
        shards: Whether the library reads weights that are spread over several files.
    """

    name: str
    rebuilds: bool = True
    shards: bool = False

    # Recognise.

    def knows_name(self, name: str) -> bool:
        """Whether this is the name of a model, not a folder or a Hub id."""
        return False

    def nearest(self, name: str) -> list[str]:
        """The names of models that an unknown one may have meant, the nearest first."""
        return []

    def knows_config(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is in this zoo's layout."""
        return False

    def knows_module(self, module: nn.Module) -> bool:
        """Whether this zoo built the module; must not import the library, for then it did not."""
        return False

    # Load and rebuild.

    def from_name(self, name: str, wanted: Wanted) -> LoadedModel:
        """Loads a model by a name that it knows.

        Raises:
            ModelError: No such weights, no network for them, or a model that cannot be what is wanted.
        """
        raise ModelError(f"{name!r}: the zoo {self.name!r} has no models by name")

    def from_folder(self, folder: Path, config: dict[str, Any], source: str, wanted: Wanted) -> LoadedModel:
        """Loads a dense model from a folder whose config.json it knows; `source` is what the user asked for.

        Raises:
            ModelError: As `from_name`.
        """
        raise ModelError(f"{source!r}: the zoo {self.name!r} loads no folders")

    def from_module(self, module: nn.Module, source: str, input_size: tuple[int, int, int] | None) -> LoadedModel:
        """Describes a module that it knows.

        Raises:
            ModelError: The module does not take that input size.
        """
        ...

    def describe(
        self,
        module: nn.Module,
        config: dict[str, Any],
        processor: dict[str, Any] | None,
        source: str,
        input_size: tuple[int, int, int] | None,
    ) -> LoadedModel:
        """Describes what `rebuild` built for a pruned model's folder.

        Args:
            module: The dense model.
            config: The pruned model's config.json, with our entry.
            processor: Its image processor's document, None where it has none.
            source: What the user asked for.
            input_size: (channels, height, width) in pixels, None for the model's own.

        Raises:
            ModelError: The module does not take that input size.
        """
        return self.from_module(module, source, input_size)

    def rebuild(self, config: dict[str, Any]) -> nn.Module:
        """Builds an untrained model from `LoadedModel.config`; runs no code but the zoo's own.

        Raises:
            ModelError: A config that the zoo refuses.
        """
        ...

    def same(self, loaded: LoadedModel) -> bool:
        """Whether what it rebuilds computes what the module does, where it cannot tell from the layers alone."""
        return True

    def unlike(self, name: str) -> str:
        """What to say of a module that is not what the zoo builds by its name."""
        return f"is not what {self.name} builds for {name!r}"

    def task(self, module: nn.Module) -> str | None:
        """What a module that it knows is for, by the name of the task; None where nothing says so."""
        return None

    def pixels(self, loaded: LoadedModel) -> Pixels | None:
        """How the zoo itself resizes and crops; None where `Preprocessing` says all of it."""
        return None

    def makes_other_sizes(self, loaded: LoadedModel) -> bool:
        """Whether the image processor that is saved beside a model makes other sizes than it is measured at."""
        return False

    # config.json of a pruned model.

    def write_config(
        self,
        config: dict[str, Any],
        entry: dict[str, Any],
        cut: dict[str, Any] | None,
        loaded: LoadedModel,
        model: nn.Module,
    ) -> dict[str, Any]:
        """The config.json of a pruned model.

        Args:
            config: The dense model's config; or one from which the zoo builds the pruned model by itself.
            entry: What stands under "scap" in every zoo's config.json.
            cut: The sizes that pruning left, as `modeling_scap.shrink` takes them; None for a config of that other
                kind.
            loaded: The dense model.
            model: The pruned model.
        """
        return {**config, "scap": entry if cut is None else {**entry, "cut": cut}}

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """What `rebuild` takes, out of a config.json that `write_config` made.

        Raises:
            CheckpointError: Something is missing.
        """
        return {key: value for key, value in config.items() if key != "scap"}

    def cut_in(self, config: dict[str, Any]) -> Any:
        """The cut, out of a config.json that `write_config` made with one; None if it is missing."""
        return config["scap"].get("cut")

    def lost_entry(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The entry "scap" of a pruned model whose library dropped it when it saved the model again.

        Returns:
            What can be told of it; None for a dense model.
        """
        return None

    # Doors.

    def doors(self, place: str, loaded: LoadedModel) -> list[Door]:
        """Ways into a model in a folder, besides `scap_hub.load`; `loaded` is what it was made from.

        Publishing puts the repository in its place, and `ON_HUB` in that of `LOCAL`.
        """
        return []

    # Widths that describe the model to other code.

    def features(self, model: nn.Module, inputs: tuple[Any, ...]) -> Features:
        """Runs a model once, for the shapes that `widths` compares; leaves it as it was."""
        return Features(observed(model, inputs)[0])

    def widths(self, model: nn.Module, dense: Any, small: Any) -> Widths:
        """New values of the numbers that tell other code how wide a model's features are.

        Args:
            model: The dense model.
            dense: Its features.
            small: The pruned model's features.

        Returns:
            By module path and attribute; those of `model.config` are attributes "config.NAME" of the model itself.
        """
        return block_widths(model, dense.calls, small.calls)

    # A pruned model that needs nothing of ours.

    def uniform(self, loaded: LoadedModel, shapes: Mapping[str, Shape]) -> Uniform | None:
        """Builds the model of these widths with the zoo's own constructor; whoever asks checks that it is the same.

        Args:
            loaded: The dense model.
            shapes: Of the pruned model's tensors, by name.

        Returns:
            None where it is not known which arguments set widths.

        Raises:
            ModelError: The constructor refuses them.
        """
        return None


def remember(loaded: LoadedModel) -> None:
    """Notes on a pruned module where it comes from, which nobody can tell from its layers; its copies have it too."""
    known: Any = {field.name: getattr(loaded, field.name) for field in fields(loaded) if field.name != "module"}
    vars(loaded.module)["scap_origin"] = {**known, "zoo": loaded.zoo.name}


def remembered(module: nn.Module) -> dict[str, Any] | None:
    """The fields of `LoadedModel` that `remember` noted, with the name of the zoo; None for any other module."""
    return vars(module).get("scap_origin")


def logits(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or a transformers output's `.logits`.

    Raises:
        ModelError: It is neither; of several tensors in a tuple, nothing says which are the logits.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model returns a {type(output).__name__}, not one tensor of logits: wrap it in a module whose output "
            "is the logits"
        )
    return found


def default_preprocessing(input_size: tuple[int, int, int]) -> Preprocessing:
    """ImageNet statistics for colour images; 0.5 for any other number of channels."""
    channels = input_size[0]
    if channels == 3:
        return Preprocessing(input_size, IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(input_size, (0.5,) * channels, (0.5,) * channels)


def first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """Names the first layer, in eval mode, that differs in type, settings or tensor shapes; None if none does."""
    ours, theirs = _structure(one), _structure(other)
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path):
            return path or type(one).__name__
    return None


def _structure(module: nn.Module) -> dict[str, object]:
    tensors = lambda m: [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]  # noqa: E731
    return {
        path: (type(m), m.extra_repr(), [(name, tuple(tensor.shape)) for name, tensor in tensors(m)])
        for path, m in module.named_modules()
        # They do nothing in eval mode, and their rates are no part of the architecture.
        if not isinstance(m, (nn.Identity, nn.Dropout, nn.Dropout2d)) and type(m).__name__ != "DropPath"
    }
