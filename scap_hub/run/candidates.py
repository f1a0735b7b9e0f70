"""Which channel groups a run may prune."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup, channel_groups
from scap_hub.errors import RecipeError

_UNWATCHED = "is computed from the weights of a layer that is not called, so nothing of it can be scored"


def candidates(model: nn.Module, images: Tensor, protect: Sequence[str]) -> list[ChannelGroup]:
    """The channel groups of a model; those that are protected, or that no criterion can watch, are pinned.

    Args:
        model: The model.
        images: Example input, (1, C, H, W).
        protect: Glob patterns of module paths.

    Raises:
        RecipeError: A pattern matches no layer that computes channels.
    """
    groups = channel_groups(model, images)
    for pattern in protect:
        matching = [any(fnmatch.fnmatchcase(path, pattern) for path in group.producers) for group in groups]
        if not any(matching):
            raise RecipeError(
                f"protect: {pattern!r} matches no layer that computes channels; `scap-hub inspect` lists them"
            )
        groups = _pinned(groups, matching, f"is protected by {pattern!r}")
    return _pinned(groups, [group.prunable and not group.watched for group in groups], _UNWATCHED)


def _pinned(groups: list[ChannelGroup], which: Sequence[bool], reason: str) -> list[ChannelGroup]:
    """The same groups, some of which cannot be pruned any more; a reason that a group has already stays."""
    return [
        replace(group, prunable=False, pinned_because=group.pinned_because or reason) if pinned else group
        for group, pinned in zip(groups, which, strict=True)
    ]
