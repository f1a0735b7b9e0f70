"""First-order Taylor expansion of the loss (Molchanov et al., 2017, arXiv 1611.06440, equation 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scap_hub.channels.taps import Tap
from scap_hub.criteria.calibration import images_of, mean_over_processes
from scap_hub.criteria.layouts import channels_first
from scap_hub.criteria.rows import RowCriterion
from scap_hub.criteria.variance import floating_outputs
from scap_hub.errors import CalibrationError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed, placement
from scap_hub.private import unobserved
from scap_hub.progress import track
from scap_hub.zoo.registry import zoo_of

_LOGITS = ("image-classification", "semantic-segmentation")
"""Tasks whose logits have the classes in their second dimension."""


@dataclass(kw_only=True)
class Taylor(RowCriterion):
    """Mean over images of |sum over places of z dL/dz|: what the loss would change by without the channel.

    L of a classifier is the cross-entropy with the batch's labels, or, where a batch has none, with the model's own
    predictions; of a semantic segmentation, that of each pixel. Of any other model it is half the squared norm of its
    outputs, each in units of its mean over the batch. z is the output of the tapped module, which for ReLU is as good
    as what the next layer sees.
    """

    name: ClassVar[str] = "taylor"
    passes: ClassVar[float | None] = 3.5

    def rows(self, model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any]) -> list[Tensor]:
        """See `RowCriterion.rows`.

        Raises:
            CalibrationError: Fewer than 2 images over all processes, or a loss that is not finite.
        """
        device = placement(model).device
        sums = [torch.zeros(len(tap.channel_of_row), dtype=torch.float64, device=device) for tap in taps]
        count = images_seen = 0

        def hook(i: int, tap: Tap) -> Callable[..., None]:
            @unobserved
            def forward(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                y = result if isinstance(result, Tensor) else result[0]
                value = y.detach().clone()  # the next module may work in place

                def backward(gradient: Tensor) -> None:
                    change = channels_first(value * gradient, tap.dim, count, tap.output).double()
                    sums[i] += change.flatten(1).unflatten(1, (change.shape[1], -1)).sum(2).abs().sum(0)

                y.register_hook(backward)

            return forward

        handles = [model.get_submodule(tap.output).register_forward_hook(hook(i, tap)) for i, tap in enumerate(taps)]
        try:
            with evaluating(model), torch.enable_grad():
                for number, batch in enumerate(track(batches, "gradients")):
                    images = fed(model, images_of(batch)).detach().requires_grad_()
                    count = len(images)
                    images_seen += count
                    loss = _loss(model, model(fed(model, images)), batch, count)
                    if not loss.isfinite():
                        raise CalibrationError(
                            f"the loss of batch {number} is {loss.item()}; check the images and labels"
                        )
                    torch.autograd.grad(loss, images)
        finally:
            for handle in handles:
                handle.remove()
        return mean_over_processes(sums, images_seen)


def _loss(model: nn.Module, output: Any, batch: Any, images: int) -> Tensor:
    """Sum over the images."""
    task, logits = zoo_of(model).task(model), getattr(output, "logits", output)
    if isinstance(logits, Tensor) and (task in _LOGITS or (task is None and logits.ndim == 2)):
        return F.cross_entropy(logits.float(), _labels(batch, logits), reduction="sum")
    squares = [found.float().flatten(1).square().sum(1) for found in floating_outputs(output, images)]
    if not squares:
        raise CalibrationError(f"{type(model).__name__} returns no floating-point tensor with a row for each image")
    parts = [own.sum() / own.mean().detach().clamp(min=torch.finfo(own.dtype).tiny) for own in squares]
    return torch.stack(parts).sum() / 2


def _labels(batch: Any, logits: Tensor) -> Tensor:
    """Class numbers of a batch: its second item or "labels", else the model's own predictions."""
    labels = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    elif hasattr(batch, "keys"):
        labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:1] and not labels.is_floating_point():
        return labels.to(logits.device)
    return logits.argmax(1)
