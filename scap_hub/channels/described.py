"""Numbers that tell other code how wide a model's features are: timm's and transformers' conventions.

The forward pass does not read them, but a new classifier, a neck, a decoder or a fused layer is built from them:
`num_features`, `head_hidden_size` and `feature_info` of timm, `num_features` of a transformers backbone, sizes in a
config, `in_chs` and `out_chs` of a block. Each is found by its name and by what it says of the dense model, and gets
what the pruned one has there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scap_hub.graph.record import untouched

Shape = tuple[int, ...]
_INPUTS, _OUTPUTS = ("in_chs", "in_channels", "in_dim", "groups"), ("out_chs", "out_channels", "out_dim")
_CLASSIFIER_INPUT = ("num_features", "head_hidden_size", "in_features", "embed_dim")


@dataclass
class Features:
    """Shapes of what a model makes on its way.

    Attributes:
        last: Output of timm's `forward_features`.
        stages: Sizes in the outputs of the modules that timm's `feature_info` names, None where one does not run.
        hidden: transformers' `hidden_states`.
        classifiers: Widths that the classifier reads, by timm's `get_classifier`; several where it has several heads.
        calls: Input and output of every module that maps one tensor to one, by path.
    """

    last: Shape | None = None
    stages: list[Shape | None] = field(default_factory=list)
    hidden: list[Shape] = field(default_factory=list)
    classifiers: list[int] = field(default_factory=list)
    calls: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


def features_of(model: Any, inputs: tuple[Any, ...]) -> Features:
    """Runs a model once, for the shapes alone.

    Args:
        model: Any; left as it was.
        inputs: Positional arguments of its forward pass.
    """
    with untouched(model):
        return _observed(model.eval(), inputs)


def _observed(model: Any, inputs: tuple[Any, ...]) -> Features:
    """The same; hooks and a watch on `forward_features` stay in the model."""
    features = Features()
    if hasattr(model, "forward_features"):
        whole = model.forward_features

        def watched(*args: Any, **options: Any) -> Any:
            made = whole(*args, **options)
            features.last = next((tuple(x.shape) for x in pytree.tree_leaves(made) if isinstance(x, Tensor)), None)
            return made

        model.forward_features = watched
    modules = dict(model.named_modules())
    for index, stage in enumerate(_stages(model)):
        features.stages.append(None)
        if (module := modules.get(stage["module"])) is not None:

            def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
                tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
                features.stages[index] = tuple(size for tensor in tensors for size in tensor.shape)

            module.register_forward_hook(keep)
    for path, module in modules.items():

        def note(_: Any, arguments: tuple[Any, ...], output: Any, path: str = path) -> None:
            if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
                features.calls[path] = tuple(arguments[0].shape), tuple(output.shape)

        module.register_forward_hook(note)
    options = {"output_hidden_states": True} if _gives_hidden_states(model) else {}
    with torch.no_grad():
        output = model(*inputs, **options)
    if options:
        features.hidden = [tuple(x.shape) for x in output.hidden_states or () if isinstance(x, Tensor)]
    weights = [weight for module in _classifier(model) for weight in module.parameters() if weight.ndim > 1]
    features.classifiers = [weight.shape[1] for weight in weights]
    return features


def widths(model: Any, dense: Features, small: Features) -> dict[str, dict[str, Any]]:
    """New values of the numbers that describe a model's widths, by module path and attribute.

    Args:
        model: The dense model.
        dense: Its features.
        small: Those of the pruned model.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, module in _around_classifier(model):
        for name in _CLASSIFIER_INPUT:
            width = vars(module).get(name)
            if path in dense.calls and width in dense.calls[path][0]:
                found.setdefault(path, {})[name] = _narrowed(width, dense.calls[path][0], small.calls[path][0])
            elif width in dense.classifiers[:1]:
                found.setdefault(path, {})[name] = small.classifiers[0]
            elif width is not None and width == sum(dense.classifiers):
                found.setdefault(path, {})[name] = sum(small.classifiers)
    for path, shapes in dense.calls.items():
        held = vars(model.get_submodule(path))
        for side, names in enumerate((_INPUTS, _OUTPUTS)):
            for name in names:
                if type(held.get(name)) is int and path in small.calls:
                    new = _narrowed(held[name], shapes[side], small.calls[path][side])
                    if new != held[name]:
                        found.setdefault(path, {}).setdefault(name, new)
    own = found.setdefault("", {})
    if dense.last and small.last and vars(model).get("num_features") in dense.last:
        own["num_features"] = _narrowed(model.num_features, dense.last, small.last)
    if stages := _stages(model):
        pairs = zip(stages, dense.stages, small.stages, strict=True)
        own["feature_info"] = [
            _narrowed(stage["num_chs"], before, after) if before and after else stage["num_chs"]
            for stage, before, after in pairs
        ]
        # What new heads are built from, where each stage has one.
        widths_of_stages = [stage["num_chs"] for stage in stages]
        for name, held in vars(model).items():
            if isinstance(held, list | tuple) and list(held) == widths_of_stages:
                own[name] = own["feature_info"]
    if dense.hidden:
        holders = (("", model), ("config.", model.config))
        for prefix, holder in holders:
            for name, value in vars(holder).items():
                listed = isinstance(value, list | tuple) and all(type(item) is int for item in value)
                if listed and ("hidden_sizes" in name or "embed_dim" in name or name == "num_features"):
                    own[prefix + name] = _along(value, dense.hidden, small.hidden)
        for name, state in (("embedding_size", 0), ("hidden_size", -1)):
            if type(vars(model.config).get(name)) is int:
                own[f"config.{name}"] = _narrowed(vars(model.config)[name], dense.hidden[state], small.hidden[state])
    return {path: values for path, values in found.items() if values}


def _stages(model: Any) -> list[dict[str, Any]]:
    """The list of stages that timm keeps; what wraps it for `features_only` gives outputs, which keep their widths."""
    info = getattr(model, "feature_info", None)
    return info if isinstance(info, list) and all("module" in stage for stage in info) else []


def _gives_hidden_states(model: Any) -> bool:
    return hasattr(model, "config") and "output_hidden_states" in {
        **inspect.signature(model.forward).parameters,
        **(vars(model.config) if hasattr(model.config, "__dict__") else {}),
    }


def _classifier(model: Any) -> list[nn.Module]:
    """Timm's classifier; models with two heads for distillation have two."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    return [head for head in (found if isinstance(found, tuple | list) else (found,)) if isinstance(head, nn.Module)]


def _around_classifier(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the classifier, from the model to the innermost."""
    heads = _classifier(model)
    name = next((path for path, module in model.named_modules() if path and module in heads), None)
    if name is not None:
        parts = name.split(".")
        for depth in range(len(parts)):
            path = ".".join(parts[:depth])
            yield path, model.get_submodule(path)


def _narrowed(width: int, before: Shape, after: Shape) -> int:
    """What a width of the dense shape has become: the dimension that changed, if it was that wide."""
    changed = [new for old, new in zip(before, after, strict=True) if old == width and new != old]
    return changed[0] if changed else width


def _along(values: Sequence[int], before: Sequence[Shape], after: Sequence[Shape]) -> list[int]:
    """The same for a list that goes with the last stages of a model; as it was if it describes something else."""
    new: list[int] = []
    stage = len(before)
    for value in reversed(values):
        stage = next((index for index in reversed(range(stage)) if value in before[index]), -1)
        if stage < 0:
            return list(values)
        new.append(_narrowed(value, before[stage], after[stage]))
    return new[::-1]
