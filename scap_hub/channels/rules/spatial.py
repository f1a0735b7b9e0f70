"""Pooling, resizing, padding: operators on the last dimensions of a feature map."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.ids import Ids, support
from scap_hub.channels.rules.registry import Call, rule


def _channels_only(call: Call, spatial: int) -> tuple[np.ndarray, ...]:
    """Layers that do not touch the last `spatial` dimensions; the others are pinned."""
    x = call.tensors[0]
    first, kept = len(x.shape) - spatial, []
    for layer in x.layers:
        if any(dim >= first for dim in support(layer)):
            call.ledger.pin(layer, f"lies along the window of {call.place}")
        else:
            kept.append(layer)
    return tuple(kept)


@rule(
    "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_linear1d", "upsample_nearest1d",
)  # fmt: skip
def pool1d(call: Call) -> Ids:
    """(N, C, L)."""
    return Ids(call.shape, _channels_only(call, 1))


@rule(
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_bilinear2d",
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "max_pool2d_with_indices", "grid_sampler",
)  # fmt: skip
def pool2d(call: Call) -> Ids | list[Ids]:
    """(N, C, H, W)."""
    layers = _channels_only(call, 2)
    value = call.node.meta["val"]
    return [Ids(shape, layers) for shape in call.shapes] if isinstance(value, tuple | list) else Ids(call.shape, layers)


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def pad(call: Call) -> Ids:
    """Padded dimensions cannot shrink; a constant keeps its place."""
    amounts = call.args.get("pad") or call.args["padding"]
    x = call.ids("self")
    rank = len(x.shape)
    padded = {rank - 1 - index // 2 for index, amount in enumerate(amounts) if amount}
    kept = []
    for layer in x.layers:
        if padded & set(support(layer)):
            call.ledger.pin(layer, f"is padded ({call.place})")
        else:
            kept.append(layer)
    return Ids(call.shape, tuple(kept))
