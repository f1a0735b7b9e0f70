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

from scap_hub.channels.taps import Tap
from scap_hub.criteria.calibration import images_of, rereadable, watch
from scap_hub.criteria.layouts import on_grid
from scap_hub.criteria.scap.field import Field, normalise
from scap_hub.criteria.scap.spectra import spectrum
from scap_hub.criteria.scap.store import SpectraStore
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
    batches = rereadable(batches)
    for swept in _sweeps(model, taps, batches, bins):
        mine = {}
        with TemporaryDirectory(prefix="scap-hub-") as folder:
            spectra = _spectra(model, swept, batches, bins, Path(folder))
            for i, tap in enumerate(track(swept, "autoencoders")):
                x, y = (_gather(store) for store in spectra[i])
                if i % state.num_processes == state.process_index:
                    mine[i] = measure(tap, normalise(x, y, balance))
        measured = {i: value for part in gather_object([mine]) for i, value in part.items()}
        yield from ((tap, measured[i]) for i, tap in enumerate(swept))


def _spectra(
    model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int, folder: Path
) -> list[tuple[SpectraStore, SpectraStore]]:
    """Spectra of this process's images for the input and the output of each tap, in one sweep."""
    stores = {tap: (SpectraStore(folder / f"{i}.x"), SpectraStore(folder / f"{i}.y")) for i, tap in enumerate(taps)}
    seen = 0
    last: tuple[Tensor, int, SpectraStore] | None = None  # an output on its own grid: the next layer's input, as a rule

    def read_input(tap: Tap, x: Tensor) -> Sequence[int]:
        store = stores[tap][0]
        if last is not None and _same(x, *last[:2]):
            store.share(seen, last[2])
        else:
            store.write(seen, spectrum(x, x.shape[2:], bins))
        return x.shape[2:]

    def read_output(tap: Tap, grid: Sequence[int], y: Tensor) -> int:
        nonlocal last
        held, store = torch.as_tensor(tap.channel_of_row >= 0, device=y.device), stores[tap][1]
        last = (y, write_count(y), store) if held.all() and y.shape[2:] == torch.Size(grid) else None
        store.write(seen, spectrum(on_grid(y if held.all() else y[:, held], grid), grid, bins))
        return len(y)

    for counts in watch(model, taps, batches, read_input, read_output, "spectra"):
        seen += counts[0] if counts else 0
    return list(stores.values())


def _same(x: Tensor, y: Tensor, version: int) -> bool:
    """Whether x is y, and has not been written to since."""
    return (x.data_ptr(), x.shape, x.stride(), write_count(x)) == (y.data_ptr(), y.shape, y.stride(), version)


def _gather(store: SpectraStore) -> Tensor:
    """The spectra of the images of all processes."""
    state, whole = PartialState(), store.read()
    if state.num_processes > 1:
        whole = torch.cat([shard for shard in gather_object([whole]) if shard is not None])
    assert whole is not None  # `watch` refuses to see no images at all
    return whole.to(state.device)


def _sweeps(model: nn.Module, taps: Sequence[Tap], batches: Collection[Any], bins: int) -> Iterator[list[Tap]]:
    """Deals the taps out to sweeps over the batches, so that the spectra of each sweep fit onto the disk."""
    first = next(iter(batches), None)
    images = max(gather_object([0 if first is None else len(images_of(first)) * len(batches)]))
    swept: list[Tap] = []
    used = 0
    # About the order of execution: a sweep ends at the last layer that it watches.
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    for tap in sorted(taps, key=lambda tap: order[tap.module]):
        weight = model.get_parameter(tap.weight)
        width = weight.shape[1] * getattr(model.get_submodule(tap.module), "groups", 1) + len(tap.channel_of_row)
        size = images * width * bins**2 * max(weight.element_size(), 4)
        if swept and used + size > DISK:
            yield swept
            swept, used = [], 0
        swept.append(tap)
        used += size
    if swept:
        yield swept
