"""Exports a saved pruned model to formats that run without its library, and checks that they compute the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scap_hub.errors import CheckpointError, ModelError, ScapHubError, VerificationError
from scap_hub.files import replacing
from scap_hub.hub.checkpoint import input_size, load
from scap_hub.hub.onnx_metadata import describe
from scap_hub.text import one_line
from scap_hub.zoo.base import logits

TOLERANCE = 1e-4
"""Largest difference of any logit: absolute, but relative to the batch's largest logit where that is above 1, because
float32 rounds in proportion and untrained models have huge logits."""
_NAMES = {"onnx": "model.onnx", "torch-export": "model.pt2"}


class _Logits(nn.Module):
    """Images in, logits out, whatever the model's own output looks like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.model(images))


def export(
    folder: str | Path,
    to: Literal["onnx", "torch-export"] = "onnx",
    output: str | Path | None = None,
    model: nn.Module | None = None,
) -> Path:
    """Writes the model for any batch size, in float32, and compares the file's logits with the model's.

    Args:
        folder: Saved pruned model, or its Hub id.
        to: "onnx" (needs the extra `onnx`), or "torch-export", which `torch.export.load` reads.
        output: The file; by default model.onnx or model.pt2 in the folder.
        model: The dense model, where it comes from no zoo.

    Returns:
        The file.

    Raises:
        ModelError: An unknown format, or a model that cannot be exported.
        CheckpointError: The folder holds no pruned model, or the file cannot be written.
        VerificationError: A logit differs from the model's by more than `TOLERANCE`, 1e-4 max(1, largest logit); the
            file is not kept.
    """
    if to not in _NAMES:
        raise ModelError(f"cannot export to {to!r}: choose {' or '.join(map(repr, _NAMES))}")
    needed = ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ()
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ScapHubError(f"ONNX needs {', '.join(absent)}: pip install 'scap-hub[onnx]'")
    net = _Logits(load(folder, model)).float().eval()
    place = Path(folder).expanduser()
    target = Path(output).expanduser() if output else (place if place.is_dir() else Path()) / _NAMES[to]
    images = torch.randn(2, *input_size(folder), generator=torch.Generator().manual_seed(0))
    try:
        with replacing(target) as unfinished:
            run = (_onnx if to == "onnx" else _torch_export)(net, images, unfinished)
            # Another batch size than the one it was traced with.
            for batch in (images, torch.cat([images, images.flip(3), images.flip(2)])[:5]):
                _compare(net, run, batch, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {one_line(error)}") from error
    return target


def _compare(net: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, target: Path) -> None:
    with torch.no_grad():
        expected = net(images)
    difference = (run(images) - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # NaN is no agreement
        raise VerificationError(
            f"{target.name} differs from the model by {difference:.1e}, {allowed:.1e} are allowed: it was not kept; "
            "try the other format"
        )


def _program(net: nn.Module, images: Tensor) -> Any:
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(net, (images,), dynamic_shapes=batch, strict=False)
    except Exception as error:
        raise ModelError(f"torch.export cannot capture {type(net.model).__name__}: {one_line(error)}") from error


def _torch_export(net: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_program(net, images), path)
    return torch.export.load(path).module()


def _onnx(net: _Logits, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    program = _program(net, images)
    try:
        torch.onnx.export(
            program, (), str(path), input_names=["images"], output_names=["logits"], dynamo=True,
            external_data=False, verbose=False, optimize=True,
        )  # fmt: skip
    except Exception as error:
        raise ModelError(f"torch.onnx cannot export {type(net.model).__name__}: {one_line(error)}") from error
    describe(path, net.model)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
