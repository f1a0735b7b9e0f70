"""A part of a model, such as the backbone of a detector: it is to give what the dense part gives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from scap_hub.tasks.outputs import Outputs


class PartOutputs(Outputs):
    """Outputs of a part; data sets hold images of the whole model, of which the part is given what reaches it."""

    def __init__(self, reached: Callable[[Tensor], Tensor]) -> None:
        """Args: reached: Gives what reaches the part when the whole model runs on images, (N, ...)."""
        self._reached = reached

    def inputs(self, images: Tensor) -> Tensor:
        """See `Task.inputs`."""
        return self._reached(images)
