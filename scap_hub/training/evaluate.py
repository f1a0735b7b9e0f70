"""What a model costs and how well it does."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from scap_hub.errors import DataError, ModelError
from scap_hub.graph.modes import emptied_caches, evaluating, no_fast_path
from scap_hub.placement import placement
from scap_hub.private import FakeTensorMode
from scap_hub.progress import track
from scap_hub.tasks import IMAGE_CLASSIFICATION, Meter, Task
from scap_hub.text import one_line
from scap_hub.training.distributed import accelerator, shard


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    precision: str = "no",
    task: Task = IMAGE_CLASSIFICATION,
    teacher: nn.Module | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Measures a model on labelled images; the same on every rank, whatever the number of ranks.

    Args:
        model: Moved to this rank's device, evaluated in eval mode, left in the mode it was in.
        loader: Batches of (images, targets).
        precision: "bf16" or "fp16" for autocast, or "no".
        task: What the model is for.
        teacher: The dense model, for a task that is measured by its outputs; then the images need no labels.
        meter: What measures; the task's own if left out.

    Returns:
        The task's metric and its others under their keys (top1: share of images classified correctly, 0..1).
        loss: Mean loss over the images (cross-entropy in nats).
        images: How many there were.

    Raises:
        DataError: The batches have no targets, or there are none; or there is no teacher, and the task wants one.
        ModelError: The model gives NaN.
    """
    device = accelerator().device
    model.to(device)
    if task.from_teacher:
        if teacher is None:
            raise DataError(f"{task.metric.title} compares a model with its dense one: give that as teacher")
        teacher.to(device)
    else:
        teacher = None
    meter = meter or task.meter(device)
    with evaluating(model), evaluating(teacher or model):
        for batch in track(shard(loader), "evaluating", delay=1):
            if len(batch) < 2 and teacher is None:
                raise DataError(f"{task.metric.title} needs labels, and these images have none")
            images, targets = batch if len(batch) > 1 else (batch[0], None)
            if not len(images):
                continue  # none of them could be read
            with autocast(precision):
                output = task.output_for(model, images, targets)
                guide = None if teacher is None else task.output(teacher, images)
            meter.add(output, targets if teacher is None else (guide, targets))
    result = meter.result()
    if math.isnan(result["loss"]):
        dtype = placement(model).dtype
        advice = (
            "give the model in float32 or bfloat16" if dtype == torch.float16 else "check its weights and the images"
        )
        raise ModelError(f"the evaluated model gives NaN or Inf in {str(dtype).removeprefix('torch.')}: {advice}")
    return result


def autocast(precision: str) -> torch.autocast:
    """The autocast context of a recipe's precision, on this rank's device."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(accelerator().device.type, dtype, enabled=precision != "no")


@torch.no_grad()
def count(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """What the model costs, without running it where that is possible.

    Args:
        model: The model.
        input_size: (channels, height, width) in pixels.

    Returns:
        macs: Multiply-accumulate operations of one image, in convolutions and matrix products.
        params: Numbers that training changes.
        bytes: Size of parameters and buffers.

    Raises:
        ModelError: It does not run on such an image.
    """
    device, dtype = placement(model)
    tensors = [*model.parameters(), *model.buffers()]
    # A copy around the same numbers: some models cache what they compute, and fake tensors must not stay in them.
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    around = copy.deepcopy(model, {**{id(tensor): tensor for tensor in model.buffers()}, **frozen}).eval()
    counter = FlopCounterMode(display=False)
    # As matrix products: the counter does not know the CPU's fused attention, which also depends on the widths.
    with sdpa_kernel(SDPBackend.MATH), no_fast_path(), emptied_caches(model):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), counter:
                around(torch.empty(1, *input_size, device=device, dtype=dtype))
        except Exception:  # its forward pass looks at the values of a buffer
            try:
                with counter:
                    around(torch.zeros(1, *input_size, device=device, dtype=dtype))
            except Exception as error:
                raise ModelError(
                    f"{type(model).__name__} does not run on one image {input_size}: {one_line(error)}; set "
                    "model.input_size to the size that it takes"
                ) from error
    return {
        "macs": counter.get_total_flops() // 2,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
