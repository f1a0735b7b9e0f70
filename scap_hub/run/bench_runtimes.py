"""How fast models are in the runtimes that people deploy on, how large their files are, and what memory they take."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from scap_hub.deploy.formats import FORMATS
from scap_hub.deploy.opened import RUNTIMES, check_runtime
from scap_hub.deploy.quantizers.base import SCHEMES
from scap_hub.deploy.quantizers.onnx import OnnxQuantizer
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError, RecipeError
from scap_hub.progress import track
from scap_hub.run.bench import Size, models_to_compare
from scap_hub.text import did_you_mean
from scap_hub.timing.clock import Timer, milliseconds

_MEMORY = """
import sys, numpy
runtime, file, threads, shape = sys.argv[1], sys.argv[2], int(sys.argv[3]), tuple(map(int, sys.argv[4].split(",")))
images = numpy.zeros(shape, numpy.float32)
if runtime == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    run = lambda: session.run(None, {session.get_inputs()[0].name: images})
else:
    import openvino
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    run = lambda: compiled(images)
for _ in range(3):
    run()
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class RuntimeSpeed:
    """One model in one runtime and setting.

    Attributes:
        model: Its name.
        runtime: "onnxruntime" or "openvino".
        precision: "fp32" or "int8".
        threads: Of the runtime.
        batch: Images at once.
        ms: Median milliseconds of one forward pass.
        images_per_second: Throughput at this batch.
        speedup: How many times faster than the first row of the same threads and batch.
        file_bytes: Size of the file.
        peak_bytes: The most memory that a process of its own had, with Python and the runtime itself; None where the
            system does not tell (it has to be Linux).
    """

    model: str
    runtime: str
    precision: str
    threads: int
    batch: int
    ms: float
    images_per_second: float
    speedup: float
    file_bytes: int
    peak_bytes: int | None


def bench_runtimes(
    model: str | Path | nn.Module,
    against: str | Path | nn.Module | None = None,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    int8: bool = False,
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1, 64),
    size: Size | None = None,
    timer: Timer = milliseconds,
    checkpoint: str | Path | None = None,
) -> list[RuntimeSpeed]:
    """Times a model in runtimes on the CPU, in turns with another where there is one; answers are not looked at.

    Args:
        model: As for `bench`.
        against: As for `bench`.
        runtimes: "onnxruntime", "openvino".
        int8: Whether to measure int8 too; its ranges are those of random images, which change answers, not times.
        threads: Of the runtime, one setting each.
        batch_sizes: Images at once.
        size: (channels, height, width) in pixels; the model's own if left out.
        timer: Measures calls that take turns.
        checkpoint: As for `bench`.

    Raises:
        ScapHubError: As `bench`; a runtime that is unknown or not installed, or a model that cannot be exported.
    """
    for name in runtimes:
        if name not in RUNTIMES:
            known = ", ".join(RUNTIMES)
            raise RecipeError(f"runtime {name!r} is unknown: give some of {known}{did_you_mean(name, RUNTIMES)}")
        check_runtime(name)
    if min(batch_sizes, default=0) < 1 or min(threads, default=0) < 1:
        raise RecipeError(f"batch sizes {list(batch_sizes)}, threads {list(threads)}: give numbers of 1 or more")
    models, size = models_to_compare(model, against, size, checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        return runtime_speeds(models, size, Path(scratch), runtimes, int8, threads, batch_sizes, timer)


def runtime_speeds(
    models: Mapping[str, nn.Module],
    size: Size,
    scratch: Path,
    runtimes: Sequence[str],
    int8: bool,
    threads: Sequence[int],
    batch_sizes: Sequence[int],
    timer: Timer = milliseconds,
) -> list[RuntimeSpeed]:
    """Times models in turns, setting by setting; the first is what the others are compared with."""
    files = {
        (name, precision): path
        for number, (name, model) in enumerate(models.items())
        for precision, path in _files(model, size, scratch / str(number), int8).items()
    }
    kinds = [(runtime, name, precision) for runtime in runtimes for name, precision in files]
    rows = []
    settings = [(number, batch) for number in threads for batch in batch_sizes]
    for number, batch in track(settings, "latency"):
        images = torch.randn(batch, *size)
        opened = [RUNTIMES[runtime](files[name, precision], number) for runtime, name, precision in kinds]
        times = timer([(own, images) for own in opened])
        for (runtime, name, precision), ms in zip(kinds, times, strict=True):
            file = files[name, precision]
            peak = _peak(runtime, file, number, (batch, *size))
            rows.append(
                RuntimeSpeed(
                    *(name, runtime, precision, number, batch, ms, 1e3 * batch / ms, times[0] / ms),
                    *(file.stat().st_size, peak),
                )
            )
    return rows


def _files(model: nn.Module, size: Size, folder: Path, int8: bool) -> dict[str, Path]:
    """The model's files, by precision."""
    folder.mkdir()
    source, files = Source.of(model, size), {"fp32": folder / "model.onnx"}
    FORMATS["onnx"].write(source, files["fp32"])
    if int8:
        files["int8"] = folder / "int8.onnx"
        OnnxQuantizer(files["fp32"], [source.images], folder).write(files["int8"], SCHEMES[0])
    return files


def _peak(runtime: str, file: Path, threads: int, shape: Sequence[int]) -> int | None:
    """Bytes that a process which does nothing else takes at most; None where the system does not tell."""
    if not Path("/proc/self/status").is_file():
        return None
    arguments = [runtime, str(file), str(threads), ",".join(map(str, shape))]
    done = subprocess.run([sys.executable, "-c", _MEMORY, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ModelError(f"{runtime} fails on {file.name}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return 1024 * int(done.stdout.split()[-1])
