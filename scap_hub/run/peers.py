"""Torch-Pruning's own pipeline, to stand beside ours in a comparison; it is no dependency.

Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.errors import RecipeError
from scap_hub.selection.target import Target
from scap_hub.training.evaluate import count

PEERS: dict[str, dict[str, Any]] = {
    "torch-pruning": {"p": 2},
    "torch-pruning-l1": {"p": 1},
    "torch-pruning-global": {"p": 2, "global_pruning": True},
    "torch-pruning-bn": {"p": 2},
}
"""Its group magnitude importance by norm, local or global; "-bn" takes batch-norm statistics anew, as we do."""
MATCHED = ("macs", "params")
"""Kinds of target that its ratio is matched to."""
_SEARCH_STEPS = 10


def available() -> bool:
    """Whether Torch-Pruning is installed."""
    return importlib.util.find_spec("torch_pruning") is not None


def check_available(name: str) -> None:
    """Raises RecipeError if Torch-Pruning is not installed."""
    if not available():
        raise RecipeError(f"{name!r} needs Torch-Pruning: pip install torch-pruning")


def prune_with_peer(
    model: nn.Module, groups: Sequence[ChannelGroup], images: Tensor, name: str, target: Target, round_to: int
) -> nn.Module:
    """Prunes a copy with the largest ratio that stays within the budget.

    Args:
        model: The dense model.
        groups: Its channel groups, which tell the classifier.
        images: Example input, (1, C, H, W).
        name: One of `PEERS`.
        target: Of a kind in `MATCHED`.
        round_to: Channel counts are multiples of this.
    """
    kind, fraction = target.kind, target.number
    size = (images.shape[1], images.shape[2], images.shape[3])
    whole = count(model, size)[kind]
    low, high, best = 0.0, 1.0, None
    for _ in range(_SEARCH_STEPS):
        ratio = (low + high) / 2
        small = _pruned(model, groups, images, ratio, round_to, **PEERS[name])
        if count(small, size)[kind] <= fraction * whole:
            high, best = ratio, small
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"Torch-Pruning does not reach {target}")
    return best.eval()


def _pruned(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: Tensor,
    ratio: float,
    round_to: int,
    p: int,
    global_pruning: bool = False,
) -> nn.Module:
    import torch_pruning

    small = copy.deepcopy(model)
    outputs = [path for g in groups if "output" in (g.pinned_because or "") for path in g.producers]
    with torch.enable_grad():  # it follows the gradients' graph
        torch_pruning.pruner.MagnitudePruner(
            small,
            images,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=p),
            global_pruning=global_pruning,
            pruning_ratio=ratio,
            ignored_layers=[small.get_submodule(path) for path in outputs],
            round_to=round_to,
        ).step()
    return small
