"""Sweeps over the calibration images that bring together the field of one layer after the other.

Exact scores compare all images with each other, so the spectra of all of them are needed at once. In files, they take
no more memory than those of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from scap_hub.channels.groups import Tap
from scap_hub.criteria.calibration import images_of, sized, watch
from scap_hub.criteria.scap.field import Field, normalise
from scap_hub.criteria.scap.shelf import Shelf
from scap_hub.criteria.scap.spectra import onto, spectrum
from scap_hub.private import write_count
from scap_hub.progress import track

DISK = 2**32  # bytes of spectra that a process has in files at a time; more take further sweeps over the batches

T = TypeVar("T")


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
        mine = {}
        with TemporaryDirectory(prefix="scap-hub-") as folder:
            spectra = _spectra(model, some, batches, bins, Path(folder))
            for i, tap in enumerate(track(some, "autoencoders")):
                x, y = (_gather(shelf) for shelf in spectra[i])
                if i % state.num_processes == state.process_index:
                    mine[i] = measure(tap, normalise(x, y, balance))
        measured = {i: value for part in gather_object([mine]) for i, value in part.items()}
        yield from ((tap, measured[i]) for i, tap in enumerate(some))


def _spectra(
    model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int, folder: Path
) -> list[tuple[Shelf, Shelf]]:
    """Spectra of this process's images for the input and the output of each tap, in one sweep."""
    shelves = {tap: (Shelf(folder / f"{i}.x"), Shelf(folder / f"{i}.y")) for i, tap in enumerate(taps)}
    seen = 0
    last: tuple[Tensor, int, Shelf] | None = None  # an output on its own grid: the next layer's input, as a rule

    def read_input(tap: Tap, x: Tensor) -> Sequence[int]:
        shelf = shelves[tap][0]
        if last is not None and _same(x, *last[:2]):
            shelf.share(seen, last[2])
        else:
            shelf.put(seen, spectrum(x, x.shape[2:], bins))
        return x.shape[2:]

    def read_output(tap: Tap, grid: Sequence[int], y: Tensor) -> int:
        nonlocal last
        held, shelf = torch.as_tensor(tap.channel_of_row >= 0, device=y.device), shelves[tap][1]
        last = (y, write_count(y), shelf) if held.all() and y.shape[2:] == torch.Size(grid) else None
        shelf.put(seen, spectrum(onto(y if held.all() else y[:, held], grid), grid, bins))
        return len(y)

    for counts in watch(model, taps, batches, read_input, read_output, "spectra"):
        seen += counts[0] if counts else 0
    return list(shelves.values())


def _same(x: Tensor, y: Tensor, version: int) -> bool:
    """Whether x is y, and has not been written to since."""
    return (x.data_ptr(), x.shape, x.stride(), write_count(x)) == (y.data_ptr(), y.shape, y.stride(), version)


def _gather(shelf: Shelf) -> Tensor:
    """The spectra of the images of all processes."""
    state, whole = PartialState(), shelf.get()
    if state.num_processes > 1:
        whole = torch.cat([shard for shard in gather_object([whole]) if shard is not None])
    assert whole is not None  # `watch` refuses to see no images at all
    return whole.to(state.device)


def _rounds(model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int) -> Iterator[list[Tap]]:
    """Cuts the taps into runs whose spectra fit onto the disk; each costs a sweep over the batches."""
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
        if some and used + size > DISK:
            yield some
            some, used = [], 0
        some.append(tap)
        used += size
    if some:
        yield some
