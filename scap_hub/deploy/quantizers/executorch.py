"""Static int8 of an ExecuTorch program, by torchao, with what the XNNPACK delegate computes in int8."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from scap_hub.deploy.quantizers.base import Quantizer, Scheme, quiet
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError
from scap_hub.text import one_line

_OPERATORS = ("conv1d", "conv2d", "convolution", "conv_transpose1d", "conv_transpose2d", "linear", "matmul")
_FEW = 16
"""Calibration images that find ranges good enough to compare layers by, each of which is tried alone."""


class XnnpackQuantizer(Quantizer):
    """Writes int8 programs of one model, for one image at a time; `layers` are its convolutions and linear layers."""

    schemes = (Scheme("histogram", True), Scheme("histogram", False))

    def __init__(self, source: Source, images: Sequence[Tensor]) -> None:
        """Takes a model, and batches of calibration images, float32 (N, C, H, W)."""
        self._source, self._images = source, torch.cat(list(images)).float().cpu()
        self._example = (source.images[:1],)
        found = [_layer(node) for node in self._recorded().graph.nodes if _computes(node)]
        self.layers = list(dict.fromkeys(name for name in found if name))

    def write(self, target: Path, scheme: Scheme, kept: Collection[str] = (), only: Collection[str] = ()) -> None:
        """See `Quantizer.write`."""
        stays = set(kept) if not only else set(self.layers) - set(only)
        try:
            with quiet():
                target.write_bytes(self._program(scheme, stays, self._images[:_FEW] if only else self._images))
        except Exception as error:
            raise ModelError(f"torchao cannot quantise the model with {scheme}: {one_line(error)}") from error

    def _recorded(self) -> Any:
        return torch.export.export(self._source.net, self._example, strict=False).module()

    def _program(self, scheme: Scheme, kept: Collection[str], images: Tensor) -> bytes:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        places = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=scheme.per_channel))
        places.set_filter_function(lambda node: not (_computes(node) and _layer(node) in kept))
        observed = prepare_pt2e(self._recorded(), places)
        with torch.no_grad():
            for image in images:
                observed(image[None])
        quantized = torch.export.export(convert_pt2e(observed), self._example, strict=False)
        lowered = to_edge_transform_and_lower(
            quantized, compile_config=EdgeCompileConfig(_check_ir_validity=False), partitioner=[XnnpackPartitioner()]
        )
        return lowered.to_executorch().buffer


def _computes(node: Node) -> bool:
    return node.op == "call_function" and str(node.target).removeprefix("aten.").partition(".")[0] in _OPERATORS


def _layer(node: Node) -> str:
    """The model's name for the module that called an operator; "" for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("model").removeprefix(".")
