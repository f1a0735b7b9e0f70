"""A model as exporters want it: images in, logits out, recorded for any batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from scap_hub.errors import ModelError
from scap_hub.text import one_line
from scap_hub.zoo.base import logits

# What the Hub's exporters call them, and what transformers.js asks for.
INPUT = "pixel_values"
OUTPUT = "logits"


class Logits(nn.Module):
    """Images in, logits out, whatever the model's own output looks like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images, (N, C, H, W), to logits.

        Raises:
            ModelError: The model does not give logits, or predicts something beside them, which a file would lack.
        """
        output = self.model(pixel_values)
        beside = [name for name in output if name.startswith("pred_")] if isinstance(output, ModelOutput) else []
        if beside:
            raise ModelError(
                f"it returns {' and '.join(beside)} beside the logits, and an exported file has logits only: export it "
                "with torch.onnx.export on scap_hub.load(folder)"
            )
        return logits(output)


def captured(net: Logits, images: Tensor) -> torch.export.ExportedProgram:
    """Records a model for any batch size.

    Args:
        net: In eval mode, in float32, on the CPU.
        images: Two or more of them, (N, C, H, W): a batch of one would be written into the program.

    Raises:
        ModelError: torch.export cannot record it.
    """
    batch: dict[str, Any] = {INPUT: {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(net, (images,), dynamic_shapes=batch, strict=False)
    except Exception as error:
        raise ModelError(f"torch.export cannot capture {type(net.model).__name__}: {one_line(error)}") from error
