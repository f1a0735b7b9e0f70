"""Reading the inputs of layers on calibration images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.criteria.calibration import AllSeen, images_of, input_of
from scap_hub.criteria.patches import PatchLayer
from scap_hub.errors import CalibrationError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed
from scap_hub.private import unobserved
from scap_hub.progress import track


def read_inputs(
    model: nn.Module,
    paths: Collection[str],
    batches: Collection[Any],
    read: Callable[[str, PatchLayer, Tensor, int], None],
) -> None:
    """Reads the inputs of layers, in eval mode; what comes after the last of them is not computed.

    Args:
        model: The model.
        paths: Of the layers.
        batches: Calibration batches.
        read: Called with path, layer, input and number of images, whenever one of the layers is about to run.

    Raises:
        CalibrationError: NaN or Inf in a layer's input.
    """
    images = number = 0  # of the current batch
    waiting: set[str] = set()  # layers that have not run on it yet

    @unobserved
    def before(path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        if not x.sum(dtype=torch.float32).isfinite():
            raise CalibrationError(
                f"NaN or Inf in the input of layer {path!r}, batch {number}; check the images and the weights"
            )
        read(path, layer, x, images)
        waiting.discard(path)
        if not waiting:
            raise AllSeen

    with contextlib.ExitStack() as stack, evaluating(model), torch.no_grad():
        for path in paths:
            hook = model.get_submodule(path).register_forward_pre_hook(partial(before, path), with_kwargs=True)
            stack.callback(hook.remove)
        for number, batch in enumerate(track(batches, "patches")):  # noqa: B007, the hooks name the batch
            pixels = fed(model, images_of(batch))
            images = len(pixels)
            waiting.update(paths)
            with contextlib.suppress(AllSeen):
                model(pixels)
