"""From a model to files in float32 and int8, with what int8 costs and brings measured."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from scap_hub.deploy.capture import OUTPUT
from scap_hub.deploy.deployment import Deployment, Int8, Variant
from scap_hub.deploy.formats import FORMATS, Format, format_named, write_checked
from scap_hub.deploy.measures import Judge
from scap_hub.deploy.quantizers.base import Scheme
from scap_hub.deploy.runtimes import OnnxRuntime, OpenVino, Runtime, parts
from scap_hub.deploy.search import search
from scap_hub.deploy.source import Source
from scap_hub.errors import CalibrationError
from scap_hub.timing.clock import device_name, milliseconds
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main

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
        folder: Where the model is saved, as for `Source`.
        zoo: Name of the library that it comes from, as for `Source`.
    """

    model: nn.Module
    data: Data
    input_size: tuple[int, int, int]
    dense: nn.Module | None = None
    dense_top1: float | None = None
    dataset: str | None = None
    folder: str | Path = ""
    zoo: str = ""

    @functools.cached_property
    def source(self) -> Source:
        """The pruned model, ready to be exported, for images of its own size: only for these int8 finds its ranges."""
        return Source.of(self.model, self.input_size, self.folder, self.zoo)

    @property
    def by_answers(self) -> bool:
        """Whether it answers by logits alone."""
        return self.source.net.names == (OUTPUT,)


def deploy_int8(subject: Subject, folder: Path, max_loss: float, batch_size: int = 1, to: str = "onnx") -> Deployment:
    """Writes a format's files in float32 and int8 into a folder of each process, and measures both beside dense.

    What decides which int8 is kept is the metric on the validation images, or, without labels, how far int8 is from
    float32 on the calibration images (see `Judge`). What is reported is measured on the test images, if there are any.

    Args:
        subject: What becomes files.
        folder: Where to write; each process has its own.
        max_loss: What int8 may lose of the metric, as a fraction. Warns if no way to int8 was found that loses less.
        batch_size: Images at once when latency is measured.
        to: A format that has int8.

    Raises:
        CalibrationError: There are no calibration images, or an activation is not finite on them.
        ModelError: The model cannot be exported, or its operators cannot be quantised.
        VerificationError: The float32 file does not compute what the model computes.
        ScapHubError: Something is not installed; names the extra.
    """
    images = [batch[0].float() for batch in subject.data.calibration if len(batch[0])]
    if not images:
        raise CalibrationError("int8 needs calibration images, and the data set has none: give one with images")
    form = format_named(to, int8=True)
    assert form.int8 is not None
    (folder / form.file).parent.mkdir(parents=True, exist_ok=True)  # on each process
    float_file = _written(form, folder / form.file, lambda path: write_checked(form, subject.source, path))
    with tempfile.TemporaryDirectory() as scratch:
        trial = _Trial(subject, form, float_file, images, Path(scratch))
        found = search(trial.quantizer.schemes, trial.quantizer.layers, max_loss, trial.loss, trial.harm)
        best = found.best
        quantized = _written(
            form, folder / form.int8.file, lambda path: trial.quantizer.write(path, best.scheme, kept=best.kept)
        )
    int8 = Int8.of(found, sum(map(len, images)), max_loss, trial.decided_on)
    if int8.missed:
        warnings.warn(f"{int8.missed}; tried: {'; '.join(int8.attempts)}", stacklevel=2)
    return _measured(subject, form, {form.file: float_file, form.int8.file: quantized}, int8, batch_size)


def _written(form: Format, path: Path, make: Callable[[Path], None]) -> Runtime:
    """A file that the main process makes, on each process, so that all of them measure the same bytes."""

    def made() -> dict[str, bytes]:
        make(path)
        return {part.name: part.read_bytes() for part in parts(path)}

    content = from_main(made)
    if not accelerator().is_main_process:
        for name, part in content.items():
            path.with_name(name).unlink(missing_ok=True)  # a runtime that is open maps the old one into memory
            path.with_name(name).write_bytes(part)
    return form.open(path)


