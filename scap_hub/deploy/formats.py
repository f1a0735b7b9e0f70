"""The formats that a saved model can be exported to."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scap_hub.deploy.agreement import check_agreement
from scap_hub.deploy.capture import captured
from scap_hub.deploy.delegated import write_executorch, write_openvino
from scap_hub.deploy.onnx_file import write_onnx
from scap_hub.deploy.onnx_metadata import describe
from scap_hub.deploy.quantizers.base import Quantizer
from scap_hub.deploy.quantizers.executorch import XnnpackQuantizer
from scap_hub.deploy.quantizers.onnx import OnnxQuantizer
from scap_hub.deploy.quantizers.openvino import NncfQuantizer
from scap_hub.deploy.runtimes import ExecuTorch, OnnxRuntime, OpenVino, Runtime, TorchExport, save_program
from scap_hub.deploy.sizes import write_resizable
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError, ScapHubError
from scap_hub.text import did_you_mean

_PATIENCE = 10
"""How many times as long as for one size a model may be recorded for all: some would take hours."""


@dataclass(frozen=True)
class EightBits:
    """A format's int8.

    Attributes:
        file: Its place in a folder.
        needs: Modules that must be installed beside those of the format; the same extra installs them.
        quantizer: From a model, its file in float32, calibration images, and a folder for files in between.
    """

    file: str
    needs: Sequence[str]
    quantizer: Callable[[Source, Path, Sequence[Tensor], Path], Quantizer]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        file: Its place in a folder.
        needs: Modules that must be installed.
        extra: The extra of scap_hub that installs them.
        write: Writes a model.
        open: Runs what was written.
        int8: How it is quantised; None where it is not.
    """

    file: str
    needs: Sequence[str]
    extra: str
    write: Callable[[Source, Path], None]
    open: Callable[[Path], Runtime]
    int8: EightBits | None = None


def _write_onnx(source: Source, path: Path) -> None:
    began = time.monotonic()
    program = captured(source.net, source.images)
    within = _PATIENCE * (time.monotonic() - began)
    multiple = write_resizable(source, path, within) if source.resizable else None
    if multiple is None:
        write_onnx(source.net, program, path)
    describe(path, source.net.model, multiple)


def _write_torch_export(source: Source, path: Path) -> None:
    save_program(captured(source.net, source.images), source.net.names, path)


ONNX_INT8 = EightBits("onnx/model_quantized.onnx", (), lambda _, file, *rest: OnnxQuantizer(file, *rest))
_OPENVINO_INT8 = EightBits(
    "openvino/openvino_model_quantized.xml", ("nncf",), lambda _, file, images, __: NncfQuantizer(file, images)
)
_EXECUTORCH_INT8 = EightBits(
    "executorch/model_quantized.pte", ("torchao",), lambda source, _, images, __: XnnpackQuantizer(source, images)
)
FORMATS = {
    "onnx": Format(
        "onnx/model.onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", _write_onnx, OnnxRuntime, ONNX_INT8
    ),
    "torch-export": Format("model.pt2", (), "", _write_torch_export, TorchExport),
    "openvino": Format(
        "openvino/openvino_model.xml", ("openvino",), "openvino", write_openvino, OpenVino, _OPENVINO_INT8
    ),
    "executorch": Format(
        "executorch/model.pte", ("executorch",), "executorch", write_executorch, ExecuTorch, _EXECUTORCH_INT8
    ),
}
_ELSEWHERE = ("coreml", "coreai", "litert", "ncnn", "tensorrt")
"""Formats of timmx that are not run and compared here."""


def format_named(name: str, int8: bool = False) -> Format:
    """The format of a name, which can be written and run here, in int8 too if asked for.

    Raises:
        ModelError: There is none of that name, or it has no int8.
        ScapHubError: What it needs is not installed; names the extra.
    """
    if name in _ELSEWHERE:
        raise ModelError(
            f"{name} is not written here, because what it computes is not compared here; timmx writes it of a timm "
            f"model: pip install 'timmx[{name}]', then import scap_hub, timmx; timmx.export_model({name!r}, "
            "'local-dir:FOLDER', pretrained=True)"
        )
    if name not in FORMATS:
        choices = " or ".join(map(repr, FORMATS))
        raise ModelError(f"cannot export to {name!r}: choose {choices}{did_you_mean(name, FORMATS)}")
    found = FORMATS[name]
    if int8 and found.int8 is None:
        choices = ", ".join(repr(other) for other, form in FORMATS.items() if form.int8)
        raise ModelError(f"int8 is made for {choices}, not for {name!r}: leave int8 out, or choose another format")
    needs = (*found.needs, *(found.int8.needs if int8 and found.int8 else ()))
    if absent := [module for module in needs if importlib.util.find_spec(module) is None]:
        what = f"{name} in int8" if absent[0] not in found.needs else name
        raise ScapHubError(f"{what} needs {', '.join(absent)}: pip install 'scap-hub[{found.extra}]'")
    return found


def write_checked(form: Format, source: Source, path: Path) -> None:
    """Writes a model, and compares what the file computes with it.

    Raises:
        ModelError: The model cannot be exported, or the file cannot be run.
        VerificationError: An output differs by more than `TOLERANCE`, 1e-4 max(0.01, its largest number).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    form.write(source, path)
    check_agreement(source.net, form.open(path), source.images)
