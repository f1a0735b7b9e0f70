"""Watching a model: the input and the output of chosen layers, batch by batch, without keeping either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.groups import Tap
from scap_hub.errors import CalibrationError, ModelError
from scap_hub.progress import track


class Reached(Exception):
    """Raised in a hook that has seen the last layer of interest: the rest of the forward pass is not needed."""


A = TypeVar("A")
B = TypeVar("B")


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer was called with, as its hooks see the call."""
    return args[0] if args else next(iter(kwargs.values()))


def images_of(batch: Any) -> Tensor:
    """The images in a batch: the tensor itself, the first item of a tuple or list, or `batch["pixel_values"]`.

    Raises:
        CalibrationError: The batch holds no image tensor in any of these places.
    """
    images = batch
    if isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    elif hasattr(batch, "keys"):
        images = batch.get("pixel_values")
    if not isinstance(images, Tensor) or not images.ndim:
        raise CalibrationError(
            f"no images in a calibration batch of type {type(batch).__name__}; "
            "give a tensor, a tuple that starts with one, or a dict with 'pixel_values'"
        )
    return images


def sized(batches: Iterable[Any]) -> Collection[Any]:
    """The batches, as something that has a length and can be read more than once."""
    try:
        len(batches)  # type: ignore[arg-type]
    except TypeError:
        return [images_of(batch) for batch in batches]
    return batches  # type: ignore[return-value]


def watch(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Iterable[Any],
    read_input: Callable[[Tap, Tensor], A],
    read_output: Callable[[Tap, A, Tensor], B],
    description: str = "calibrating",
) -> Iterator[list[B]]:
    """Runs the model over the batches in eval mode without gradients and reads each tap's input and output.

    Both readers run inside the forward pass, so what they return should be small; a layer's activations are not kept.
    Of a layer that runs several times in one forward pass the last run counts, and of its `output` module the first
    run after that: an activation module that several layers share is read where this layer uses it.

    Args:
        model: The model; hooks are removed and training modes restored at the end.
        taps: What to watch.
        batches: Image tensors, tuples or lists whose first item is one, or dicts with "pixel_values". They are moved to
            the device and floating type of the model.
        read_input: Called with a tap and its layer's input X, channels first: (N, C, *axes).
        read_output: Called with a tap, what `read_input` returned and the channels as the next layer sees them,
            (N, O, *axes), where O is the number of rows of the tap's weight.
        description: Of the progress bar.

    Yields:
        For each batch, the value of `read_output` for each tap.

    Raises:
        CalibrationError: NaN or Inf in a watched tensor, or fewer than 2 images over all processes.
        ModelError: A tap that does not run, or whose output does not fit its weight.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    inputs: dict[int, A] = {}
    outputs: dict[int, B] = {}
    finite: list[tuple[str, Tensor]] = []  # in the order of execution, so that the first culprit is named
    count = 0  # images in the current batch
    watched = None  # tensors that a forward pass shows, once one has run to its end

    def input_hook(i: int, tap: Tap, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            finite.append((f"input of layer {tap.module!r}", x.sum(dtype=torch.float32).isfinite()))
            inputs[i] = read_input(tap, channels_first(x, dim, count, tap.module))
            outputs.pop(i, None)

        return hook

    def output_hook(i: int, tap: Tap, rows: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if i not in inputs or i in outputs:
                return
            y = result if isinstance(result, Tensor) else result[0]
            for function in tap.post:
                # A clone, because an activation may work in place and the model still needs its tensor.
                y = function(y.clone())
            finite.append((f"output of layer {tap.module!r}", y.sum(dtype=torch.float32).isfinite()))
            y = channels_first(y, tap.dim, count, tap.output)
            if y.shape[1] != rows:
                raise ModelError(
                    f"{tap.output!r} gives {y.shape[1]} channels, but layer {tap.module!r} has {rows}; "
                    "protect this layer, or watch it elsewhere"
                )
            outputs[i] = read_output(tap, inputs[i], y)
            if len(finite) == watched:
                raise Reached

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = []
    seen = 0
    try:
        model.eval()
        for i, tap in enumerate(taps):
            weight = model.get_parameter(tap.weight)
            before = input_hook(i, tap, -1 if weight.ndim == 2 else 1)
            handles.append(model.get_submodule(tap.module).register_forward_pre_hook(before, with_kwargs=True))
            after = output_hook(i, tap, len(tap.channel_of_row))
            handles.append(model.get_submodule(tap.output).register_forward_hook(after))
        for number, batch in enumerate(track(batches, description)):
            images = images_of(batch).to(parameter.device, parameter.dtype)
            count = len(images)
            seen += count
            with torch.no_grad(), contextlib.suppress(Reached):
                model(images)
            watched = len(finite)
            if finite and not torch.stack([flag for _, flag in finite]).all():
                place = next(name for name, flag in finite if not flag)
                raise CalibrationError(f"NaN or Inf in the {place}, batch {number}; check the images and the weights")
            for i, tap in enumerate(taps):
                if i not in outputs:
                    raise ModelError(f"layer {tap.module!r} or its output {tap.output!r} does not run; protect it")
            yield [outputs[i] for i in range(len(taps))]
            for store in (inputs, outputs, finite):
                store.clear()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    enough(seen)


def enough(seen: int) -> int:
    """Number of images over all processes.

    Raises:
        CalibrationError: Fewer than 2.
    """
    total = sum(gather_object([seen]))
    if total < 2:
        raise CalibrationError(f"{total} calibration image(s); at least 2 are needed, 128 or more are advised")
    return total


def image_means(
    model: nn.Module, taps: Sequence[Tap], batches: Iterable[Any], read: Callable[[Sequence[int], Tensor], Tensor]
) -> list[Tensor]:
    """Mean over the images of all processes of what `read` gives for each image, (N, Q).

    Args:
        model: See `watch`.
        taps: See `watch`.
        batches: See `watch`.
        read: Called with the axes of a layer's input X and the channels as the next layer sees them.

    Returns:
        For each tap, (Q,) float64 on the CPU.

    Raises:
        CalibrationError, ModelError: See `watch`.
    """
    if not taps:
        return []
    device = next(model.parameters()).device
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in taps]
    seen = 0
    for batch in watch(model, taps, batches, lambda tap, x: x.shape[2:], lambda tap, grid, y: read(grid, y)):
        seen += len(batch[0]) if batch else 0
        sums = [total + values.double().sum(0) for total, values in zip(sums, batch, strict=True)]
    return mean_over_processes(sums, seen)


def mean_over_processes(sums: Sequence[Tensor], count: int) -> list[Tensor]:
    """Sums over this process's images, divided by the number of all images, on the CPU.

    Raises:
        CalibrationError: Fewer than 2 images over all processes.
    """
    shards = gather_object([[total.cpu() for total in sums]])
    images = enough(count)
    return [sum(parts) / images for parts in zip(*shards, strict=True)]


def channels_first(maps: Tensor, dim: int, images: int, layer: str) -> Tensor:
    """(N, C, *axes) from a tensor with its channels at `dim`; windows folded into the batch become an axis."""
    if maps.shape[0] != images:
        if maps.shape[0] % images:
            raise ModelError(f"{layer!r} sees {maps.shape[0]} items for {images} images; protect this layer")
        maps, dim = maps.unflatten(0, (images, -1)), dim + 1 if dim > 0 else dim
    return maps.movedim(dim, 1)
