"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor

from scap_hub.deploy.capture import Named
from scap_hub.deploy.runtimes import Runtime
from scap_hub.errors import VerificationError

TOLERANCE = 1e-4
"""Largest difference of any number, relative to the largest one of that output and batch: float32 rounds in proportion,
untrained models have huge logits, and features of length 1 are small."""
SMALLEST = 0.01
"""Smaller outputs are allowed what this one is: they may be differences of numbers as large as 1, which are rounded."""


def check_agreement(net: Named, runtime: Runtime, images: Tensor) -> None:
    """Compares every output, on this batch size and on another one than the file was made with.

    Raises:
        VerificationError: They differ; says by how much, and where most.
    """
    for batch in (images, torch.cat([images, images.flip(3), images.flip(2)])[:5]):
        with torch.no_grad():
            expected, found = net(batch), runtime.run(batch)
        for name, ours, theirs in zip(net.names, _tuple(found), _tuple(expected), strict=True):
            _check(f"{runtime.file.name} in {runtime.name}", name, ours, theirs)


def _check(where: str, name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs()
    allowed = TOLERANCE * max(SMALLEST, theirs.abs().max().item())
    if not difference.max().item() <= allowed:  # NaN is no agreement
        place = ", ".join(str(int(index)) for index in torch.unravel_index(difference.argmax(), difference.shape))
        raise VerificationError(
            f"{where} differs from the model by {difference.max().item():.1e} at {name}[{place}] of a batch of "
            f"{len(theirs)}, {allowed:.1e} are allowed: it was not kept; try another format"
        )


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
