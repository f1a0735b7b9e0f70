"""Small pictures for the page, as inline SVG and PNG; colours come from the style sheet."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Collection, Sequence

from markupsafe import Markup

_BARS = 40
_WIDTH, _HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 26, 12, 50


def importances(scores: Sequence[float], kept: Collection[int]) -> Markup:
    """Importances of a group's channels in descending order, those that stay in another colour than those that go.

    Neighbours share a bar where there are more than 40. The heights are logarithmic where scores span decades.
    """
    stays = set(kept)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    heights = _heights(scores)
    count = min(_BARS, len(order))
    wide = 120 / count
    paths: dict[str, list[str]] = {"stays": [], "goes": []}
    for bar in range(count):
        part = order[bar * len(order) // count : (bar + 1) * len(order) // count]
        height = 24 * sum(heights[i] for i in part) / len(part)
        share = sum(i in stays for i in part) / len(part)
        x, width = bar * wide, max(wide - 0.6, 0.6)
        if share:
            paths["stays"].append(f"M{x:.1f} 26v{-height * share:.1f}h{width:.1f}V26z")
        if share < 1:
            rest = height * (1 - share)
            paths["goes"].append(f"M{x:.1f} {26 - height * share:.1f}v{-rest:.1f}h{width:.1f}v{rest:.1f}z")
    inside = "".join(f'<path class="{name}" d="{"".join(path)}"/>' for name, path in paths.items() if path)
    label = f"importances of {len(scores)} channels in descending order; {len(stays)} stay"
    return Markup(f'<svg class="spark" viewBox="0 0 120 26" role="img" aria-label="{label}">{inside}</svg>')


def _heights(scores: Sequence[float]) -> list[float]:
    """0.06 to 1 for each score."""
    low, high = min(scores), max(scores)
    if high <= low:
        return [0.6] * len(scores)
    middle = sorted(scores)[len(scores) // 2]
    if low >= 0 and high > 50 * middle:
        shares = [1 + math.log10(max(value / high, 1e-4)) / 4 for value in scores]
    else:
        shares = [(value - low) / (high - low) for value in scores]
    return [0.06 + 0.94 * share for share in shares]


def skyline(before: Sequence[int], after: Sequence[int], label: str) -> Markup:
    """One bar for each layer, from the first to the last: the dense width, and what is left of it."""
    count, top = len(before), max(before, default=1)
    wide = 720 / max(count, 1)
    parts = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        x, width = i * wide, max(wide * 0.82, 1)
        tall, left = (150 * math.sqrt(value / top) for value in (old, new))
        parts.append(
            f'<rect class="goes" x="{x:.1f}" y="{150 - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"/>'
            f'<rect class="stays" x="{x:.1f}" y="{150 - left:.1f}" width="{width:.1f}" height="{left:.1f}"/>'
        )
    return Markup(f'<svg class="skyline" viewBox="0 0 720 150" preserveAspectRatio="none" role="img" '
                  f'aria-label="{{}}">{"".join(parts)}</svg>').format(label)  # fmt: skip


class Frame:
    """Axes of a chart: where values lie, and the lines and numbers around them."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], *, percent: bool = False, x_percent: bool = False,
        whole: bool = False,
    ) -> None:  # fmt: skip
        """The frame of points; `whole` numbers the horizontal axis in whole numbers, the others in percent."""
        self.x, self.y = _ticks(min(xs), max(xs), 1 if whole else 0), _ticks(min(ys), max(ys))
        self.percent, self.x_percent = percent, x_percent

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point of the picture."""
        across = (x - self.x[0]) / (self.x[-1] - self.x[0])
        up = (y - self.y[0]) / (self.y[-1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def line(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
        """A line with a dot at each of its points."""
        points = [self.at(x, y) for x, y in zip(xs, ys, strict=True)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points[:60])
        return f'<polyline class="{kind}" points="{joined}"/>{dots}'

    def axes(self, across: str) -> str:
        """Lines and numbers."""
        parts = []
        for value in self.y:
            x, y = self.at(self.x[0], value)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(
                f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{_number(value, self.percent)}</text>'
            )
        for value in self.x:
            x, _ = self.at(value, self.y[0])
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 30}" text-anchor="middle">{_number(value, self.x_percent)}</text>'
            )
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{Markup.escape(across)}</text>')
        return "".join(parts)

    def svg(self, inside: str, across: str, label: str) -> Markup:
        """The whole chart."""
        opening = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{{}}">'
        return Markup(opening).format(label) + Markup(self.axes(across) + inside + "</svg>")


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str, percent: bool) -> Markup:
    """Lines over epochs.

    Args:
        lines: Kind (its class in the style sheet), and (epoch, value) points.
        label: For screen readers.
        percent: Whether values are shares.
    """
    points = [point for _, own in lines for point in own]
    frame = Frame([x for x, _ in points], [y for _, y in points], percent=percent, whole=True)
    inside = "".join(frame.line([x for x, _ in own], [y for _, y in own], kind) for kind, own in lines)
    return frame.svg(inside, "epoch", label)


def heat(levels: Sequence[Sequence[int]], label: str) -> Markup:
    """A spectrum, 0 to 100, as a picture of one pixel for each frequency."""
    rows = b"".join(b"\0" + bytes(max(0, min(100, int(level))) for level in row) for row in levels)
    palette = b"".join(bytes(_colour(level / 100)) for level in range(101))
    head = struct.pack(">IIBBBBB", len(levels[0]), len(levels), 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    source = base64.b64encode(png).decode()
    return Markup('<img class="heat" alt="{}" src="data:image/png;base64,{}">').format(label, source)


_COLOURS = ((13, 8, 60), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _colour(share: float) -> tuple[int, ...]:
    place = share * (len(_COLOURS) - 1)
    below = min(int(place), len(_COLOURS) - 2)
    pairs = zip(_COLOURS[below], _COLOURS[below + 1], strict=True)
    return tuple(round(low + (high - low) * (place - below)) for low, high in pairs)


def _ticks(low: float, high: float, least: float = 0) -> list[float]:
    """About four round numbers that enclose a range, `least` apart."""
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("a number is not finite")
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = max(least, next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.4g}"
