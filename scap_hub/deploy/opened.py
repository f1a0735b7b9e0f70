"""A model in the runtime that it will live in, for the time that it takes there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor, nn

from scap_hub.deploy.formats import FORMATS, format_named
from scap_hub.deploy.quantizers.base import SCHEMES
from scap_hub.deploy.quantizers.onnx import OnnxQuantizer
from scap_hub.deploy.runtimes import OnnxRuntime, OpenVino
from scap_hub.deploy.source import Source

RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenVino]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
"""Those that read ONNX files, in float32 and in int8."""


def check_runtime(name: str) -> None:
    """Makes sure that models can be opened in a runtime here.

    Raises:
        ScapHubError: Something is not installed; names the extra.
    """
    for needed in {"torch": (), "onnxruntime": ("onnx",), "openvino": ("onnx", "openvino")}[name]:
        format_named(needed)


def opened(model: nn.Module, images: Tensor, runtime: str, int8: bool = False) -> nn.Module:
    """A model as a runtime runs it; torch runs the model itself.

    Args:
        model: Unchanged.
        images: As it will be fed, (N, C, H, W).
        runtime: "torch", "onnxruntime" or "openvino".
        int8: Whether in eight bits. The ranges are those of random images: they change answers, not times.
    """
    if runtime == "torch":
        return model
    source = Source.of(model, tuple(images.shape[1:]))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.onnx")
        FORMATS["onnx"].write(source, file)
        if int8:
            OnnxQuantizer(file, [source.images], Path(scratch)).write(Path(scratch, "int8.onnx"), SCHEMES[0])
            file = Path(scratch, "int8.onnx")
        return RUNTIMES[runtime](file)
