"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scap_hub.deploy.runtimes import Runtime
from scap_hub.errors import VerificationError

TOLERANCE = 1e-4
"""Largest difference of any logit: absolute, but relative to the batch's largest logit where that is above 1, because
float32 rounds in proportion and untrained models have huge logits."""


def check_agreement(net: nn.Module, runtime: Runtime, images: Tensor) -> None:
    """Compares logits, on this batch size and on another one than the file was made with.

    Raises:
        VerificationError: They differ; says by how much, and where most.
    """
    for batch in (images, torch.cat([images, images.flip(3), images.flip(2)])[:5]):
        with torch.no_grad():
            expected = net(batch)
        difference = (runtime(batch) - expected).abs()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference.max().item() <= allowed:  # NaN is no agreement
            place = ", ".join(map(str, torch.unravel_index(difference.argmax(), difference.shape)))
            place = place.replace("tensor(", "").replace(")", "")
            raise VerificationError(
                f"{runtime.file.name} in {runtime.name} differs from the model by {difference.max().item():.1e} at "
                f"logits[{place}] of a batch of {len(batch)}, {allowed:.1e} are allowed: it was not kept; try another "
                "format"
            )
