"""Finds out whether a zoo can build the pruned model by itself, from the arguments of its own constructor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError, PlanError
from scap_hub.placement import placement
from scap_hub.text import one_line
from scap_hub.zoo import LoadedModel, logits


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
    try:
        if uniform := loaded.zoo.uniform(loaded, shapes):
            difference = _difference(uniform.model, small, loaded.preprocessing.input_size)
            if difference is None:
                return uniform.config
            arguments = ", ".join(f"{name}={value!r}" for name, value in uniform.arguments.items())
            reason = f"with {arguments} {difference}"
    except ModelError as error:
        reason = one_line(error)
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
    device, dtype = placement(small)
    plain.to(device, dtype).load_state_dict(state)
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        return None if torch.equal(_run(plain, images), _run(small, images)) else "it computes other logits"


def _run(model: nn.Module, images: Tensor) -> Tensor:
    return logits(model.eval()(images))
