"""timm's numbers for how wide a model's features are: `num_features`, `head_hidden_size`, `feature_info`.

timm itself is not needed here: many write their own models after its conventions, so plain modules are asked as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from scap_hub.graph.record import untouched
from scap_hub.private import tree_leaves
from scap_hub.zoo.described import Features, Shape, Widths, block_widths, merged, narrowed, observed

_CLASSIFIER_INPUT = ("num_features", "head_hidden_size", "in_features", "embed_dim")


@dataclass
class TimmFeatures(Features):
    """Shapes of what timm's conventions describe.

    Attributes:
        last: The output of `forward_features`.
        stages: All sizes in the outputs of each module that `feature_info` names, None where it does not run.
        classifiers: Widths that the classifier reads, by `get_classifier`; several where it has several heads.
    """

    last: Shape | None = None
    stages: list[Shape | None] = field(default_factory=list)
    classifiers: list[int] = field(default_factory=list)


def timm_features(model: Any, inputs: tuple[Any, ...]) -> TimmFeatures:
    """Runs a model once, for the shapes alone; leaves it as it was."""
    features = TimmFeatures()
    with untouched(model):
        if hasattr(model, "forward_features"):
            _watch_last(model, features)
        _watch_stages(model, features)
        features.calls, _ = observed(model, inputs)
    weights = [weight for head in _classifiers(model) for weight in head.parameters() if weight.ndim > 1]
    features.classifiers = [weight.shape[1] for weight in weights]
    return features


def timm_widths(model: Any, dense: TimmFeatures, small: TimmFeatures) -> Widths:
    """New values of the numbers that timm's conventions describe, by module path and attribute.

    Args:
        model: The dense model.
        dense: Its features.
        small: Those of the pruned model.
    """
    own: dict[str, Any] = {}
    if dense.last and small.last and vars(model).get("num_features") in dense.last:
        own["num_features"] = narrowed(model.num_features, dense.last, small.last)
    own |= _stage_widths(model, dense, small)
    return merged(block_widths(model, dense.calls, small.calls), _head_widths(model, dense, small), {"": own})


def _watch_last(model: Any, features: TimmFeatures) -> None:
    whole = model.forward_features

    def watched(*args: Any, **options: Any) -> Any:
        made = whole(*args, **options)
        features.last = next((tuple(x.shape) for x in tree_leaves(made) if isinstance(x, Tensor)), None)
        return made

    model.forward_features = watched


def _watch_stages(model: Any, features: TimmFeatures) -> None:
    modules = dict(model.named_modules())
    for index, stage in enumerate(_stages(model)):
        features.stages.append(None)
        if (module := modules.get(stage["module"])) is not None:

            def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                features.stages[index] = tuple(size for tensor in tensors for size in tensor.shape)

            module.register_forward_hook(keep)


def _head_widths(model: Any, dense: TimmFeatures, small: TimmFeatures) -> Widths:
    """What the classifier and the modules around it say of the width that it reads."""
    found: Widths = {}
    for path, module in _around_classifier(model):
        for name in _CLASSIFIER_INPUT:
            width = vars(module).get(name)
            if path in dense.calls and width in dense.calls[path][0]:
                new = narrowed(width, dense.calls[path][0], small.calls[path][0])
            elif width in dense.classifiers[:1]:
                new = small.classifiers[0]
            elif width is not None and width == sum(dense.classifiers):
                new = sum(small.classifiers)
            else:
                continue
            found.setdefault(path, {})[name] = new
    return found


def _stage_widths(model: Any, dense: TimmFeatures, small: TimmFeatures) -> dict[str, Any]:
    """What the model says of the width of its stages."""
    stages = _stages(model)
    if not stages:
        return {}
    before = [stage["num_chs"] for stage in stages]
    shapes = zip(before, dense.stages, small.stages, strict=True)
    after = [narrowed(width, old, new) if old and new else width for width, old, new in shapes]
    # Some models keep the same list under a name of their own, and build a head for each stage from it.
    lists = [name for name, held in vars(model).items() if isinstance(held, list | tuple) and list(held) == before]
    return {name: after for name in ("feature_info", *lists)}


def _stages(model: Any) -> list[dict[str, Any]]:
    """The list of stages that timm keeps.

    What timm wraps for `features_only` has another one; its features are outputs, which keep their widths.
    """
    info = getattr(model, "feature_info", None)
    return info if isinstance(info, list) and all("module" in stage for stage in info) else []


def _classifiers(model: Any) -> list[nn.Module]:
    """The heads of timm's classifier: one, or two in models for distillation."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    return [head for head in (found if isinstance(found, tuple | list) else (found,)) if isinstance(head, nn.Module)]


def _around_classifier(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the classifier, from the model to the innermost."""
    heads = _classifiers(model)
    name = next((path for path, module in model.named_modules() if path and module in heads), None)
    if name is not None:
        parts = name.split(".")
        for depth in range(len(parts)):
            path = ".".join(parts[:depth])
            yield path, model.get_submodule(path)
