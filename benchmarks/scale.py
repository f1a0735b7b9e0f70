"""What a run takes on many devices, computed from what each stage costs an image, and in itself, measured here.

    python benchmarks/scale.py --json out/scale.json
    python benchmarks/scale.py --quick
    python benchmarks/scale.py --forward 2500 --decode 400      # images a second of the device in question

Measured, in one process: the seconds of each stage at two numbers of calibration images, hence its cost for an image
and in itself, and the memory that it takes; a forward pass, a training step with a teacher, and a JPEG, each for an
image; the activations that a training step keeps. On two processes: the bytes that each stage hands to collectives. All
else is computed: the part for an image is divided by the number of devices, the other is not, and a ring carries
2 (n - 1) / n of what is summed over n machines. `--forward` rescales what is done for an image, by the forward passes
that it is worth; what a stage costs in itself stays what it is here. CPU times are those of the process, so that other
work does not count.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import scap_hub
from scap_hub.progress import set_quiet
from scap_hub.recipe import FinetuneSettings
from scap_hub.scores import DEFAULT_CRITERION
from scap_hub.tasks import IMAGE_CLASSIFICATION
from scap_hub.timing.clock import device_name
from scap_hub.training.data.transforms import pixels_of
from scap_hub.training.distributed import accelerator
from scap_hub.training.objective import Objective
from scap_hub.zoo.base import Preprocessing

TRAIN, VALIDATION, CALIBRATION = 1_281_167, 50_000, 256
"""Images of ImageNet, and those that score and repair."""
JPEG = (500, 375)
"""Pixels of an average image of it."""


def clock() -> float:
    """Seconds of this process on a CPU, else of the wall, with the device's work done."""
    if accelerator().device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = clock()
    found = run()
    return clock() - start, found


