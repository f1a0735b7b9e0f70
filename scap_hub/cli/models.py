"""Commands that ask something of a model: inspect, bench."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scap_hub.cli.groups import print_groups
from scap_hub.cli.options import AsJson, Checkpoint, Model, Quiet, Size
from scap_hub.cli.output import output, print_table
from scap_hub.progress import announce

if TYPE_CHECKING:
    from scap_hub.channels import ChannelGroup, ChannelGroups
    from scap_hub.zoo import LoadedModel


class Sort(str, Enum):
    """Orders of groups."""

    order = "order"
    macs = "macs"


def inspect(
    model: Model,
    untrained: Annotated[bool, typer.Option("--untrained", help="Random weights: nothing is downloaded.")] = False,
    size: Size = None,
    checkpoint: Checkpoint = None,
    sort: Annotated[Sort, typer.Option(help="Blocks in network order, or the dearest groups first.")] = Sort.order,
    wide: Annotated[bool, typer.Option("--wide", help="All columns, however wide the terminal is.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List a model's channel groups: size, share of the MACs, constraint, and why some cannot be pruned.

    Example: scap-hub inspect resnet18 --untrained --sort macs
    """
    with output(quiet or as_json):
        groups = groups_of(model, untrained, size, checkpoint)[1]
    rows = [_described(group, share) for group, share in zip(groups, _mac_shares(groups), strict=True)]
    if sort is Sort.macs:
        rows.sort(key=lambda row: -row["macs"])
    if as_json:
        print(json.dumps(rows))
    elif not quiet and wide:
        head = ["group", "size", "producers", "MACs", "constraint", "pinned because it"]
        print_table(head, [_cells(row) for row in rows], fitted=False)
    elif not quiet:
        print_groups(rows, blocks=sort is Sort.order)


def _described(group: ChannelGroup, mac_share: float) -> dict[str, Any]:
    """A channel group as a script reads it."""
    return {
        "name": group.name,
        "size": group.size,
        "producers": group.producers,
        "consumers": group.consumers,
        "constraint": list(dict.fromkeys(balance.reason for balance in group.constraint or ())),
        "macs": mac_share,
        "prunable": group.prunable,
        "pinned_because": group.pinned_because,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """A channel group as a person reads it."""
    constraint, reason = "; ".join(row["constraint"]), row["pinned_because"] or ""
    return [row["name"], str(row["size"]), "\n".join(row["producers"]), f"{row['macs']:.1%}", constraint, reason]


def bench(
    model: Annotated[str, typer.Argument(help="timm name, Hub id or folder, of a dense or a pruned model.")],
    against: Annotated[
        str | None, typer.Option(help="What to compare with; a pruned model's dense one if left out.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Images at once, with commas between.")] = "1,64",
    dtype: Annotated[str, typer.Option(help="fp32, fp16, bf16, with commas between.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Measure torch.compile too.")] = False,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime, openvino, with commas between: files on the CPU, not torch.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With --runtime: measure int8 too.")] = False,
    threads: Annotated[str, typer.Option(help="With --runtime: how many, with commas between.")] = "1",
    size: Size = None,
    checkpoint: Checkpoint = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency and throughput, in turns with the dense model, on the device at hand.

    Example: scap-hub bench resnet50-half --batch 1,64 --dtype fp32,bf16 --compile

    In runtimes: scap-hub bench resnet50-half --runtime onnxruntime,openvino --int8 --threads 1,4
    """
    batches, pixels = _numbers(batch), None if size is None else (3, size, size)
    if runtime is not None:
        _bench_runtimes(model, against, runtime, int8, threads, batches, pixels, checkpoint, quiet, as_json)
        return
    with output(quiet or as_json):
        from scap_hub.run.bench import bench as measure
        from scap_hub.timing.clock import device_name
        from scap_hub.training.distributed import accelerator

        rows = measure(
            model, against, batch_sizes=batches, dtypes=dtype.split(","), compile=compile, size=pixels,
            checkpoint=checkpoint,
        )  # fmt: skip
        device = device_name(accelerator().device)
    if as_json:
        print(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}))
    elif not quiet:
        print(f"on {device}")
        print_table(
            ["model", "batch", "dtype", "mode", "ms", "images/s", "speed-up"],
            [
                [row.model, str(row.batch), row.dtype, row.mode, f"{row.ms:.2f}", f"{row.images_per_second:,.0f}",
                 f"{row.speedup:.2f}x"]
                for row in rows
            ],
        )  # fmt: skip


def _numbers(text: str) -> list[int]:
    """Numbers with commas between; what is no number is 0, which is refused where it is used."""
    return [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]


def _bench_runtimes(
    model: str,
    against: str | None,
    runtime: str,
    int8: bool,
    threads: str,
    batches: list[int],
    size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    with output(quiet or as_json):
        import torch

        from scap_hub.run.bench_runtimes import bench_runtimes
        from scap_hub.timing.clock import device_name

        rows = bench_runtimes(
            model, against, runtimes=runtime.split(","), int8=int8, threads=_numbers(threads), batch_sizes=batches,
            size=size, checkpoint=checkpoint,
        )  # fmt: skip
        device = device_name(torch.device("cpu"))
    if as_json:
        print(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}))
    elif not quiet:
        head = ["model", "runtime", "", "threads", "batch", "ms", "images/s", "speed-up", "file MB", "peak MB"]
        print_table(
            head,
            [
                [row.model, row.runtime, row.precision, str(row.threads), str(row.batch), f"{row.ms:.2f}",
                 f"{row.images_per_second:,.0f}", f"{row.speedup:.2f}x", f"{row.file_bytes / 1e6:.2f}",
                 "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"]
                for row in rows
            ],
        )  # fmt: skip


def groups_of(
    model: str, untrained: bool, size: int | None, checkpoint: Path | None
) -> tuple[LoadedModel, ChannelGroups]:
    """Loads a model by name and finds its channel groups."""
    import torch

    from scap_hub.channels import channel_groups
    from scap_hub.zoo import load_model

    with announce(f"loading {model}"):
        loaded = load_model(
            model, pretrained=not untrained, input_size=(3, size, size) if size else None, checkpoint=checkpoint
        )
    with announce("finding the channel groups"):
        return loaded, channel_groups(loaded.module, torch.zeros(1, *loaded.preprocessing.input_size))


def _mac_shares(groups: ChannelGroups) -> list[float]:
    """Share of the model's MACs in the layers that compute each group."""
    layers = groups[0].whole.partition.layer_macs() if groups else {}
    total = sum(layers.values())
    return [sum(layers.get(path, 0) for path in group.producers) / total for group in groups]
