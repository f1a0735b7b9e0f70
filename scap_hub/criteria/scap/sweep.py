"""Sweeps over the calibration images that bring together the field of one layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.groups import Tap
from scap_hub.criteria.scap.field import Field, normalise
from scap_hub.criteria.scap.spectra import onto, spectrum
from scap_hub.criteria.taps import images_of, sized, watch
from scap_hub.progress import track

MEMORY = 2**32  # bytes of spectra that a process holds at a time; more of them take further sweeps over the batches

T = TypeVar("T")
Spectra = tuple[Tensor, Tensor]


def fields(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Iterable[Any],
    bins: int,
    balance: bool,
    measure: Callable[[Tap, Field], T],
) -> Iterator[tuple[Tap, T]]:
    """Measures the field of each layer; the layers are shared out over the processes.

    Args:
        model: See `watch`.
        taps: The layers; only rows that belong to a channel enter the field.
        batches: See `watch`.
        bins: Frequencies kept on each axis.
        balance: See `normalise`.
        measure: Called with a tap and its field on one process; the result goes to all of them.

    Yields:
        Each tap and what was measured, in the order of the sweeps.
    """
    state = PartialState()
    batches = sized(batches)
    for some in _rounds(model, taps, batches, bins):
        spectra = _spectra(model, some, batches, bins)
        mine = {}
        for i, tap in enumerate(track(some, "autoencoders")):
            x, y = _gather(spectra[i])
            spectra[i] = None
            if i % state.num_processes == state.process_index:
                mine[i] = measure(tap, normalise(x, y, balance))
        measured = {i: value for part in gather_object([mine]) for i, value in part.items()}
        yield from ((tap, measured[i]) for i, tap in enumerate(some))


def _spectra(model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int) -> list[Spectra | None]:
    """Spectra of this process's images for each tap, in one sweep; None if it has no images."""

    def read_input(tap: Tap, x: Tensor) -> tuple[Sequence[int], Tensor]:
        return x.shape[2:], spectrum(x, x.shape[2:], bins)

    def read_output(tap: Tap, read: tuple[Sequence[int], Tensor], y: Tensor) -> Spectra:
        grid, x = read
        held = torch.as_tensor(tap.channel_of_row >= 0, device=y.device)
        return x, spectrum(onto(y if held.all() else y[:, held], grid), grid, bins)

    images = sum(len(images_of(batch)) for batch in batches)
    spectra: list[Spectra | None] = [None] * len(taps)
    seen = 0
    for batch in watch(model, taps, batches, read_input, read_output, "spectra"):
        for i, (x, y) in enumerate(batch):
            # One place for all images from the start: putting batches together afterwards would take twice the memory.
            whole_x, whole_y = spectra[i] or (x.new_empty(images, *x.shape[1:]), y.new_empty(images, *y.shape[1:]))
            whole_x[seen : seen + len(x)], whole_y[seen : seen + len(y)] = x, y
            spectra[i] = whole_x, whole_y
        seen += len(batch[0][0]) if batch else 0
    return spectra


def _gather(spectra: Spectra | None) -> Spectra:
    """The spectra of the images of all processes."""
    if PartialState().num_processes == 1:
        assert spectra is not None  # `watch` refuses to see no images at all
        return spectra
    shards = gather_object([spectra and (spectra[0].cpu(), spectra[1].cpu())])
    held = [shard for shard in shards if shard is not None]
    device = PartialState().device
    return torch.cat([x for x, _ in held]).to(device), torch.cat([y for _, y in held]).to(device)


def _rounds(model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int) -> Iterator[list[Tap]]:
    """Cuts the taps into runs whose spectra fit into memory; each costs a sweep over the batches.

    Exact scores need all pairs of images, so the spectra of a layer are held together, but not those of all layers.
    """
    first = next(iter(batches), None)
    images = max(gather_object([0 if first is None else len(images_of(first)) * len(batches)]))
    some: list[Tap] = []
    used = 0
    # About the order of execution: a sweep ends at the last layer that it watches.
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    for tap in sorted(taps, key=lambda tap: order[tap.module]):
        weight = model.get_parameter(tap.weight)
        width = weight.shape[1] * getattr(model.get_submodule(tap.module), "groups", 1) + len(tap.channel_of_row)
        size = images * width * bins**2 * max(weight.element_size(), 4)
        if some and used + size > MEMORY:
            yield some
            some, used = [], 0
        some.append(tap)
        used += size
    if some:
        yield some
