"""Models with an input beside the images, which is held constant: as they run once it is decided what they are for."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


class Asked(nn.Module):
    """OneFormer asked for one task; of the question it wants the tokens, for each image the same."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("tokens", tokens)  # (1, length)

    def forward(self, images: Tensor) -> Any:
        """Images (N, C, H, W) to what the model returns."""
        return self.model(images, self.tokens.expand(len(images), -1))


def oneformer() -> Asked:
    """OneFormer on a small Swin, asked a question of 16 tokens."""
    body = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.OneFormerConfig(
        backbone_config=body, num_queries=10, task_seq_len=16, conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=48, encoder_layers=1, decoder_layers=3, num_attention_heads=4, dim_feedforward=48,
        num_labels=5,
    )  # fmt: skip
    return Asked(transformers.OneFormerForUniversalSegmentation(config), torch.arange(16.0)[None])
