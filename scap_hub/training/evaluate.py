"""What a model costs and how well it does."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from scap_hub.errors import DataError
from scap_hub.graph.record import evaluating
from scap_hub.private import FakeTensorMode
from scap_hub.progress import track
from scap_hub.training.distributed import accelerator, shard
from scap_hub.zoo.base import logits


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, precision: str = "no") -> dict[str, float]:
    """Accuracy on labelled images; the same on every rank, whatever the number of ranks.

    Args:
        model: Moved to this rank's device, evaluated in eval mode, left in the mode it was in.
        loader: Batches of (images, labels).
        precision: "bf16" for autocast, or "no".

    Returns:
        top1: Share of images classified correctly, 0..1.
        loss: Mean cross-entropy in nats.
        images: How many there were.

    Raises:
        DataError: The batches have no labels, or there are none.
    """
    here = accelerator()
    model.to(here.device)
    # Correct, loss, images: sums, so that ranks may have unequal numbers of batches.
    sums = torch.zeros(3, dtype=torch.float64 if here.device.type != "mps" else torch.float32, device=here.device)
    with evaluating(model):
        for batch in track(shard(loader), "evaluating", delay=1):
            if len(batch) < 2:
                raise DataError("accuracy needs labels, and these images have none")
            images, labels = batch
            with autocast(precision):
                output = logits(model(images)).float()
            sums[0] += (output.argmax(1) == labels).sum()
            sums[1] += F.cross_entropy(output, labels, reduction="sum")
            sums[2] += len(labels)
    correct, loss, count = here.reduce(sums).tolist()
    if not count:
        raise DataError("accuracy needs at least one image")
    return {"top1": correct / count, "loss": loss / count, "images": int(count)}


def autocast(precision: str) -> torch.autocast:
    """The autocast context of a recipe's precision, on this rank's device."""
    return torch.autocast(accelerator().device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def count(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """What the model costs, without running it.

    Args:
        model: The model.
        input_size: (channels, height, width) in pixels.

    Returns:
        macs: Multiply-accumulate operations of one image, in convolutions and matrix products.
        params: Numbers that training changes.
        bytes: Size of parameters and buffers.
    """
    first = next(model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    # A copy around the same numbers: some models cache what they compute, and fake tensors must not stay in them.
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    around = copy.deepcopy(model, {**{id(tensor): tensor for tensor in model.buffers()}, **frozen}).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        around(torch.empty(1, *input_size, dtype=first.dtype, device=first.device))
    return {
        "macs": counter.get_total_flops() // 2,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
