"""What timm's own tests ask of a model, asked of a pruned one: methods and attributes that `forward` does not use.

`python -m tests.timm_checks [NAMES]` prints what fails, for one model of each family of timm by default.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import scap_hub
from scap_hub.channels.oracle import randomize
from tests.independent import difference
from tests.nets import random_plan

CLASSES = 5


def built(name: str) -> tuple[nn.Module, Tensor]:
    """An untrained model with random values, and two images of the size that it is made for."""
    model = randomize(timm.create_model(name, num_classes=CLASSES)).double().eval()
    size = model.pretrained_cfg["input_size"]
    return model, torch.randn(2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _same(one: Any, other: Any, tolerance: float = 1e-9) -> None:
    error = difference(one, other)
    assert error < tolerance, f"differs by {error:.1e}"


def trains(model: nn.Module, images: Tensor) -> None:
    """A step gives every parameter that the loss depends on a gradient of its shape."""
    model.train()(images).square().mean().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()


def reparameterizes(model: nn.Module, images: Tensor) -> None:
    """Fused branches compute the same."""
    _same(reparameterize_model(model)(images), model(images), 1e-6)


def gets_a_new_head(model: nn.Module, images: Tensor) -> None:
    """`reset_classifier` knows how wide the features are."""
    model.reset_classifier(7)
    assert model.double()(images).shape == (2, 7)


def gives_features(model: nn.Module, images: Tensor) -> None:
    """Without a classifier, as many features come out as the model says."""
    model.reset_classifier(0)
    assert model(images).shape == (2, model.head_hidden_size)


def gives_a_feature_map(model: nn.Module, images: Tensor) -> None:
    """`forward_head` takes what `forward_features` gives, which is as wide as the model says."""
    features = model.forward_features(images)
    if isinstance(features, Tensor):
        assert model.num_features in features.shape, f"{tuple(features.shape)}, num_features {model.num_features}"
    _same(model.forward_head(features), model(images))
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)


def checkpoints_gradients(model: nn.Module, images: Tensor) -> None:
    """Gradient checkpointing changes nothing."""
    before = model(images)
    model.set_grad_checkpointing()
    _same(model(images), before)
    trains(model, images)


def gives_intermediates(model: nn.Module, images: Tensor) -> None:
    """The last feature map is `forward_features`'s; each is as wide as `feature_info` says."""
    final, maps = model.forward_intermediates(images)
    if isinstance(final, Tensor):
        _same(final, model.forward_features(images))
    assert all(isinstance(part, Tensor) for part in maps)
    info = getattr(model, "feature_info", None)
    if isinstance(info, list) and len(info) == len(maps):
        for entry, part in zip(info, maps, strict=True):
            assert entry["num_chs"] in part.shape, f"{tuple(part.shape)}, feature_info says {entry['num_chs']}"


def prunes_intermediate_layers(model: nn.Module, images: Tensor) -> None:
    """A model cut after its last feature map still runs."""
    model.prune_intermediate_layers(-1, prune_norm=False, prune_head=True)
    model.forward_intermediates(images, indices=-1, intermediates_only=True)


def takes_another_size(model: nn.Module, images: Tensor) -> None:
    """`set_input_size` resamples what depends on the size."""
    size = [2 * side for side in images.shape[-2:]]
    model.set_input_size(size)
    assert model.double()(nn.functional.interpolate(images, size=size)).shape == (2, CLASSES)


def groups_its_parameters(model: nn.Module, images: Tensor) -> None:
    """Every parameter has a layer, and layer-wise decay finds them all."""
    grouped = group_parameters(model, model.group_matcher())
    names = {name for name, _ in model.named_parameters()}
    assert set().union(*grouped.values()) == names
    decayed = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in decayed) == len(names)


def names_what_does_not_decay(model: nn.Module, images: Tensor) -> None:
    """`no_weight_decay` names parameters."""
    assert isinstance(set(model.no_weight_decay()), set)


def is_copied(model: nn.Module, images: Tensor) -> None:
    """A deep copy computes the same, by itself."""
    before, copied = model(images), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _same(copied(images), before)


CHECKS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    check.__name__: check
    for check in (
        trains, reparameterizes, gets_a_new_head, gives_features, gives_a_feature_map, checkpoints_gradients,
        gives_intermediates, prunes_intermediate_layers, takes_another_size, groups_its_parameters,
        names_what_does_not_decay, is_copied,
    )
}  # fmt: skip


def faults(name: str) -> Iterator[str]:
    """What a pruned model cannot do that the dense one can."""
    model, images = built(name)
    plan = random_plan(scap_hub.channel_groups(model, (images[:1],)), seed=1, ratio=0.5)
    small = scap_hub.apply_plan(model, plan).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for label, check in CHECKS.items():
        with contextlib.suppress(Exception):
            check(copy.deepcopy(model), images)
            try:
                check(copy.deepcopy(small), images)
            except Exception as error:
                yield f"{label}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def families() -> list[str]:
    """One model of each family of timm, the one with the fewest letters in its name, small where names tell."""
    first: dict[str, list[str]] = {}
    for name in timm.list_models():
        first.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    small = ("atto", "femto", "pico", "nano", "xxt", "xxs", "xx_small", "tiny", "_t", "_xs", "_s", "small", "_0", "18")
    return [min(names, key=lambda n: (not any(s in n for s in small), len(n), n)) for names in first.values()]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for own in sys.argv[1:] or families():
        try:
            found = list(faults(own))
        except Exception as error:
            found = [f"{type(error).__name__}: {str(error)[:200]}"]
        print(own, "ok" if not found else "", *(f"\n    {fault}" for fault in found), flush=True)
