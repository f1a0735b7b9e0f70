"""A model as exporters want it: images in, named tensors out, recorded for any batch size, and any height and width."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.errors import ModelError
from scap_hub.text import one_line
from scap_hub.zoo.registry import zoo_of

# What the Hub's exporters call them, and what transformers.js asks for.
INPUT = "pixel_values"
OUTPUT = "logits"

_ANSWERS = ("logits", "pred_boxes", "pred_masks", "class_queries_logits", "masks_queries_logits", "predicted_depth")
"""What a model of transformers answers; what it returns beside are steps on the way."""
_FIXED = "specialized it to be a constant"
"""What torch.export says of an axis that it cannot leave open."""
_NAMES = {
    "image-classification": OUTPUT,
    "semantic-segmentation": OUTPUT,
    "depth-estimation": "predicted_depth",
    "image-feature-extraction": "features",
}
"""What the outputs of a model are called that does not name them, by its task."""


class Named(nn.Module):
    """Images in; one tensor out, or a tuple of them, whatever the model's own output looks like.

    Attributes:
        model: The model.
        names: Of what comes out: of transformers' outputs their own, with `_0`, `_1` and so on where one is several
            maps; of a model's answers none is left out.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        """Runs the model once.

        Args:
            model: In eval mode, in float32, on the CPU.
            images: Two or more of them, (N, C, H, W).

        Raises:
            ModelError: It does not run, or returns nothing that has a row for each image.
        """
        super().__init__()
        self.model = model
        try:
            with torch.no_grad():
                found = [name for name, value in self._all(images).items() if _counts(value, len(images))]
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} does not run on {tuple(images.shape)}: {one_line(error)}"
            ) from error
        if not found:
            raise ModelError(f"{type(model).__name__} returns no tensor with a row for each image: nothing to export")
        self.names = tuple(found)

    def _all(self, pixel_values: Tensor) -> dict[str, Any]:
        output = self.model(pixel_values)
        if not isinstance(output, Mapping):
            return dict(_flat(self._name(output), output))
        output = {name: output[name] for name in _ANSWERS if output.get(name) is not None} or dict(output)
        return dict(_flat("", output))

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images, (N, C, H, W), to tensors (N, ...), in the order of `names`."""
        found = self._all(pixel_values)
        tensors = tuple(found[name] for name in self.names)
        return tensors[0] if len(tensors) == 1 else tensors

    def _name(self, output: Any) -> str:
        known = _NAMES.get(zoo_of(self.model).task(self.model) or "")
        return known or (OUTPUT if isinstance(output, Tensor) and output.ndim == 2 else "output")


def _flat(name: str, output: Any) -> Iterator[tuple[str, Any]]:
    """What is inside of tuples and dicts, by the names on the way."""
    if isinstance(output, Mapping):
        inside = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple | list):
        inside = [(str(number), value) for number, value in enumerate(output)]
    else:
        yield name, output
        return
    for key, value in inside:
        yield from _flat(f"{name}_{key}" if name else key, value)


def _counts(value: Any, images: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0 and len(value) == images


def captured(net: Named, images: Tensor, sizes_within: float | None = None) -> torch.export.ExportedProgram:
    """Records a model for any batch size.

    Args:
        net: In eval mode, in float32, on the CPU.
        images: Two or more of them, (N, C, H, W): a batch of one would be written into the program.
        sizes_within: Seconds in which it is recorded for any height and width as well; None for the images' own.

    Raises:
        ModelError: torch.export cannot record it, or not in that time.
    """
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if sizes_within is not None:
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with _ended_after(sizes_within):
            return torch.export.export(net, (images,), dynamic_shapes={INPUT: dims}, strict=False)
    except Exception as error:
        refused = ModelError(f"torch.export cannot capture {type(net.model).__name__}: {one_line(error)}")
        if sizes_within is not None or _FIXED not in str(error):
            raise refused from error
    # Plain Python has fixed the batch, such as `len(features)`, which only returns integers. Read as bytecode, which
    # takes several times as long, it stays open.
    try:
        return torch.export.export(net, (images,), dynamic_shapes={INPUT: dims}, strict=True)
    except Exception as error:
        raise refused from error


class _TooLong(BaseException):
    """No `Exception`, so that nothing on the way takes it for a failure of its own."""


@contextlib.contextmanager
def _ended_after(seconds: float | None) -> Iterator[None]:
    """Ends this thread's Python code after so many seconds, wherever it is, with a TimeoutError.

    With open sizes, torch's algebra of shapes can take hours for a single operator, as for the windows of Swin, whose
    number is rounded; nothing else can be asked to stop it. It is twice as slow while it is watched.
    """
    if seconds is None:
        yield
        return
    end, profile = time.monotonic() + seconds, sys.getprofile()

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise _TooLong

    sys.setprofile(check)
    try:
        yield
    except _TooLong:
        raise TimeoutError(f"it takes longer than {seconds:.0f} s") from None
    finally:
        sys.setprofile(profile)
