"""Pooling, resizing, padding: operators on the last dimensions of a feature map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from scap_hub.channels.labels import STAYS, Labels, broadcast, line, support
from scap_hub.channels.operators.table import Call, Size, operator


def _channels_only(call: Call, spatial: int) -> tuple[np.ndarray, ...]:
    """Label arrays that do not touch the last `spatial` dimensions; the others are pinned."""
    x = call.tensors[0]
    first, kept = len(x.shape) - spatial, []
    for array in x.arrays:
        if any(dim >= first for dim in support(array)):
            call.ledger.pin(array, f"lies along the window of {call.place}")
        else:
            kept.append(array)
    return tuple(kept)


def _mapped(call: Call, arrays: tuple[np.ndarray, ...]) -> Labels | list[Labels]:
    """One result with these labels, or several."""
    if isinstance(call.node.value, tuple | list):
        return [Labels(shape, arrays) for shape in call.shapes]
    return Labels(call.shape, arrays)


@operator(
    "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_linear1d", "upsample_nearest1d",
)  # fmt: skip
def on_lines(call: Call) -> Labels | list[Labels]:
    """(N, C, L)."""
    return _mapped(call, _channels_only(call, 1))


@operator(
    "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_bilinear2d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "max_pool2d_with_indices",
)  # fmt: skip
def on_maps(call: Call) -> Labels | list[Labels]:
    """(N, C, H, W)."""
    return _mapped(call, _channels_only(call, 2))


@operator(
    "max_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_trilinear3d",
    "upsample_nearest3d",
)  # fmt: skip
def on_volumes(call: Call) -> Labels | list[Labels]:
    """(N, C, D, H, W)."""
    return _mapped(call, _channels_only(call, 3))


def _slides_over_channels(call: Call) -> bool:
    """Whether the window lies along tracked elements, as in local response normalisation."""
    x = call.tensors[0]
    first = len(x.shape) - len(call["kernel_size"])
    return any(dim >= first for array in x.arrays for dim in support(array))


@operator("avg_pool1d", "avg_pool2d", "avg_pool3d", counts=_slides_over_channels)
def average(call: Call) -> Labels:
    """Means over windows.

    Local response normalisation slides a window over channels with zeros around them: each mean leaves with the
    channel in the middle of its window, and what is left of the channels are neighbours then.
    """
    x, spatial = call.tensors[0], int(call.op[len("avg_pool")])
    first, kept = len(x.shape) - spatial, []
    for array in x.arrays:
        dims = support(array)
        if not any(dim >= first for dim in dims):
            kept.append(array)
        elif len(dims) == 1 and (middle := _middle(call, array, dims[0] - first)) is not None:
            kept.append(middle)
        else:
            call.ledger.pin(array, f"lies along the window of {call.place}")
    return Labels(call.shape, tuple(kept))


def _middle(call: Call, array: np.ndarray, axis: int) -> np.ndarray | None:
    """Labels of the elements in the middle of each window; None where the window does anything but slide."""
    width = call["kernel_size"][min(axis, len(call["kernel_size"]) - 1)]
    strides, padding = call["stride"] or call["kernel_size"], call["padding"]
    line_, left = array.reshape(-1), width // 2
    right = width - 1 - left
    slides = strides[min(axis, len(strides) - 1)] == 1 and padding[min(axis, len(padding) - 1)] == 0
    around = np.concatenate([line_[:left], line_[line_.size - right :]])
    if not slides or (around != STAYS).any():
        return None
    middle = line_[left : line_.size - right]
    return line(middle, support(array)[0], array.ndim)


@operator("grid_sampler")
def sample(call: Call) -> Labels:
    """Values at the places that a grid names: its coordinates stay."""
    call.ledger.pin_all([call.labels("grid")], f"holds the coordinates of {call.place}")
    arrays = _channels_only(call, len(call.labels("input").shape) - 2)
    return Labels(call.shape, arrays)


@operator("max_unpool2d", "max_unpool3d")
def unpool(call: Call) -> Labels:
    """Each value at the place that its maximum came from, zeros elsewhere."""
    x, places = call.labels("self"), call.labels("indices")
    arrays = _channels_only(call, len(call["output_size"]))
    fixed = f"is placed by numbers that cannot shrink ({call.place})"
    met = broadcast(call.ledger, [Labels(x.shape, arrays), places], x.shape, fixed)
    return Labels(call.shape, met.arrays)


@operator("affine_grid_generator", idle=frozenset({("size", 1)}))
def affine_grid(call: Call) -> Labels:
    """Coordinates from affine maps; of the size that it is given it reads all but the channels."""
    call.ledger.pin_all([call.labels("theta")], f"holds the coordinates of {call.place}")
    return Labels(call.shape)


@operator("pixel_shuffle")
def pixel_shuffle(call: Call) -> Labels:
    """(N, C r², H, W) to (N, C, r H, r W): the r² channels that become one leave together."""
    _channels_only(call, 2)
    dim = len(call.shape) - 3
    channels = call.labels("self").along(dim)
    if channels is None:
        return Labels(call.shape)
    blocks = channels.reshape(-1, call["upscale_factor"] ** 2)
    call.ledger.equate(blocks, blocks[:, :1], f"is shuffled into one channel ({call.place})")
    return Labels(call.shape, (line(blocks[:, 0], dim, len(call.shape)),))


@operator("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Labels:
    """(N, C, r H, r W) to (N, C r², H, W)."""
    _channels_only(call, 2)
    dim = len(call.shape) - 3
    channels = call.labels("self").along(dim)
    if channels is None:
        return Labels(call.shape)
    return Labels(call.shape, (line(np.repeat(channels, call["downscale_factor"] ** 2), dim, len(call.shape)),))


@operator("channel_shuffle")
def channel_shuffle(call: Call) -> Labels:
    """Channels in rows of C / groups, read by columns: the same column of every row leaves together."""
    x = call.labels("self")
    channels = x.along(1)
    for array in x.arrays:
        if 1 in support(array) and support(array) != (1,):
            call.ledger.pin(array, f"is shuffled ({call.place})")
    kept = tuple(array for array in x.arrays if 1 not in support(array))
    if channels is None:
        return Labels(call.shape, kept)
    rows = channels.reshape(call["groups"], -1)
    call.ledger.equate(rows, rows[:1], f"is split into rows ({call.place})")
    return Labels(call.shape, (*kept, line(rows.T.reshape(-1), 1, len(call.shape))))


@operator("unfold")
def unfold(call: Call) -> Labels:
    """Windows along one dimension, laid along a new last one."""
    x, dim = call.labels("self"), call["dimension"] % len(call.labels("self").shape)
    for array in x.arrays:
        if dim in support(array):
            call.ledger.pin(array, f"lies along the window of {call.place}")
    kept = [array[..., None] for array in x.arrays if dim not in support(array)]
    return Labels(call.shape, tuple(kept))


@operator("im2col")
def im2col(call: Call) -> Labels:
    """(N, C, H, W) to (N, C * window, L): the places of its window follow each channel."""
    _channels_only(call, 2)
    dim = len(call.shape) - 2
    channels = call.labels("self").along(dim)
    if channels is None:
        return Labels(call.shape)
    return Labels(call.shape, (line(np.repeat(channels, call.shape[dim] // channels.size), dim, len(call.shape)),))


@operator("col2im")
def col2im(call: Call) -> Labels:
    """(N, C * window, L) to (N, C, H, W): a channel leaves with all places of its window."""
    _channels_only(call, 1)
    dim = len(call.shape) - 3
    places = call.labels("self").along(dim)
    if places is None:
        return Labels(call.shape)
    places = places.reshape(call.shape[dim], -1)
    call.ledger.equate(places[:, :1], places, f"is folded into a channel that stays ({call.place})")
    return Labels(call.shape, (line(places[:, 0], dim, len(call.shape)),))


def _amounts(call: Call) -> tuple[str, Sequence[int]]:
    """What is added before and after each dimension, the last one first; with the name of the argument."""
    name = "pad" if "pad" in call.args else "padding"
    return name, call[name]


def _channels_added(call: Call) -> Iterator[Size]:
    """The amounts that count channels."""
    name, amounts = _amounts(call)
    for labels in call.results[:1]:
        for dim, own in labels.lines():
            place = 2 * (len(call.shape) - 1 - dim)
            if place < len(amounts):
                before, after = amounts[place : place + 2]
                yield Size(name, place, own[:before])
                yield Size(name, place + 1, own[own.size - after :])


@operator("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", sizes=_channels_added)
def pad(call: Call) -> Labels:
    """Zeros around the channels are channels of their own; other constants stay, and what is copied there is held."""
    _, amounts = _amounts(call)
    x = call.labels("self")
    rank = len(x.shape)
    padded = {rank - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}
    constant = call.args.get("mode", "constant") == "constant" and not call.op.startswith(("reflection", "replication"))
    kept = []
    for array in x.arrays:
        dims = support(array)
        around = [padded.get(dim, (0, 0)) if dim in dims else (0, 0) for dim in range(rank)]
        if not any(map(any, around)):
            kept.append(array)
        elif not constant or dims != tuple(dim for dim in range(rank) if any(around[dim])) or min(amounts) < 0:
            call.ledger.pin(array, f"is padded ({call.place})")
        elif len(dims) > 1 or call.args.get("value"):
            kept.append(np.pad(array, around, constant_values=STAYS))
        else:
            before, after = around[dims[0]]
            zeros = call.ledger.fresh(before + after)
            kept.append(line(np.concatenate([zeros[:before], array.reshape(-1), zeros[before:]]), dims[0], rank))
    return Labels(call.shape, tuple(kept))
