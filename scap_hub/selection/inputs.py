"""What `select` is given, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from scap_hub.channels.groups import ChannelGroup
from scap_hub.errors import TargetError
from scap_hub.scores import Scores
from scap_hub.text import did_you_mean

SCOPES = ("global", "cost-aware", "uniform")


def checked_scores(groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The scores of the prunable groups, (group.size,) float64 each, in the order of the groups.

    Raises:
        TargetError: There are no groups or none is prunable, or scores are not finite, not as many as the group has
            channels, or of a group that does not exist.
    """
    if not groups:
        raise TargetError("no channel groups were given; pass the result of scap_hub.channel_groups(model, inputs)")
    if not isinstance(scores, Mapping):
        raise TargetError(f"scores are {type(scores).__name__}; pass {{group name: scores}}, as scap_hub.score gives")
    sizes = {group.name: group.size for group in groups}
    found = {}
    for name, values in scores.items():
        if name not in sizes:
            raise TargetError(f"scores name {name!r}, which is no channel group{did_you_mean(name, sizes)}")
        found[name] = _checked(name, values, sizes[name])
    candidates = {group.name: found[group.name] for group in groups if group.prunable and group.name in found}
    if not any(group.prunable for group in groups):
        raise TargetError("nothing can be pruned: no channel group is prunable; `scap-hub inspect` lists the reasons")
    if not candidates:
        raise TargetError("nothing can be pruned: no prunable channel group has scores; pass those of scap_hub.score")
    return candidates


def _checked(name: str, values: Tensor, size: int) -> np.ndarray:
    try:
        array = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"scores of {name!r} are {values!r:.40}; give a tensor with one number a channel") from None
    if array.shape != (size,):
        raise TargetError(
            f"scores of {name!r} have shape {array.shape}, its channels are {size}: give one score a channel; "
            "score the model that these groups are of"
        )
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise TargetError(
            f"score {wrong[0]} of {name!r} is {array[wrong[0]]}: scores must be finite; look for NaN or Inf in the "
            "model's weights and the calibration images"
        )
    return array


def checked_scope(scope: str | None, scores: Mapping[str, Tensor]) -> str:
    """The scope that is given, or else the one that the scores carry; "global" for a plain dict.

    Raises:
        TargetError: It is none of `SCOPES`.
    """
    if scope is None:
        scope = scores.scope if isinstance(scores, Scores) else "global"
    if scope not in SCOPES:
        hint = did_you_mean(scope, SCOPES)
        raise TargetError(f"scope {scope!r} is unknown{hint}; take one of {', '.join(SCOPES)}")
    return scope
