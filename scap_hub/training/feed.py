"""This rank's training batches, in any portions, from any place on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from scap_hub.errors import DataError, TrainingError
from scap_hub.progress import tell
from scap_hub.recipe import FinetuneSettings
from scap_hub.tasks import Batch
from scap_hub.training.data.stream import Rounds, Stream
from scap_hub.training.distributed import accelerator, with_data
from scap_hub.training.random_states import generators, random_states, set_random_states


def steps_at_ends(given: DataLoader, settings: FinetuneSettings, batches: int | None = None) -> list[int]:
    """How many optimiser steps are done when each epoch ends.

    Args:
        given: The training images.
        settings: Where they say how many steps to train for, an epoch is an equal part of these, else a pass.
        batches: Of each rank, in a pass; about as many as the loader says, if left out.

    Raises:
        DataError: There is less than a batch for each rank, or nobody knows how many there are.
    """
    if batches == 0:
        raise _too_few(given)
    if settings.steps is not None:
        epochs = min(settings.epochs, settings.steps)
        return [round(settings.steps * (epoch + 1) / epochs) for epoch in range(epochs)]
    if not settings.epochs:
        return []
    each = math.ceil((_batches(given) if batches is None else batches) / settings.gradient_accumulation)
    return [each * (epoch + 1) for epoch in range(settings.epochs)]


def _batches(given: DataLoader) -> int:
    """How many batches each rank has in a pass."""
    ranks = accelerator().num_processes
    try:
        batches = len(given) / ranks
    except TypeError as error:
        images = given.batch_size * ranks if given.batch_size else "the images of a step"
        raise DataError(
            f"cannot fine-tune by epochs on a stream of unknown length: {error}; set finetune.steps, the number of "
            f"optimiser steps to train for; a pass over all images takes their number / {images}"
        ) from None
    # Every rank of a stream trains on whole batches alone.
    batches = int(batches) if isinstance(given.dataset, Stream) else math.ceil(batches)
    if not batches:
        raise _too_few(given)
    return batches


def _too_few(given: DataLoader) -> DataError:
    return DataError(
        f"too few training images for a batch of {given.batch_size} on each of {accelerator().num_processes} "
        "processes; lower data.batch_size, or that of the DataLoader"
    )


class Passes:
    """Pass after pass over a loader that accelerate shares out over the ranks."""

    def __init__(self, given: DataLoader) -> None:
        self.generators = generators(given)
        self.loader: Any = accelerator().prepare(given)
        self._passes, self._taken = 0, 0
        self._began: dict[str, Any] = {}
        self._running: Iterator[Batch] | None = None

    @property
    def batches(self) -> int | None:
        """Of this rank, in a pass; None where it is unknown."""
        try:
            return len(self.loader)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last portion ended."""
        while True:
            running = self._running or self._begin()
            for batch in running:
                self._taken += 1
                yield batch
            if not self._taken:
                raise DataError(f"process {accelerator().process_index} has no training images: give more")
            self._passes, self._taken, self._running = self._passes + 1, 0, None

    def _begin(self) -> Iterator[Batch]:
        self.loader.set_epoch(self._passes + 1)
        self._began = random_states(self.generators)
        self._running = iter(self.loader)
        return self._running

    def close(self) -> None:
        """Lets go of a pass that has begun."""
        self._running = None
        self.loader.end()

    def state_dict(self) -> dict[str, Any]:
        """The place; at the end of a pass that of the next one's begin."""
        ended = self._taken == self.batches
        state = {"passes": self._passes + ended, "taken": 0 if ended else self._taken, "began": {}}
        return state if ended else state | {"began": self._began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place; inside a pass by reading once more what comes before it."""
        self._passes, self._taken, self._running = state["passes"], 0, None
        if state["taken"]:
            tell(f"reading {state['taken']} batches again, to go on where the training was interrupted")
            set_random_states(state["began"], self.generators)
            running = self._begin()
            while self._taken < state["taken"] and next(running, None) is not None:
                self._taken += 1


@dataclass(frozen=True)
class _Placed:
    """A collate function of batches that come with a loader process and a place."""

    collate: Callable[[Any], Batch]

    def __call__(self, item: tuple[Any, int, Any]) -> tuple[Batch, int, Any]:
        samples, worker, place = item
        return self.collate(samples), worker, place


class Streamed:
    """A stream, of which each rank reads its own share, pass after pass."""

    def __init__(self, given: DataLoader) -> None:
        here, stream = accelerator(), given.dataset
        assert isinstance(stream, Stream) and given.batch_size is not None
        if stream.rows.num_shards < here.num_processes:
            tell(
                f"{stream.where} has {stream.rows.num_shards} files for {here.num_processes} processes: each of them "
                "reads all of it; as many files as processes, or more, spare that"
            )
        self.generators: dict[str, torch.Generator] = {}
        self.rounds = Rounds(stream.of_rank(here.process_index, here.num_processes), given.batch_size)
        collate = _Placed(given.collate_fn)
        self.loader = with_data(given, self.rounds, batch_size=None, collate_fn=collate, drop_last=False)

    @property
    def batches(self) -> None:
        """A stream is not divided into passes."""

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last portion ended, with fresh loader processes, as after a resume."""
        device, empty = accelerator().device, True
        for batch, worker, place in self.loader:
            self.rounds.places[worker] = tuple(place)
            empty = False
            yield send_to_device(batch, device, non_blocking=True)
        if empty:
            raise DataError(
                f"process {accelerator().process_index} finds no images in its share of {self.rounds.stream.where}: "
                "use fewer processes, or give more images"
            )

    def close(self) -> None:
        """There is nothing to let go of."""

    def state_dict(self) -> dict[str, Any]:
        """The place of each loader process."""
        return {"workers": self.loader.num_workers, "places": {k: list(v) for k, v in self.rounds.places.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place.

        Raises:
            TrainingError: There was another number of loader processes.
        """
        if state["workers"] != self.loader.num_workers:
            raise TrainingError(
                f"the stream was read by {state['workers']} loader processes, not {self.loader.num_workers}; set "
                f"data.workers to {state['workers']} to go on"
            )
        self.rounds.places = {worker: tuple(place) for worker, place in state["places"].items()}


Feed = Passes | Streamed


def feed(given: DataLoader) -> Feed:
    """This rank's training batches."""
    return Streamed(given) if isinstance(given.dataset, Stream) else Passes(given)
