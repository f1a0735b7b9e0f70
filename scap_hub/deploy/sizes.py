"""ONNX files for images of any height and width, where the model and the exporter have that.

An ONNX file has no guards: of what depends on the size it does what was right for the images that it was recorded
with. So it counts only where it has been compared with the model at other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from scap_hub.deploy.agreement import check_agreement
from scap_hub.deploy.capture import captured
from scap_hub.deploy.onnx_file import write_onnx
from scap_hub.deploy.runtimes import OnnxRuntime
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError

STRIDE = 32
"""What the strides of nearly all models multiply to: sizes that are multiples of it need no padding inside."""


def write_resizable(source: Source, path: Path, within: float) -> int | None:
    """Writes a file for images of any size.

    Args:
        source: The model.
        path: The file; nothing of use is there if that fails.
        within: Seconds that recording the model may take.

    Returns:
        What heights and widths must be multiples of: 1 for any at all, or `STRIDE`. None if the model does not take
        other sizes than its own, if the exporter cannot leave them open or takes longer, or if the file computes
        something else there.
    """
    try:
        # Height and width differ, and neither is the model's own: what only holds by chance is not written down.
        program = captured(source.net, _resized(source.images, STRIDE, 2 * STRIDE), sizes_within=within)
        write_onnx(source.net, program, path)
    except (ModelError, RuntimeError, ValueError):
        return None
    own, small = source.images, source.images[:1]
    if not _agrees(source, path, [own, _resized(own, STRIDE, 2 * STRIDE), _resized(small, 2 * STRIDE, 0)]):
        return None
    odd = [_resized(small, taller, wider) for taller, wider in ((1, 0), (5, 11), (STRIDE // 2, STRIDE - 1))]
    return 1 if _agrees(source, path, odd) else STRIDE


def _agrees(source: Source, path: Path, batches: Iterable[Tensor]) -> bool:
    """Whether file and model compute the same."""
    try:
        runtime = OnnxRuntime(path)
        for images in batches:
            check_agreement(source.net, runtime, images)
    except Exception:  # onnxruntime has errors of its own, and models fail in all ways
        return False
    return True


def _resized(images: Tensor, taller: int, wider: int) -> Tensor:
    """Images that are so many pixels larger than the next multiples of `STRIDE`."""
    height, width = (STRIDE * math.ceil(side / STRIDE) for side in images.shape[2:])
    return F.interpolate(images, (height + taller, width + wider), mode="bilinear")
