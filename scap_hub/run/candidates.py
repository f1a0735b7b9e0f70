"""Which channel groups a run may prune."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import Tensor, nn

from scap_hub.channels import ChannelGroups, channel_groups
from scap_hub.errors import RecipeError

_UNWATCHED = "is computed from the weights of a layer that is not called, so nothing of it can be scored"


def candidates(model: nn.Module, images: Tensor, protect: Sequence[str]) -> ChannelGroups:
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
        matching = [g.name for g in groups if any(fnmatch.fnmatchcase(path, pattern) for path in g.producers)]
        if not matching:
            raise RecipeError(
                f"protect: {pattern!r} matches no layer that computes channels; `scap-hub inspect` lists them"
            )
        groups = groups.pinned(dict.fromkeys(matching, f"is protected by {pattern!r}"))
    return groups.pinned({group.name: _UNWATCHED for group in groups.prunable if not group.watched})
