"""Finds out whether a zoo can build the pruned model by itself, from the arguments of its own constructor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError, PlanError
from scap_hub.zoo import LoadedModel, logits, rebuild
from scap_hub.zoo.base import one_line

Shapes = dict[str, tuple[int, ...]]


def plain_config(loaded: LoadedModel, small: nn.Module) -> dict[str, Any]:
    """The dense model's config with the pruned model's widths in it, in the zoo's own layout.

    Args:
        loaded: The dense model.
        small: The pruned model.

    Returns:
        A config.json that needs nothing of ours.

    Raises:
        PlanError: The widths are no constructor arguments; says which tensor shows it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    reason = "which of its arguments set widths is not known here"
    for widths in _guesses(loaded, shapes):
        config = json.loads(json.dumps(loaded.config))
        (config["model_args"] if loaded.library == "timm" else config).update(widths)
        try:
            plain: Any = rebuild(loaded.library, config)
        except ModelError as error:
            reason = one_line(error)
            continue
        difference = _difference(plain, small, loaded.preprocessing.input_size)
        if difference is None:
            return config | ({"num_features": plain.num_features} if loaded.library == "timm" else {})
        reason = f"with {', '.join(f'{name}={value!r}' for name, value in widths.items())} {difference}"
    raise PlanError(
        f"the widths that are left cannot be given to {loaded.name} as constructor arguments ({reason}): save with "
        "publish.layout=pruned, or prune with target.scope=uniform and protect what has no argument of its own"
    )


def _difference(plain: nn.Module, small: nn.Module, input_size: tuple[int, int, int]) -> str | None:
    """What distinguishes the two; equal names and shapes prove nothing, for a head count shows in neither."""
    state, fresh = small.state_dict(), plain.state_dict()
    for name in sorted(state.keys() | fresh.keys(), key=[*state, *fresh].index):
        ours, theirs = (tuple(own[name].shape) if name in own else "absent" for own in (state, fresh))
        if ours != theirs:
            return f"its {name!r} is {theirs}, and {ours} in the pruned model"
    weight = next(small.parameters())
    plain.to(weight.device, weight.dtype).load_state_dict(state)
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        return None if torch.equal(_run(plain, images), _run(small, images)) else "it computes other logits"


def _run(model: nn.Module, images: Tensor) -> Tensor:
    return logits(model.eval()(images))


def _guesses(loaded: LoadedModel, shapes: Shapes) -> Iterator[dict[str, Any]]:
    """The constructor arguments that the shapes hint at; each is tried before it is believed."""
    guess = _FAMILIES.get((loaded.library, type(loaded.module).__name__.removesuffix("ForImageClassification")))
    with contextlib.suppress(KeyError, ZeroDivisionError):
        if guess is not None:
            yield guess(shapes)


def _timm_resnet(shapes: Shapes) -> dict[str, Any]:
    """Widths of the stages, and what a bottleneck's middle is of them."""
    stages = range(1, 5)
    last = "conv3" if "layer1.0.conv3.weight" in shapes else "conv2"
    outer = [shapes[f"layer{stage}.0.{last}.weight"][0] for stage in stages]
    if last == "conv2":
        return {"channels": outer}
    planes = [width // 4 for width in outer]
    inner = shapes["layer1.0.conv1.weight"][0]
    return {"channels": planes, "base_width": round(64 * inner / planes[0])}


def _timm_convnext(shapes: Shapes) -> dict[str, Any]:
    return {"dims": [shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0] for stage in range(4)]}


def _timm_vit(shapes: Shapes) -> dict[str, Any]:
    hidden, width = shapes["blocks.0.mlp.fc1.weight"]
    return {"embed_dim": width, "mlp_ratio": hidden / width}


def _resnet(shapes: Shapes) -> dict[str, Any]:
    stem = shapes["resnet.embedder.embedder.convolution.weight"][0]
    stages = [name for name in shapes if name.startswith("resnet.encoder.stages.")]
    count = 1 + max(int(name.split(".")[3]) for name in stages)
    last = max(int(name.split(".")[7]) for name in stages if ".layers.0.layer." in name)
    path = "resnet.encoder.stages.{}.layers.0.layer.{}.convolution.weight"
    return {"embedding_size": stem, "hidden_sizes": [shapes[path.format(stage, last)][0] for stage in range(count)]}


def _convnext(shapes: Shapes) -> dict[str, Any]:
    names = [name for name in shapes if name.endswith(".layers.0.dwconv.weight")]
    return {"hidden_sizes": [shapes[name][0] for name in names]}


def _vit(shapes: Shapes) -> dict[str, Any]:
    names = (name for name in shapes if name.endswith(("mlp.fc1.weight", "intermediate.dense.weight")))
    return {"intermediate_size": shapes[next(names, "")][0]}


_FAMILIES: dict[tuple[str, str], Callable[[Shapes], dict[str, Any]]] = {
    ("timm", "ResNet"): _timm_resnet,
    ("timm", "ConvNeXt"): _timm_convnext,
    ("timm", "VisionTransformer"): _timm_vit,
    ("transformers", "ResNet"): _resnet,
    ("transformers", "ConvNext"): _convnext,
    ("transformers", "ViT"): _vit,
    ("transformers", "DeiT"): _vit,
    ("transformers", "DeiTForImageClassificationWithTeacher"): _vit,
}