class _Trial:
    """Tries ways to int8 on one float32 file."""

    def __init__(
        self, subject: Subject, form: Format, float_file: Runtime, images: Sequence[Tensor], scratch: Path
    ) -> None:
        data = subject.data
        assert form.int8 is not None
        self.form, self.scratch = form, scratch
        self.suffix = float_file.file.suffix
        self.quantizer = form.int8.quantizer(subject.source, float_file.file, images, scratch)
        self.probed = torch.cat(list(images))[:_PROBED]
        self.outputs = _listed(float_file.run(self.probed))
        self.labelled = data.validation is not None
        loader = data.calibration if data.validation is None else data.validation
        self.judge = Judge(float_file, subject.by_answers, loader, data.task, self.labelled)

    @property
    def decided_on(self) -> str:
        """Which images decide, and what of them."""
        images = "validation" if self.labelled else "calibration"
        return f"the {images} images ({self.judge.decides})"

    def loss(self, scheme: Scheme, kept: Sequence[str]) -> float:
        """What is lost where all layers but some are in int8, as a fraction."""
        place = self.scratch / f"tried{self.suffix}"
        tried = _written(self.form, place, lambda path: self.quantizer.write(path, scheme, kept=kept))
        return self.judge.loss(tried)

    def harm(self, scheme: Scheme, only: Sequence[str]) -> float:
        """Relative squared change of the outputs of a few calibration images where some layers alone are in int8."""

        def changed() -> float:
            path = self.scratch / f"probe{self.suffix}"
            self.quantizer.write(path, scheme, only=only)
            pairs = zip(_listed(self.form.open(path).run(self.probed)), self.outputs, strict=True)
            return sum(
                float((own - other).square().sum() / other.square().sum().clamp(min=1e-12)) for own, other in pairs
            )

        return from_main(changed)


def _listed(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _measured(subject: Subject, form: Format, files: dict[str, Runtime], int8: Int8, batch_size: int) -> Deployment:
    """Both files beside the dense model: metric, answers, size, latency in turns."""
    data = subject.data
    labelled = data.measured_on is not None
    loader = data.calibration if data.measured_on is None else data.measured_on
    judge = Judge(files[form.file], subject.by_answers, loader, data.task, labelled)
    results = [judge.own, judge(list(files.values())[-1])]
    top1 = None if judge.own.metric is None else subject.dense_top1
    dense, times = from_main(lambda: _latency(subject, form, list(files.values()), batch_size))
    variants = [] if dense is None else [Variant("dense fp32", None, dense, top1, None, times[0])]
    variants += [
        Variant(
            name,
            place,
            sum(part.stat().st_size for part in parts(runtime.file)),
            judged.metric,
            1 - judged.difference if subject.by_answers else None,
            ms,
            None if subject.by_answers else judged.difference,
        )
        for name, (place, runtime), judged, ms in zip(
            ("pruned fp32", "pruned int8"), files.items(), results, times[-2:], strict=True
        )
    ]
    name = next(iter(files.values())).name
    return Deployment(
        f"{name} {version(name)}", device_name(torch.device("cpu")), batch_size, data.task.metric.name,
        subject.dataset, variants, int8,
    )  # fmt: skip


def _latency(subject: Subject, form: Format, files: list[Runtime], batch_size: int) -> tuple[int | None, list[float]]:
    """Size of the dense model's file, if there is one, and milliseconds, its own first.

    The dense model is in memory alone, and ONNX is what can be written from there; ONNX Runtime and OpenVINO read it.
    """
    images = torch.randn(batch_size, *subject.input_size, generator=torch.Generator().manual_seed(0))
    reads_onnx = form.open in (OnnxRuntime, OpenVino) and importlib.util.find_spec("onnxscript") is not None
    with tempfile.TemporaryDirectory() as scratch:
        dense, size = Path(scratch, "dense.onnx"), None
        if subject.dense is not None and reads_onnx:
            FORMATS["onnx"].write(Source.of(subject.dense, subject.input_size), dense)
            files, size = [form.open(dense), *files], dense.stat().st_size
        return size, milliseconds([(runtime, images) for runtime in files])
