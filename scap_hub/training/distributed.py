"""What training, calibration and evaluation share about processes and devices."""

from __future__ import annotations

import atexit
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch.utils.data import DataLoader, IterableDataset

from scap_hub.progress import set_quiet
from scap_hub.training import heartbeat

T = TypeVar("T")


@functools.cache
def accelerator() -> Accelerator:
    """The process's one Accelerator: this rank's device, and what it needs to talk to the others."""
    built = Accelerator(
        cpu=not torch.accelerator.is_available(),
        # Precision belongs to a recipe, not to the process: see `finetune`.
        mixed_precision="no",
        # Every rank keeps the batch-norm statistics of its own images; `average_buffers` joins them.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # Who is lost is found by heartbeat; who only works long is waited for.
            *([InitProcessGroupKwargs(timeout=heartbeat.PATIENCE)] if heartbeat.store() is not None else []),
        ],
    )
    if not built.is_local_main_process:
        set_quiet(True)
    # A thread of gloo that still holds a tensor aborts a process whose interpreter is gone; NCCL only warns.
    atexit.register(built.state.destroy_process_group)
    if (watch := heartbeat.start(built.process_index, built.num_processes)) is not None:
        atexit.register(watch.leave)
    return built


def from_main(make: Callable[[], T]) -> T:
    """Calls `make` on the main rank only and returns its picklable result on every rank.

    Raises:
        Exception: Whatever `make` raised, on every rank, so that none is left waiting.
    """
    result: list[Any] = [None, None]
    if accelerator().is_main_process:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def main_first(make: Callable[[], T]) -> T:
    """Calls `make` on every rank, on the main rank of each machine first, so that the others find its cache."""
    with accelerator().local_main_process_first():
        return make()


def shard(loader: DataLoader) -> Iterable[Any]:
    """This rank's batches of a loader, on its device; every image is seen by exactly one rank, once."""
    here = accelerator()
    if here.num_processes > 1 and hasattr(loader.dataset, "of_rank"):
        return prepare_data_loader(
            with_data(loader, loader.dataset.of_rank(here.process_index, here.num_processes)),
            device=here.device, put_on_device=True, num_processes=1, process_index=0,
        )  # fmt: skip
    if isinstance(loader.dataset, IterableDataset) and here.num_processes > 1:
        whole = prepare_data_loader(loader, device=here.device, put_on_device=True, num_processes=1, process_index=0)
        return itertools.islice(whole, here.process_index, None, here.num_processes)
    return prepare_data_loader(
        loader,
        device=here.device,
        put_on_device=True,
        even_batches=False,
        dispatch_batches=False,  # nothing to send, and accelerate fails on a stream that has ended
        # A shuffled loader must be shuffled alike on all ranks.
        use_seedable_sampler=True,
        data_seed=0,
    )


def with_data(loader: DataLoader, dataset: IterableDataset, **changes: Any) -> DataLoader:
    """A loader like another one, over another stream."""
    names = ("batch_size", "collate_fn", "num_workers", "pin_memory", "drop_last")
    return DataLoader(dataset, **{name: getattr(loader, name) for name in names} | changes)


@torch.no_grad()
def average_buffers(model: torch.nn.Module) -> None:
    """Replaces floating-point buffers, such as batch-norm statistics, by their mean over ranks."""
    if accelerator().num_processes > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator().reduce(buffer, reduction="mean"))
