"""From a model to ONNX files in float32 and int8, with what int8 costs and brings measured."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from scap_hub.deploy.deployment import Deployment, Int8, Variant
from scap_hub.deploy.formats import FORMATS, write_checked
from scap_hub.deploy.int8 import Quantizer, Scheme
from scap_hub.deploy.measures import agreement, measured
from scap_hub.deploy.runtimes import OnnxRuntime
from scap_hub.deploy.search import search
from scap_hub.deploy.source import Source
from scap_hub.errors import CalibrationError
from scap_hub.timing.clock import device_name, milliseconds
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main

FLOAT, QUANTIZED = FORMATS["onnx"].file, "onnx/model_quantized.onnx"
"""Where transformers.js and the Hub look for them."""
_PROBED = 16
"""Calibration images on which layers are compared."""


@dataclass(frozen=True)
class Subject:
    """What becomes files.

    Attributes:
        model: The pruned model; unchanged.
        data: Its calibration images, and what models are measured on.
        input_size: (channels, height, width) in pixels.
        dense: The dense model, where it can be had, for its speed; unchanged.
        dense_top1: Its metric; None where it is unknown.
        dataset: Name of the data set, for others to read.
    """

    model: nn.Module
    data: Data
    input_size: tuple[int, int, int]
    dense: nn.Module | None = None
    dense_top1: float | None = None
    dataset: str | None = None


def deploy_int8(subject: Subject, folder: Path, max_loss: float, batch_size: int = 1) -> Deployment:
    """Writes `FLOAT` and `QUANTIZED` into a folder of each process, and measures both beside the dense model.

    What decides which int8 is kept is the metric on the validation images, or, without labels, how often int8 gives
    float32's answer on the calibration images. What is reported is measured on the test images, if there are any.

    Args:
        subject: What becomes files.
        folder: Where to write; each process has its own.
        max_loss: What int8 may lose of the metric, as a fraction. Warns if no way to int8 was found that loses less.
        batch_size: Images at once when latency is measured.

    Raises:
        CalibrationError: There are no calibration images, or an activation is not finite on them.
        ModelError: The model cannot be exported, or its operators cannot be quantised.
        VerificationError: The float32 file does not compute what the model computes.
    """
    images = [batch[0].float() for batch in subject.data.calibration if len(batch[0])]
    if not images:
        raise CalibrationError("int8 needs calibration images, and the data set has none: give one with images")
    (folder / FLOAT).parent.mkdir(parents=True, exist_ok=True)  # on each process
    float_file = _written(folder / FLOAT, lambda path: _write_float(subject, path))
    with tempfile.TemporaryDirectory() as scratch:
        trial = _Trial(subject, float_file, images, Path(scratch))
        found = search(trial.quantizer.layers, max_loss, trial.loss, trial.harm)
        best = found.best
        quantized = _written(folder / QUANTIZED, lambda path: trial.quantizer.write(path, best.scheme, kept=best.kept))
    int8 = Int8.of(found, sum(map(len, images)), max_loss, trial.decided_on)
    if int8.missed:
        warnings.warn(f"{int8.missed}; tried: {'; '.join(int8.attempts)}", stacklevel=2)
    return _measured(subject, {FLOAT: float_file, QUANTIZED: quantized}, int8, batch_size)


def _written(path: Path, make: Callable[[Path], None]) -> OnnxRuntime:
    """A file that the main process makes, on each process, so that all of them measure the same bytes."""

    def made() -> bytes:
        make(path)
        return path.read_bytes()

    content = from_main(made)
    if not accelerator().is_main_process:
        path.write_bytes(content)
    return OnnxRuntime(path)


def _write_float(subject: Subject, path: Path) -> None:
    write_checked(FORMATS["onnx"], Source.of(subject.model, subject.input_size), path)


class _Trial:
    """Tries ways to int8 on one float32 file."""

    def __init__(self, subject: Subject, float_file: OnnxRuntime, images: Sequence[Tensor], scratch: Path) -> None:
        data = subject.data
        self.float, self.task, self.scratch = float_file, data.task, scratch
        self.quantizer = Quantizer(float_file.file, images, scratch)
        self.probed = torch.cat(list(images))[:_PROBED]
        self.logits = float_file(self.probed)
        self.labelled = data.validation is not None
        self.loader = data.calibration if data.validation is None else data.validation
        self.top1, self.answers = measured(float_file, self.loader, self.task, self.labelled)

    @property
    def decided_on(self) -> str:
        """Which images decide, and what of them."""
        if self.labelled:
            return f"the validation images ({self.task.metric.name})"
        return "the calibration images (same answers)"

    def loss(self, scheme: Scheme, kept: Sequence[str]) -> float:
        """What is lost where all layers but some are in int8, as a fraction."""
        tried = _written(self.scratch / "tried.onnx", lambda path: self.quantizer.write(path, scheme, kept=kept))
        top1, answers = measured(tried, self.loader, self.task, self.labelled)
        if self.top1 is None or top1 is None:
            return 1 - agreement(answers, self.answers)
        return self.top1 - top1

    def harm(self, scheme: Scheme, only: Sequence[str]) -> float:
        """Mean squared change of the logits of a few calibration images where some layers alone are in int8."""

        def changed() -> float:
            path = self.scratch / "probe.onnx"
            self.quantizer.write(path, scheme, only=only)
            return (OnnxRuntime(path)(self.probed) - self.logits).square().mean().item()

        return from_main(changed)


def _measured(subject: Subject, files: dict[str, OnnxRuntime], int8: Int8, batch_size: int) -> Deployment:
    """Both files beside the dense model: metric, answers, size, latency in turns."""
    data = subject.data
    labelled = data.measured_on is not None
    loader = data.calibration if data.measured_on is None else data.measured_on
    results = [measured(runtime, loader, data.task, labelled) for runtime in files.values()]
    same = [agreement(answers, results[0][1]) for _, answers in results]
    dense, times = from_main(lambda: _latency(subject, list(files.values()), batch_size))
    variants = [] if dense is None else [Variant("dense fp32", None, dense, subject.dense_top1, None, times[0])]
    variants += [
        Variant(name, place, runtime.file.stat().st_size, top1, agreed, ms)
        for name, (place, runtime), (top1, _), agreed, ms in zip(
            ("pruned fp32", "pruned int8"), files.items(), results, same, times[-2:], strict=True
        )
    ]
    return Deployment(
        f"onnxruntime {version('onnxruntime')}", device_name(torch.device("cpu")), batch_size, data.task.metric.name,
        subject.dataset, variants, int8,
    )  # fmt: skip


def _latency(subject: Subject, files: list[OnnxRuntime], batch_size: int) -> tuple[int | None, list[float]]:
    """Size of the dense model's file, if there is one, and milliseconds, its own first."""
    images = torch.randn(batch_size, *subject.input_size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch, "dense.onnx")
        if subject.dense is not None:
            FORMATS["onnx"].write(Source.of(subject.dense, subject.input_size), dense)
            files = [OnnxRuntime(dense), *files]
        size = dense.stat().st_size if subject.dense is not None else None
        return size, milliseconds([(runtime, images) for runtime in files])
