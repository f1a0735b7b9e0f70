"""Where a network looks: attention maps, which a pruned one can learn from its dense one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scap_hub.errors import TrainingError

Maps = dict[tuple[int, ...], Tensor]
"""Feature maps (N, C, H, W), by (H, W)."""


@contextlib.contextmanager
def feature_maps(model: nn.Module) -> Iterator[Maps]:
    """Fills a dictionary with the last feature map of each size that the model makes meanwhile."""
    maps: Maps = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            maps[tuple(output.shape[2:])] = output

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(note).remove)
        yield maps


def attention_loss(student: Maps, teacher: Maps) -> Tensor:
    """Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928, equation 2), mean over sizes and images.

    The distance is |q_s / |q_s| - q_t / |q_t||², from 0 to 2, with q the attention maps: the mean over channels of the
    squared activations, so that networks of different widths can be compared.

    Raises:
        TrainingError: There are no feature maps of the same size.
    """
    sizes = student.keys() & teacher.keys()
    if not sizes:
        raise TrainingError(
            "finetune.distillation.features compares feature maps (N, C, H, W), and this network makes none; set it "
            "to 0"
        )
    distances = [(_attention(student[size]) - _attention(teacher[size])).square().sum(1).mean() for size in sizes]
    return sum(distances[1:], distances[0]) / len(distances)


def _attention(maps: Tensor) -> Tensor:
    """Attention maps of unit norm: (N, C, H, W) to (N, H x W)."""
    return F.normalize(maps.float().square().mean(1).flatten(1))
