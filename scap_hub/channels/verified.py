"""`apply_plan` as users call it: the smaller model, verified before it is returned."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub import surgery
from scap_hub.channels.oracle import verify as check
from scap_hub.errors import ModelError, PlanError, UnverifiableError
from scap_hub.graph.modes import evaluating
from scap_hub.placement import placement
from scap_hub.plan import PruningPlan
from scap_hub.zoo.registry import zoo_of


def apply_plan(
    model: nn.Module, plan: PruningPlan, verify: bool | None = None, inputs: tuple[Any, ...] | Tensor | None = None
) -> nn.Module:
    """Makes the smaller model; the given one is untouched.

    Args:
        model: The dense model that the plan was made for, or an untrained copy of it.
        plan: What stays.
        verify: Whether to compare it with the masked dense model before it is returned, see `scap_hub.verify`: True
            insists on it; False leaves it out; None verifies where there are `inputs` or the model's own input size is
            known, and warns if the dense model cannot be compared.
        inputs: What to compare them on, positional arguments of the forward pass; a single tensor stands for one
            argument. By default random images of the input size that timm or transformers name for the model.

    Raises:
        PlanError: The model lacks a tensor or attribute that the plan names, or has it in another shape; or the plan
            shall be verified, and there are no inputs and no known size of them.
        VerificationError: The pruned model computes something else than the dense one with these channels masked.
        UnverifiableError: The dense model cannot be compared, and `verify` is True.
    """
    small = surgery.apply_plan(model, plan)
    if verify is False:
        return small
    inputs = _own_images(model) if inputs is None else inputs
    if inputs is None and verify:
        raise PlanError(
            f"the input size of {type(model).__name__} is not known: pass inputs=..., an example of what it takes, "
            "such as torch.randn(1, 3, 224, 224)"
        )
    if inputs is not None:
        try:
            check(model, plan, inputs)
        except UnverifiableError as error:
            if verify:
                raise
            warnings.warn(f"the pruned model is not verified: {error}", stacklevel=2)
    return small


def _own_images(model: nn.Module) -> Tensor | None:
    """Two random images of the model's own input size; None where its zoo does not know that."""
    zoo = zoo_of(model)
    device, dtype = placement(model)
    if not zoo.rebuilds or device.type == "meta":
        return None
    try:
        with evaluating(model):
            size = zoo.from_module(model, type(model).__name__, None).preprocessing.input_size
    except ModelError:  # it has no classifier, so its zoo does not describe it
        return None
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
