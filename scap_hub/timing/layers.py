"""How long each layer of a model takes, inside a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.graph.record import evaluating
from scap_hub.placement import fed

_PASSES = 5


@torch.no_grad()
def layer_milliseconds(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, float]:
    """Milliseconds of layers in one forward pass, all calls of a layer together: medians of a few passes.

    Devices that work in the background wait after every layer, so the times add up to more than a forward pass takes.

    Args:
        model: The model, where it is to run.
        paths: Module paths of the layers.
        images: (N, C, H, W).
    """
    times: dict[str, list[float]] = {path: [] for path in paths}
    started: dict[str, float] = {}
    images = fed(model, images)
    background = images.device.type != "cpu"

    def now() -> float:
        if background:
            torch.accelerator.synchronize(images.device)
        return 1e3 * time.perf_counter()

    handles: list[Any] = []
    for path in paths:
        module = model.get_submodule(path)

        def start(module: nn.Module, args: Any, path: str = path) -> None:
            started[path] = now()

        def stop(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            times[path][-1] += now() - started[path]

        handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        with evaluating(model):
            for _ in range(1 + _PASSES):
                for own in times.values():
                    own.append(0.0)
                model(fed(model, images))
    finally:
        for handle in handles:
            handle.remove()
    return {path: round(statistics.median(own[1:]), 4) for path, own in times.items()}
