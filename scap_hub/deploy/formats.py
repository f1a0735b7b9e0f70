"""The formats that a saved model can be exported to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scap_hub.deploy.agreement import check_agreement
from scap_hub.deploy.capture import Logits, captured
from scap_hub.deploy.onnx_file import write_onnx
from scap_hub.deploy.runtimes import OnnxRuntime, Runtime, TorchExport
from scap_hub.errors import ModelError, ScapHubError
from scap_hub.text import did_you_mean


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        file: Its place in a folder.
        needs: Modules that must be installed.
        extra: The extra of scap_hub that installs them.
        write: Writes a model for any batch size, given two example images.
        open: Runs what was written.
    """

    file: str
    needs: Sequence[str]
    extra: str
    write: Callable[[Logits, Tensor, Path], None]
    open: Callable[[Path], Runtime]


def _write_torch_export(net: Logits, images: Tensor, path: Path) -> None:
    torch.export.save(captured(net, images), path)


FORMATS = {
    "onnx": Format("onnx/model.onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", write_onnx, OnnxRuntime),
    "torch-export": Format("model.pt2", (), "", _write_torch_export, TorchExport),
}


def format_named(name: str) -> Format:
    """The format of a name, which can be written and run here.

    Raises:
        ModelError: There is none of that name.
        ScapHubError: What it needs is not installed; names the extra.
    """
    if name not in FORMATS:
        choices = " or ".join(map(repr, FORMATS))
        raise ModelError(f"cannot export to {name!r}: choose {choices}{did_you_mean(name, FORMATS)}")
    found = FORMATS[name]
    if absent := [module for module in found.needs if importlib.util.find_spec(module) is None]:
        raise ScapHubError(f"{name} needs {', '.join(absent)}: pip install 'scap-hub[{found.extra}]'")
    return found


def write_checked(form: Format, net: Logits, images: Tensor, path: Path) -> None:
    """Writes a model, and compares what the file computes with it.

    Raises:
        ModelError: The model cannot be exported, or the file cannot be run.
        VerificationError: A logit differs by more than `TOLERANCE`, 1e-4 max(1, largest logit).
    """
    form.write(net, images, path)
    check_agreement(net, form.open(path), images)


def for_export(model: nn.Module) -> Logits:
    """A model in eval mode, in float32, on the CPU; changes it in place."""
    return Logits(model).cpu().float().eval()


def example_images(input_size: tuple[int, int, int]) -> Tensor:
    """Two random images, the same each time."""
    return torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
