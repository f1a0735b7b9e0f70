"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor

from scap_hub.deploy.capture import Named
from scap_hub.deploy.runtimes import Runtime
from scap_hub.errors import VerificationError

TOLERANCE = 1e-4
"""Largest difference of any number: absolute, but relative to the largest one of that output and batch where that is
above 1, because float32 rounds in proportion and untrained models have huge logits."""


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
    allowed = TOLERANCE * max(1.0, theirs.abs().max().item())
    if not difference.max().item() <= allowed:  # NaN is no agreement
        place = ", ".join(str(int(index)) for index in torch.unravel_index(difference.argmax(), difference.shape))
        raise VerificationError(
            f"{where} differs from the model by {difference.max().item():.1e} at {name}[{place}] of a batch of "
            f"{len(theirs)}, {allowed:.1e} are allowed: it was not kept; try another format"
        )


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
