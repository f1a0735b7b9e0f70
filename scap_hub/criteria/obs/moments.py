"""Second moments of the input patches of blocks, over the images of all processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from scap_hub.criteria.frequencies import filtered
from scap_hub.criteria.obs.blocks import BlockKey, ConsumerBlock, by_layer
from scap_hub.criteria.patches import PatchLayer, patches

PATCHES = 4  # for each column of a block's weight, over all images
PLACES = 16  # of each image, at least


class BlockSums:
    """Sums of c cᵀ, where c are columns beside each other as in a block's weight; float64."""

    def __init__(self, blocks: Iterable[ConsumerBlock]) -> None:
        """Starts empty."""
        self.blocks = by_layer(blocks)
        self._sums: dict[BlockKey, Tensor] = {}

    def add(self, block: ConsumerBlock, rows: Tensor) -> None:
        """Adds the products of rows, (rows, m)."""
        rows = rows[:, torch.from_numpy(block.columns).to(rows.device)]
        product = rows.T @ rows
        self._sums[block.key] = self._sums[block.key] + product if block.key in self._sums else product.double()

    def total(self) -> dict[BlockKey, Tensor]:
        """(n, n) for each block, over all processes, of which some may have seen no images."""
        if PartialState().num_processes == 1:
            return self._sums
        return {
            block.key: reduce(self._sums.get(block.key, _nothing(block)), reduction="sum")
            for blocks in self.blocks.values()
            for block in blocks
        }


def _nothing(block: ConsumerBlock) -> Tensor:
    size = block.columns.size
    return torch.zeros(size, size, dtype=torch.float64, device=PartialState().device)


class PatchMoments:
    """Second moments of patches p, the means of p pᵀ, with a 1 behind p where the layer has a bias."""

    def __init__(
        self, blocks: Iterable[ConsumerBlock], images: int, powers: Mapping[str, Tensor] | None = None
    ) -> None:
        """Starts empty.

        Args:
            blocks: Whose patches.
            images: How many images will be seen, over all processes.
            powers: How much errors of layers count at each frequency, by path, see `filtered`; of those that are left
                out, all count the same.
        """
        self._sums, self._images, self._powers = BlockSums(blocks), images, powers or {}
        self._patches: Counter[str] = Counter()  # of each layer, on this process

    @property
    def paths(self) -> list[str]:
        """Of the layers."""
        return list(self._sums.blocks)

    def add(self, path: str, layer: PatchLayer, x: Tensor, images: int) -> None:
        """Adds the input of a layer."""
        blocks = self._sums.blocks[path]
        widest = max(block.columns.size for block in blocks)
        x, constant = filtered(layer, x, self._powers.get(path))
        rows = patches(layer, x, images, max(PLACES, ceil(PATCHES * widest / self._images)))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_full((*rows.shape[:2], 1), constant)], 2)
        for block in blocks:
            self._sums.add(block, rows[block.number])
        self._patches[path] += rows.shape[1]

    def means(self) -> dict[BlockKey, Tensor]:
        """(n, n) float64 for each block, over all processes; blocks of layers that did not run have none."""
        counts: Counter[str] = Counter()
        for part in gather_object([self._patches]):
            counts.update(part)
        return {key: total / counts[key[0]] for key, total in self._sums.total().items() if counts[key[0]]}
