"""Pooling, resizing, padding: operators on the last dimensions of a feature map."""

from __future__ import annotations

import numpy as np

from scap_hub.channels.labels import STAYS, Ids, line, support
from scap_hub.channels.operators.table import Call, rule


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
    value = call.node.value
    return [Ids(shape, layers) for shape in call.shapes] if isinstance(value, tuple | list) else Ids(call.shape, layers)


@rule("unfold")
def unfold(call: Call) -> Ids:
    """Windows along one dimension, laid along a new last one."""
    x, dim = call.ids("self"), call["dimension"] % len(call.ids("self").shape)
    for layer in x.layers:
        if dim in support(layer):
            call.ledger.pin(layer, f"lies along the window of {call.place}")
    kept = [layer[..., None] for layer in x.layers if dim not in support(layer)]
    return Ids(call.shape, tuple(kept))


@rule("im2col")
def im2col(call: Call) -> Ids:
    """(N, C, H, W) to (N, C * window, L): the places of its window follow each channel."""
    _channels_only(call, 2)
    channels = call.ids("self").along(1)
    if channels is None:
        return Ids(call.shape)
    return Ids(call.shape, (line(np.repeat(channels, call.shape[1] // channels.size), 1, 3),))


@rule("col2im")
def col2im(call: Call) -> Ids:
    """(N, C * window, L) to (N, C, H, W): a channel leaves with all places of its window."""
    _channels_only(call, 1)
    places = call.ids("self").along(1)
    if places is None:
        return Ids(call.shape)
    places = places.reshape(call.shape[1], -1)
    call.ledger.equate(places[:, :1], places, f"is folded into a channel that stays ({call.place})")
    return Ids(call.shape, (line(places[:, 0], 1, 4),))


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def pad(call: Call) -> Ids:
    """Constants around the channels stay; whatever copies elements to the border holds them."""
    amounts = call.args.get("pad") or call.args["padding"]
    x = call.ids("self")
    rank = len(x.shape)
    padded = {rank - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}
    constant = call.args.get("mode", "constant") == "constant" and not call.op.startswith(("reflection", "replication"))
    kept = []
    for layer in x.layers:
        around = [padded.get(dim, (0, 0)) if dim in support(layer) else (0, 0) for dim in range(rank)]
        if not any(map(any, around)):
            kept.append(layer)
        elif constant and support(layer) == tuple(dim for dim in range(rank) if any(around[dim])) and min(amounts) >= 0:
            kept.append(np.pad(layer, around, constant_values=STAYS))
        else:
            call.ledger.pin(layer, f"is padded ({call.place})")
    return Ids(call.shape, tuple(kept))
