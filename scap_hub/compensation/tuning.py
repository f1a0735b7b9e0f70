"""Tuning on the calibration images: a few hundred steps towards the dense model's outputs, without labels."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms.v2 import RandomCrop

from scap_hub.compensation.processes import sum_over_processes
from scap_hub.criteria.calibration import images_of, total_images
from scap_hub.criteria.variance import inverse_variances, outputs_of
from scap_hub.errors import CalibrationError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed, lower_precision, raise_precision, raised
from scap_hub.progress import track

STEPS = 200
"""How many steps `prune` takes where nothing is trained afterwards."""
BATCH = 32
"""Images in a step."""
RATES = (1e-3, 3e-4, 1e-4)
"""Learning rates that are tried, highest first."""
_TRIAL = 8  # a rate is tried in so small a part of the steps
_NEAR = 1.25  # so many times the lowest error is near enough in a short trial, which is too short for a high rate
TRIALS = len(RATES) / _TRIAL
"""Steps that go into finding the rate, for each step at that rate."""
_SHIFT = 0.1  # of an image's sides, at most
_JUDGES = 1 << 32  # apart from all seeds of the steps
Distance = Callable[[nn.Module, nn.Module, Tensor], Tensor]


def tune(
    dense: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = STEPS,
    learning_rate: float | None = None,
    seed: int = 0,
    distance: Distance | None = None,
) -> tuple[float, float]:
    """Moves the weights of a pruned model in place, so that its outputs come near the dense model's.

    Each step takes 32 calibration images, shifted, half of them mixed with another one: the dense model says what the
    outputs for such an image should be, so few images go a long way. Batch norms keep their statistics. If the outputs
    have not come nearer in the end, the weights are what they were, and a warning says so if they have gone away. That
    is judged by calibration images that are shifted and mixed in other ways: for the images as they are, a repaired
    model is better than for any others.

    Args:
        dense: The model before surgery.
        small: The pruned model, repaired if it is to be; changed in place, on all processes alike.
        batches: Calibration batches (this process's share, not empty); images only are used.
        steps: Of AdamW, over one cycle of the learning rate; 0 does nothing.
        learning_rate: The highest one. Left out, it is the highest of `RATES` that a short cycle shows to be harmless:
            what a layer bears depends on the batch norm behind it, whose statistics are fixed.
        seed: Of what is drawn.
        distance: Of the outputs of the pruned model from the dense one's for some images, given both models and these;
            mean over the images. Left out, outputs are compared place by place: their squared distance, relative to the
            variance over the images, mean over the outputs.

    Returns:
        The distance for shifted and mixed calibration images that no step took, before and after.

    Raises:
        CalibrationError: Fewer than 2 images over all processes, or outputs that are not finite.
    """
    shares = [images_of(batch) for batch in batches]
    in_all = total_images(sum(map(len, shares)))
    dense, precisions = raised(dense), raise_precision(small)
    images = fed(small, torch.cat(shares))
    try:
        with evaluating(dense), evaluating(small):
            apart = distance or _place_by_place(dense, images, in_all)
            judges = _judges(images, seed)
            before = _error(dense, small, judges, apart)
            state = copy.deepcopy(small.state_dict())

            def trained(steps: int, rate: float) -> float:
                small.load_state_dict(state)
                _train(dense, small, images, apart, steps, rate, seed)
                error = _error(dense, small, judges, apart)
                return math.inf if math.isnan(error) else error  # so that it compares as worse

            if learning_rate is None:
                found = {rate: trained(steps // _TRIAL, rate) for rate in RATES}
                learning_rate = next((rate for rate in RATES if found[rate] <= _NEAR * min(found.values())), RATES[-1])
            after = trained(steps, learning_rate)
            if not after < before:
                small.load_state_dict(state)
                if before < float("inf") and not after <= before:
                    warnings.warn(
                        f"tuning at the learning rate {learning_rate:g} took the outputs away from the dense model's, "
                        "so the weights are those before it; a tenth of the rate may do better",
                        stacklevel=2,
                    )
                after = before
    finally:
        lower_precision(small, precisions)
    if not before < float("inf"):
        raise CalibrationError("NaN or Inf in the outputs for the calibration images; check the images and the weights")
    return before, after


def _train(
    dense: nn.Module, small: nn.Module, images: Tensor, distance: Distance, steps: int, rate: float, seed: int
) -> None:
    weights = [weight for weight in small.parameters() if weight.requires_grad]
    if not steps or not weights:
        return
    optimizer = AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, rate, total_steps=steps)
    state = PartialState()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed + state.process_index)
        for _ in track(range(steps), "tuning"):
            loss = distance(small, dense, _varied(images[torch.randint(len(images), (BATCH,))]))
            if not loss.requires_grad:
                warnings.warn("no gradient of the outputs reaches the weights: they are not tuned", stacklevel=3)
                return
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.grad = sum_over_processes(gradient) / state.num_processes
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()


def _judges(images: Tensor, seed: int) -> list[Tensor]:
    """The images in batches, each shifted or mixed once, in a draw of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(_JUDGES + seed)
        return [_varied(batch) for batch in images[torch.randperm(len(images))].split(BATCH)]


def _varied(images: Tensor) -> Tensor:
    """Shifted images, if they are such, half of them mixed with another one."""
    mixed = _mixed(images)
    if images.ndim != 4:
        return mixed
    height, width = images.shape[2:]
    margins = [math.ceil(_SHIFT * side) for side in (width, height)]
    # What comes in at the border continues the image: a border of one colour is nothing that a model has seen.
    return RandomCrop((height, width), padding=margins, padding_mode="edge")(mixed)


def _mixed(images: Tensor) -> Tensor:
    """The first half of them each mixed with another, in equal parts at most."""
    half = len(images) // 2
    share = torch.rand(half, *[1] * (images.ndim - 1)).to(images) / 2
    others = images[torch.randperm(len(images))[:half]]
    return torch.cat([images[:half] * (1 - share) + others * share, images[half:]])


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """As `outputs_of`, in single precision."""
    return [z.float() for z in outputs_of(model, images)]


def _place_by_place(dense: nn.Module, images: Tensor, in_all: int) -> Distance:
    """The squared distance of outputs, relative to their variance over all processes' calibration images."""
    with torch.no_grad():
        scales = inverse_variances(_outputs(dense, batch) for batch in images.split(BATCH))

    def distance(small: nn.Module, dense: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _outputs(dense, batch)
        pairs = zip(_outputs(small, batch), wanted, scales, strict=True)
        parts = [scale * (z - y).square().sum() for z, y, scale in pairs]
        return torch.stack(parts).sum() * in_all / len(batch) if parts else torch.zeros(())

    return distance


@torch.no_grad()
def _error(dense: nn.Module, small: nn.Module, batches: Sequence[Tensor], distance: Distance) -> float:
    """The distance, mean over the images of all processes."""
    parts = [distance(small, dense, batch).double() * len(batch) for batch in batches]
    return float(sum_over_processes(torch.stack(parts).sum())) / total_images(sum(map(len, batches)))
