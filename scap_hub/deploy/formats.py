"""The formats that a saved model can be exported to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scap_hub.deploy.agreement import check_agreement
from scap_hub.deploy.capture import captured
from scap_hub.deploy.delegated import write_executorch, write_openvino
from scap_hub.deploy.onnx_file import write_onnx
from scap_hub.deploy.onnx_metadata import describe
from scap_hub.deploy.runtimes import ExecuTorch, OnnxRuntime, OpenVino, Runtime, TorchExport, save_program
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError, ScapHubError
from scap_hub.text import did_you_mean


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        file: Its place in a folder.
        needs: Modules that must be installed.
        extra: The extra of scap_hub that installs them.
        write: Writes a model.
        open: Runs what was written.
    """

    file: str
    needs: Sequence[str]
    extra: str
    write: Callable[[Source, Path], None]
    open: Callable[[Path], Runtime]


def _write_onnx(source: Source, path: Path) -> None:
    write_onnx(source.net, source.images, path)
    describe(path, source.net.model)


def _write_torch_export(source: Source, path: Path) -> None:
    save_program(captured(source.net, source.images), source.net.names, path)


FORMATS = {
    "onnx": Format("onnx/model.onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", _write_onnx, OnnxRuntime),
    "torch-export": Format("model.pt2", (), "", _write_torch_export, TorchExport),
    "openvino": Format("openvino/openvino_model.xml", ("openvino",), "openvino", write_openvino, OpenVino),
    "executorch": Format("executorch/model.pte", ("executorch",), "executorch", write_executorch, ExecuTorch),
}
_ELSEWHERE = ("coreml", "coreai", "litert", "ncnn", "tensorrt")
"""Formats of timmx that are not run and compared here."""


def format_named(name: str) -> Format:
    """The format of a name, which can be written and run here.

    Raises:
        ModelError: There is none of that name.
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
    if absent := [module for module in found.needs if importlib.util.find_spec(module) is None]:
        raise ScapHubError(f"{name} needs {', '.join(absent)}: pip install 'scap-hub[{found.extra}]'")
    return found


def write_checked(form: Format, source: Source, path: Path) -> None:
    """Writes a model, and compares what the file computes with it.

    Raises:
        ModelError: The model cannot be exported, or the file cannot be run.
        VerificationError: An output differs by more than `TOLERANCE`, 1e-4 max(1, its largest number).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    form.write(source, path)
    check_agreement(source.net, form.open(path), source.images)
