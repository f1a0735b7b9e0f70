"""How long eliminations take, for the forecast of a run: what does not depend on how many images there are."""

from __future__ import annotations

import torch
from torch import nn

from scap_hub.criteria.obs.blocks import COLUMNS, blocks_of
from scap_hub.criteria.obs.elimination import CompensatedWeight, eliminate
from scap_hub.criteria.patches import PatchLayer
from scap_hub.placement import placement
from scap_hub.timing.clock import fastest

_PRODUCTS = 3
"""As how many products of two such matrices inverting a second moment, and taking all of its columns out, takes about
as long. Measured on a busy CPU: 2.4 and 3.3 for a ResNet-10, which has layers of 512 channels and 3 x 3 kernels."""
_SIDE, _CHANNELS = 512, 96
"""Of the product and of the elimination that are timed: tens of milliseconds each."""


@torch.no_grad()
def elimination_seconds(model: nn.Module) -> float:
    """About how long it takes to eliminate all channels that the layers of a model read, on its device.

    Wide layers take what their products of matrices take, the many narrow ones what each channel takes.

    Args:
        model: Any.
    """
    device, _ = placement(model)
    layers = [layer for layer in model.modules() if isinstance(layer, PatchLayer)]
    cubes = sum(blocks_of(layer) * min(layer.weight[0].numel(), COLUMNS) ** 3 for layer in layers)
    channels = sum(layer.weight.shape[1] for layer in layers)
    square = torch.eye(_SIDE, dtype=torch.float64, device=device)
    small = torch.eye(_CHANNELS, dtype=torch.float64, device=device)

    def narrow() -> None:
        own = CompensatedWeight(small, small, torch.arange(_CHANNELS), 1e-2)
        eliminate([own], torch.zeros(_CHANNELS, dtype=torch.long), [0])

    of_products = _PRODUCTS * cubes / _SIDE**3 * fastest(lambda: square @ square)
    return of_products + channels / _CHANNELS * fastest(narrow)