def memory_of(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes at the peak above what was held before: of the device, or of this process on a CPU; what came of it."""
    device = accelerator().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, found = torch.cuda.memory_allocated(), run()
        return torch.cuda.max_memory_allocated() - before, found
    process, ended = psutil.Process(), threading.Event()
    held = [process.memory_info().rss]

    def look() -> None:
        while not ended.wait(0.005):
            held.append(process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        found = run()
    finally:
        ended.set()
        looking.join()
    return max(held) - held[0], found


def stages(model: nn.Module, batches: list[Tensor], criterion: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The stages of a run between loading and training, in their order; each to be called before the next."""
    found: dict[str, Any] = {}

    def keep(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: found.__setitem__(name, make())

    yield "channel groups", keep("groups", lambda: scap_hub.channel_groups(model, batches[0][:1]))
    yield "scores", keep("scores", lambda: scap_hub.score(model, batches, criterion, groups=found["groups"]))
    yield "selection", keep("plan", lambda: scap_hub.select(found["groups"], found["scores"], "macs=0.5"))
    yield "refinement", keep("plan", lambda: scap_hub.refine(model, found["groups"], batches, found["plan"], criterion))
    yield "verification", lambda: scap_hub.verify(model, found["plan"], (batches[0][:2],))
    yield "surgery", keep("small", lambda: scap_hub.apply_plan(model, found["plan"]))
    yield "repair", lambda: scap_hub.repair(model, found["small"], found["plan"], batches)


def images(count: int, options: argparse.Namespace) -> list[Tensor]:
    """Calibration images of this process; a run deals them out in turns."""
    made = torch.randn(count, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    here = accelerator()
    return list(made[here.process_index :: here.num_processes].to(here.device).split(16))


def network(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(options.model, num_classes=1000).to(accelerator().device).eval()


def costs(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of each stage for an image, and in itself; bytes at its peak."""
    few, many = options.images
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    model = network(options)
    for count in (few, many):
        for name, run in stages(model, images(count, options), options.criterion):
            peaks[name], (took, _) = memory_of(lambda run=run: timed(run))
            seconds.setdefault(name, []).append(took)
            print(f"  {name}, {count} images: {seconds[name][-1]:.2f} s", flush=True)
    found = {}
    for name, (first, second) in seconds.items():
        each = max(0.0, (second - first) / (many - few))
        found[name] = {"image_s": each, "fixed_s": max(0.0, second - many * each), "peak_bytes": peaks[name]}
    return found


def single(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a forward pass, a training step and a JPEG, each for an image; bytes that training keeps of one."""
    model, teacher = network(options), network(options)
    (batch, *_), labels = images(options.measured, options), torch.zeros(options.measured, dtype=torch.long)
    labels = labels[: len(batch)].to(batch.device)
    objective = Objective(IMAGE_CLASSIFICATION, FinetuneSettings(precision=options.precision), teacher)
    kept: dict[int, int] = {}

    def step() -> None:
        model.train()
        objective(model, (batch, labels)).backward()
        model.zero_grad()
        model.eval()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()  # warms up, too
    with torch.no_grad():
        forward = min(timed(lambda: model(batch))[0] for _ in range(3))
    training = min(timed(step)[0] for _ in range(3))
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "forward_s": forward / len(batch),
        "training_s": training / len(batch),
        "decode_s": _decode(options.size),
        "activation_bytes": (sum(kept.values()) - weights) / len(batch),
        "weight_bytes": weights,
    }


def _decode(size: int) -> float:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (JPEG[1] // 8, JPEG[0] // 8, 3), np.uint8)
    Image.fromarray(noise).resize(JPEG, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    pixels = pixels_of(Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3))
    start = time.process_time()
    for _ in range(20):
        pixels(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    return (time.process_time() - start) / 20


def traffic(options: argparse.Namespace) -> dict[str, int]:
    """Bytes that each stage hands to collectives, from two processes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "traffic.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        given = [
            "--model",
            options.model,
            "--size",
            str(options.traffic_size),
            "--criterion",
            options.criterion,
            "--count",
            str(out),
        ]
        subprocess.run([*launch, *given], check=True, timeout=3600, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def count_traffic(options: argparse.Namespace) -> None:
    """Runs the stages on every process, and writes what the first one handed to collectives."""
    from torch.distributed import distributed_c10d as collectives

    here, counted = accelerator(), {"bytes": 0}

    def counting(name: str) -> None:
        original = getattr(collectives, name)

        def call(*given: Any, **options: Any) -> Any:
            tensors = [value for value in (*given, *options.values()) if isinstance(value, Tensor)]
            counted["bytes"] += sum(tensor.nbytes for tensor in tensors[:1])
            return original(*given, **options)

        for place in (collectives, torch.distributed):
            setattr(place, name, call)

    for name in ("all_reduce", "broadcast", "all_gather"):
        counting(name)
    found, model = {}, network(options)
    for name, run in stages(model, images(16, options), options.criterion):
        counted["bytes"] = 0
        run()
        found[name] = counted["bytes"]
    if here.is_main_process:
        options.count.write_text(json.dumps(found))


def table(found: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each stage and number of machines."""
    one, forward = found["single"], found["single"]["forward_s"]
    # What is done for an image goes by the forward passes that it is worth.
    faster = 1.0 if options.forward is None else 1 / (options.forward * forward)
    decode = one["decode_s"] if options.decode is None else 1 / options.decode
    gradients, rows = one["weight_bytes"], []
    for machines in options.machines:
        devices = machines * options.devices
        ring = 2 * (machines - 1) / machines
        steps = TRAIN / (options.batch * devices)
        for name, cost in found["stages"].items():
            seconds = cost["fixed_s"] + cost["image_s"] * faster * CALIBRATION / devices
            rows.append({"machines": machines, "stage": name, "minutes": seconds / 60,
                         "traffic_gb": ring * found["traffic"][name] / 1e9,
                         "memory_gb": cost["peak_bytes"] / 1e9})  # fmt: skip
        reading = decode / (options.cores * machines)
        computing = one["training_s"] * faster / devices
        sending = ring * gradients * 8 / (options.network * 1e9) * steps / TRAIN
        for name, each in (("reading", reading), ("computing", computing), ("sending", sending)):
            rows.append({"machines": machines, "stage": f"an epoch, {name}", "minutes": each * TRAIN / 60,
                         "traffic_gb": ring * gradients * steps / 1e9 if name == "sending" else 0.0})  # fmt: skip
        seconds = max(decode / options.cores / machines, forward * faster / devices) * VALIDATION
        rows.append({"machines": machines, "stage": "validation", "minutes": seconds / 60, "traffic_gb": 0.0})
    return rows


def memory(found: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """GB of a device while it trains, and of the network's activations among them."""
    one = found["single"]
    # Weights, gradients, two moments, the best weights and the average stay on the CPU; the teacher has weights alone.
    held = 5 * one["weight_bytes"]
    active = options.batch * one["activation_bytes"]
    return {"training_gb": (held + active) / 1e9, "activations_gb": active / 1e9}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny network and small images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--criterion", default=DEFAULT_CRITERION, help="what scores the channels")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--traffic-size", type=int, default=64, help="of those with which traffic is counted")
    parser.add_argument("--images", type=int, nargs=2, default=(16, 32), help="calibration images of the two runs")
    parser.add_argument("--batch", type=int, default=64, help="images a step, per device")
    parser.add_argument("--measured", type=int, default=16, help="images a step, where it is measured")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--machines", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--devices", type=int, default=8, help="per machine")
    parser.add_argument("--cores", type=int, default=64, help="of each machine, that read images")
    parser.add_argument("--network", type=float, default=25.0, help="between machines, in Gbit/s")
    parser.add_argument("--forward", type=float, help="images a second in a forward pass, of another device")
    parser.add_argument("--decode", type=float, help="images a second that one core reads, of another machine")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.size, options.images, options.measured = "test_resnet", 64, (4, 8), 8
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, computes, prints a table and writes JSON."""
    options = parsed(arguments)
    set_quiet(True)
    if options.count is not None:
        count_traffic(options)
        return {}
    found: dict[str, Any] = {
        "model": options.model,
        "criterion": options.criterion,
        "size": options.size,
        "device": device_name(accelerator().device),
    }
    found |= {"stages": costs(options), "single": single(options), "traffic": traffic(options)}
    found["assumed"] = {
        name: getattr(options, name)
        for name in ("batch", "machines", "devices", "cores", "network", "forward", "decode", "precision")
    }
    found["rows"], found["memory"] = table(found, options), memory(found, options)
    for row in found["rows"]:
        print(f"{row['machines']:3} x {options.devices}  {row['stage']:20} {row['minutes']:9.2f} min "
              f"{row['traffic_gb']:9.2f} GB  {row.get('memory_gb', 0):6.2f} GB held")  # fmt: skip
    print(f"memory while training: {found['memory']['training_gb']:.1f} GB a device")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
