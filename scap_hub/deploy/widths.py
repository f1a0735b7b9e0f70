"""Which multiples of channels a runtime likes, found by measuring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scap_hub.deploy.opened import opened
from scap_hub.timing.clock import Timer, milliseconds

_WIDTH = 128
_GPU = {False: 8, True: 32}
"""What tensor cores ask for, in half precision and in int8. A network as small as ours would measure launches there."""


class _Stack(nn.Module):
    """Convolutions of one width, as in the middle of a network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 4)
        layers = [nn.Sequential(nn.Conv2d(width, width, size, padding=size // 2), nn.ReLU()) for size in (1, 3, 1, 3)]
        self.body = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


def width_times(
    runtime: str, int8: bool, timer: Timer = milliseconds, widths: Sequence[int] = (_WIDTH, _WIDTH - 8, _WIDTH - 16)
) -> dict[int, float]:
    """Times of small stacks of convolutions by their width, in turns, relative to the first; see `liked_multiple`."""
    images = torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    times = timer([(opened(_Stack(width).eval(), images, runtime, int8), images) for width in widths])
    return {width: time / times[0] for width, time in zip(widths, times, strict=True)}


def liked_multiple(runtime: str, int8: bool, device: torch.device, timer: Timer = milliseconds) -> int:
    """The multiple that channel counts should have: 8, 16 or 32.

    Three small stacks of convolutions run in turns, 128, 120 and 112 channels wide. If 120 channels save less than half
    of what their multiply-accumulates promise, 8 channels fewer buy nothing and the multiple is 16; if the same holds
    for 112, it is 32.

    Args:
        runtime: As for `opened`.
        int8: Whether in eight bits.
        device: Where torch computes. On a GPU nothing is measured: 8, or 32 in int8.
        timer: Measures calls that take turns.
    """
    if runtime == "torch" and device.type != "cpu":
        return _GPU[int8]
    multiple = 8
    for width, time in list(width_times(runtime, int8, timer).items())[1:]:
        if 1 - time >= (1 - (width / _WIDTH) ** 2) / 2:
            break
        multiple *= 2
    return multiple
