"""Builds models anew from the documents that describe them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scap_hub.errors import ModelError
from scap_hub.zoo.base import Zoo


def rebuild(zoo: Zoo, config: dict[str, Any]) -> nn.Module:
    """Builds an untrained copy of a model from `LoadedModel.config`; runs no code but the zoo's own.

    Raises:
        ModelError: A model that only its owner can build, or a config that the zoo refuses.
    """
    try:
        return zoo.rebuild(config)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"config.json lacks what it takes to build a {zoo.name} model: {error!r}") from None


def skeleton(zoo: Zoo, config: dict[str, Any]) -> nn.Module:
    """As `rebuild`, without memory for the weights where the zoo can.

    Raises:
        ModelError: As `rebuild`.
    """
    try:
        with torch.device("meta"):
            return rebuild(zoo, config)
    except ModelError:
        # Some constructors compute with tensors, which have no values there.
        return rebuild(zoo, config)
