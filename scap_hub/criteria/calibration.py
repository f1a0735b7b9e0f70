"""Watching a model on calibration images: the input and the output of chosen layers, without keeping either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.taps import Tap
from scap_hub.criteria.layouts import channels_first
from scap_hub.errors import CalibrationError, ModelError
from scap_hub.graph.record import evaluating
from scap_hub.placement import fed, placement
from scap_hub.private import unobserved
from scap_hub.progress import track


class AllSeen(Exception):
    """Raised in a hook that has seen the last layer of interest: the rest of the forward pass is not needed."""


A = TypeVar("A")
B = TypeVar("B")


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer was called with, as its hooks see the call."""
    return args[0] if args else next(iter(kwargs.values()))


def images_of(batch: Any) -> Tensor:
    """The images in a batch: the tensor itself, the first item of a tuple or list, or `batch["pixel_values"]`.

    Raises:
        CalibrationError: The batch holds no image tensor in any of these places, or one of no images.
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
    if not len(images):
        raise CalibrationError(f"a calibration batch of shape {tuple(images.shape)} holds no image; leave it out")
    return images


def rereadable(batches: Iterable[Any]) -> Collection[Any]:
    """The batches, as something that has a length and can be read more than once."""
    try:
        len(batches)  # type: ignore[arg-type]
    except TypeError:
        return [images_of(batch) for batch in batches]
    return batches  # type: ignore[return-value]


def total_images(here: int) -> int:
    """Number of images over all processes.

    Args:
        here: Images of this process.

    Raises:
        CalibrationError: Fewer than 2.
    """
    total = sum(gather_object([here]))
    if total < 2:
        raise CalibrationError(f"{total} calibration image(s); at least 2 are needed, 128 or more are advised")
    return total


def count_images(batches: Iterable[Any]) -> int:
    """Number of images in the batches of all processes.

    Raises:
        CalibrationError: Fewer than 2, or a batch without images.
    """
    return total_images(sum(len(images_of(batch)) for batch in batches))


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
    forward = _WatchedForward(model, taps, read_input, read_output)
    seen = 0
    with evaluating(model), forward.hooks():
        for number, batch in enumerate(track(batches, description)):
            images = fed(model, images_of(batch))
            seen += len(images)
            yield forward(images, number)
    total_images(seen)


class _WatchedForward(Generic[A, B]):
    """Forward passes that end as soon as every tap has been read."""

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        read_input: Callable[[Tap, Tensor], A],
        read_output: Callable[[Tap, A, Tensor], B],
    ) -> None:
        self._model, self._taps = model, taps
        self._read_input, self._read_output = read_input, read_output
        self._images = 0  # of the current batch
        self._inputs: dict[int, A] = {}  # by number of the tap
        self._outputs: dict[int, B] = {}
        self._finite: list[tuple[str, Tensor]] = []  # in the order of execution, so that the first culprit is named
        self._readings: int | None = None  # how many a forward pass makes, known once one has run to its end

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on the taps' modules, removed at the end."""
        with contextlib.ExitStack() as stack:
            for i, tap in enumerate(self._taps):
                layer, output = (self._model.get_submodule(path) for path in (tap.module, tap.output))
                before, after = partial(self._before_layer, i), partial(self._after_output, i)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(output.register_forward_hook(after).remove)
            yield

    def __call__(self, images: Tensor, number: int) -> list[B]:
        """What is read of each tap, on one batch and with its number."""
        self._images = len(images)
        for store in (self._inputs, self._outputs, self._finite):
            store.clear()
        with torch.no_grad(), contextlib.suppress(AllSeen):
            self._model(images)
        self._readings = len(self._finite)
        if self._finite and not all(bool(flag) for _, flag in self._finite):
            place = next(name for name, flag in self._finite if not flag)
            raise CalibrationError(f"NaN or Inf in the {place}, batch {number}; check the images and the weights")
        for i, tap in enumerate(self._taps):
            if i not in self._outputs:
                raise ModelError(f"layer {tap.module!r} or its output {tap.output!r} does not run; protect it")
        return [self._outputs[i] for i in range(len(self._taps))]

    @unobserved
    def _before_layer(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap, x = self._taps[i], input_of(args, kwargs)
        self._note_finite(f"input of layer {tap.module!r}", x)
        dim = -1 if self._model.get_parameter(tap.weight).ndim == 2 else 1
        self._inputs[i] = self._read_input(tap, channels_first(x, dim, self._images, tap.module))
        self._outputs.pop(i, None)

    @unobserved
    def _after_output(self, i: int, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if i not in self._inputs or i in self._outputs:
            return
        tap, y = self._taps[i], result if isinstance(result, Tensor) else result[0]
        for function in tap.post:
            # A clone, because an activation may work in place and the model still needs its tensor.
            y = function(y.clone())
        self._note_finite(f"output of layer {tap.module!r}", y)
        y = channels_first(y, tap.dim, self._images, tap.output)
        rows = len(tap.channel_of_row)
        if y.shape[1] != rows:
            raise ModelError(
                f"{tap.output!r} gives {y.shape[1]} channels, but layer {tap.module!r} has {rows}; "
                "protect this layer, or watch it elsewhere"
            )
        self._outputs[i] = self._read_output(tap, self._inputs[i], y)
        if len(self._finite) == self._readings:
            raise AllSeen

    def _note_finite(self, place: str, values: Tensor) -> None:
        self._finite.append((place, values.sum(dtype=torch.float32).isfinite()))


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
    sums = [torch.zeros((), dtype=torch.float64, device=placement(model).device) for _ in taps]
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
    shares = gather_object([[total.cpu() for total in sums]])
    images = total_images(count)
    return [sum(parts) / images for parts in zip(*shares, strict=True)]
