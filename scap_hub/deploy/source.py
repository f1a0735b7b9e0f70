"""What is exported: a saved model in memory, and where it comes from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scap_hub.deploy.capture import Named
from scap_hub.tasks import IMAGE_CLASSIFICATION
from scap_hub.zoo.registry import zoo_of


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        net: In eval mode, in float32, on the CPU.
        images: Two example images, float32 (2, C, H, W).
        folder: Where it is saved, or its Hub id; exporters of other libraries load it from there.
        zoo: Name of the library that it comes from.
        resizable: Whether a file for images of any height and width is tried, in a format that can have that.
    """

    net: Named
    images: Tensor
    folder: str | Path = ""
    zoo: str = ""
    resizable: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        input_size: tuple[int, int, int],
        folder: str | Path = "",
        zoo: str = "",
        resizable: bool = False,
    ) -> Source:
        """From a model, of which a copy is made, and its input size, (channels, height, width) in pixels.

        Classifiers are fed one size, and of a module of a user's own nothing is known, so these are not resizable.

        Raises:
            ModelError: The model does not run on images of this size, or returns nothing for each of them.
        """
        images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
        resizable = resizable and zoo_of(model).task(model) not in (None, IMAGE_CLASSIFICATION.name)
        return cls(Named(copy.deepcopy(model).cpu().float().eval(), images), images, folder, zoo, resizable)
