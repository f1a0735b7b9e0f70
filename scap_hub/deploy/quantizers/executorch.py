"""Static int8 of an ExecuTorch program, by torchao, with what the XNNPACK delegate computes in int8."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scap_hub.deploy.quantizers.base import Quantizer, Scheme, quiet
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError
from scap_hub.text import one_line


class XnnpackQuantizer(Quantizer):
    """Writes int8 programs of one model, for one image at a time; it cannot leave layers in float32."""

    schemes = (Scheme("histogram", True), Scheme("histogram", False))

    def __init__(self, source: Source, images: Sequence[Tensor]) -> None:
        """Takes a model, and batches of calibration images, float32 (N, C, H, W)."""
        self._source, self._images = source, images

    def write(self, target: Path, scheme: Scheme, kept: Collection[str] = (), only: Collection[str] = ()) -> None:
        """See `Quantizer.write`."""
        try:
            with quiet():
                target.write_bytes(self._program(scheme))
        except Exception as error:
            raise ModelError(f"torchao cannot quantise the model with {scheme}: {one_line(error)}") from error

    def _program(self, scheme: Scheme) -> bytes:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        one = (self._source.images[:1],)
        places = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=scheme.per_channel))
        observed = prepare_pt2e(torch.export.export(self._source.net, one, strict=False).module(), places)
        with torch.no_grad():
            for image in torch.cat(list(self._images)).float().cpu():
                observed(image[None])
        quantized = torch.export.export(convert_pt2e(observed), one, strict=False)
        lowered = to_edge_transform_and_lower(
            quantized, compile_config=EdgeCompileConfig(_check_ir_validity=False), partitioner=[XnnpackPartitioner()]
        )
        return lowered.to_executorch().buffer
