"""Images of a `datasets` stream, shared out over readers, from any place on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from scap_hub.private import column_types
from scap_hub.tasks import Batch
from scap_hub.training.data.images import Images, Numbering, RowReader
from scap_hub.training.data.unreadable import TooManyUnreadable

BLOCK = 1000
"""Rows that are read at once, and shuffled among each other."""
MOST_WORKERS = 256

Place = tuple[int, int, int, int]
"""How far a reader is: whole passes; shards of this pass; rows of this shard, up to a block's first; of that block."""
START: Place = (0, 0, 0, 0)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """What one of several readers reads.

    Attributes:
        number: Of this reader, from 0.
        readers: How many there are, on all ranks.
    """

    number: int
    readers: int


class Stream(IterableDataset):
    """Images as they come: one pass, in which every image goes to exactly one reader.

    A reader reads shards of its own. Only where there are fewer shards than readers it reads all of them, and takes
    every so many-th row.

    Attributes:
        rows: Undecoded.
        rank: Of this process among those that read the stream together.
        ranks: How many these are.
    """

    def __init__(
        self, rows: Any, target: str | None, reader: RowReader, numbering: Numbering, seed: int | None = None
    ) -> None:
        """Args: seed: Of the order of shards, and of rows within blocks; None leaves both as they are."""
        self.rows, self.where, self.target, self.reader = rows, numbering.where, target, reader
        self.numbering, self.seed, self.rank, self.ranks = numbering, seed, 0, 1
        # Unreadable images of the last pass, by loader process.
        self.unreadable = torch.zeros(MOST_WORKERS, dtype=torch.long).share_memory_()

    @property
    def labelled(self) -> bool:
        """Whether the images have targets."""
        return self.target is not None

    @property
    def skipped(self) -> int:
        """How many images were found to be unreadable on the last pass."""
        return int(self.unreadable.sum())

    @property
    def allowed(self) -> int:
        """How many images may be unreadable."""
        try:
            return self.reader.tolerance.of(len(self))
        except TypeError:
            return self.reader.tolerance.of(None)

    def shuffled(self, seed: int) -> Stream:
        """The same images, their shards in another order, their rows in another order within blocks."""
        return Stream(self.rows, self.target, self.reader, self.numbering, seed)

    def of_rank(self, rank: int, ranks: int) -> Stream:
        """The share of one process."""
        own = Stream(self.rows, self.target, self.reader, self.numbering, self.seed)
        own.rank, own.ranks, own.unreadable = rank, ranks, self.unreadable
        return own

    def most_workers(self, ranks: int) -> int:
        """Loader processes for each of so many ranks, each of which has shards of its own."""
        return max(1, self.rows.num_shards // ranks)

    def first(self, count: int) -> Images:
        """Keeps the first images in memory."""
        import datasets

        blocks = self._blocks(Share(0, 1), START)
        rows = [row for row, _ in itertools.islice(itertools.chain.from_iterable(blocks), count)]
        kept = datasets.Dataset.from_list(rows, features=column_types(self.rows))
        return Images(kept, self.target, self.reader, self.numbering, self.allowed)

    def __len__(self) -> int:
        known = (self.rows.info.splits or {}).get(str(self.rows.split))
        if known is None or not known.num_examples:
            raise TypeError(f"{self.where} does not say how many images it has")
        return known.num_examples

    def __iter__(self) -> Iterator[Batch]:
        return (sample for sample, _ in self._pass(START))

    def endless(self, place: Place) -> Iterator[tuple[Batch, Place]]:
        """Pass after pass, from a place on: samples, each with the place after it; nothing if there are none."""
        while True:
            empty = place[1:] == START[1:]
            for sample in self._pass(place):
                empty = False
                yield sample
            if empty:
                return
            place = (place[0] + 1, 0, 0, 0)

    def _pass(self, place: Place) -> Iterator[tuple[Batch, Place]]:
        """What is left of a pass."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share, slot = Share(self.rank + self.ranks * number, self.ranks * workers), number % MOST_WORKERS
        self.unreadable[slot] = 0
        names: list[str] = []
        for count, (row, after) in enumerate(itertools.chain.from_iterable(self._blocks(share, place))):
            sample = self.reader.readable(row, self.numbering)
            if isinstance(sample, str):
                names.append(f"{self.reader.named(row, count)} ({sample})")
                self.unreadable[slot] = len(names)
                if self.skipped > self.allowed:
                    raise TooManyUnreadable.of(self.where, names, self.allowed)
            elif self.target is None or len(sample) > 1:
                yield sample, after
            else:
                yield (*sample, self.numbering.one(row[self.target])), after

    def _blocks(self, share: Share, place: Place) -> Iterator[Iterator[tuple[Row, Place]]]:
        """Blocks of rows from a place on, with the place after each row; a block that is begun is read again."""
        passed, shard, row, done = place
        rows = self._rows(passed, share, shard, row)
        while block := list(itertools.islice(rows, BLOCK)):
            order = np.arange(len(block))
            if self.seed is not None:
                order = np.random.default_rng([self.seed, passed, share.number, shard, row]).permutation(order)
            begin = (passed, shard, row)
            yield ((block[index][0], (*begin, count + 1)) for count, index in enumerate(order) if count >= done)
            (_, shard, row), done = block[-1], 0

    def _rows(self, passed: int, share: Share, shard: int, row: int) -> Iterator[tuple[Row, int, int]]:
        """A reader's rows of a pass, from one of its shards and a row of that on, with the shard and row after each."""
        count = self.rows.num_shards
        order = np.arange(count)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, passed]).permutation(order)
        # The readers take turns, so that over the passes they read equally much.
        turn = (share.number + passed) % share.readers
        step = share.readers if count < share.readers else 1
        own = order if step > 1 else order[turn :: share.readers]
        for position in range(shard, len(own)):
            rows = self.rows.shard(count, int(own[position]))
            begin = row if position == shard else 0
            # `iter` leaves the sharing out over loader processes to us.
            batches = (rows.skip(begin) if begin else rows).iter(BLOCK)
            for index, found in enumerate(_each(batches), begin):
                if step == 1 or index % step == turn:
                    yield found, position, index + 1


def _each(batches: Iterator[Mapping[str, list[Any]]]) -> Iterator[Row]:
    """Rows of batches of columns."""
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class Rounds(IterableDataset):
    """Batches of one rank's share of a stream without an end, each with its loader process and the place after it.

    Attributes:
        places: Where each loader process begins.
    """

    def __init__(self, stream: Stream, batch_size: int) -> None:
        self.stream, self.batch_size = stream, batch_size
        self.places: dict[int, Place] = {}

    def __iter__(self) -> Iterator[tuple[list[Batch], int, Place]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        samples = self.stream.endless(self.places.get(number, START))
        while batch := list(itertools.islice(samples, self.batch_size)):
            yield [sample for sample, _ in batch], number, batch[-1][1]
