"""Bodies of one-stage detectors as small modules of our own, for the coverage benchmark.

Each follows the blocks that the published networks are made of, at a small width: bottlenecks in a cross-stage split
(C3, C2f), ELAN, spatial pyramid pooling (SPPF), attention over positions (PSA), a path-aggregation neck, and heads for
three strides, coupled or decoupled. A body returns the heads' maps, or, with `decoded`, boxes and class scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[[int, int], nn.Module]
BINS = 16
"""Distances to a box's side that a decoupled head weighs."""


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class Bottleneck(nn.Module):
    """Two convolutions with a residual."""

    def __init__(self, width: int, residual: bool = True) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(width, width, 3), ConvNorm(width, width, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        made = self.second(self.first(x))
        return x + made if self.residual else made


class C3(nn.Module):
    """Two branches, one of them through bottlenecks, joined."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        hidden = outputs // 2
        self.left, self.right = ConvNorm(inputs, hidden), ConvNorm(inputs, hidden)
        self.blocks = nn.Sequential(*(Bottleneck(hidden) for _ in range(depth)))
        self.join = ConvNorm(2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((self.blocks(self.left(x)), self.right(x)), 1))


class C2f(nn.Module):
    """One convolution split in two; each bottleneck reads the last part, and all parts are joined."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, inner: Block | None = None) -> None:
        super().__init__()
        self.hidden = outputs // 2
        self.enter = ConvNorm(inputs, 2 * self.hidden)
        self.blocks = nn.ModuleList(
            inner(self.hidden, self.hidden) if inner else Bottleneck(self.hidden) for _ in range(depth)
        )
        self.join = ConvNorm((2 + depth) * self.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).split((self.hidden, self.hidden), 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.join(torch.cat(parts, 1))


class C2fChunked(C2f):
    """The same, split by `chunk`."""

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Elan(nn.Module):
    """Two branches; what each stage of the second one makes is joined as well."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2) -> None:
        super().__init__()
        hidden = outputs // 2
        self.left, self.right = ConvNorm(inputs, hidden), ConvNorm(inputs, hidden)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvNorm(hidden, hidden, 3), ConvNorm(hidden, hidden, 3)) for _ in range(depth)
        )
        self.join = ConvNorm((2 + depth) * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.left(x), self.right(x)]
        for stage in self.stages:
            kept.append(stage(kept[-1]))
        return self.join(torch.cat(kept[::-1], dim=1))


class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution, and the input itself where it fits, summed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.point = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.same = nn.BatchNorm2d(inputs) if inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        same = 0 if self.same is None else self.same(x)
        return F.silu(self.wide(x) + self.point(x) + same)


class RepElan(nn.Module):
    """A split convolution whose second half goes through C3 blocks of re-parameterisable convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = outputs // 2
        self.enter = ConvNorm(inputs, outputs)
        self.first = nn.Sequential(C3(outputs // 2, hidden), RepConv(hidden, hidden))
        self.second = nn.Sequential(C3(hidden, hidden), RepConv(hidden, hidden))
        self.join = ConvNorm(outputs + 2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in (self.first, self.second))
        return self.join(torch.cat(parts, 1))


class SpatialPyramid(nn.Module):
    """Max pools of growing reach, joined (SPPF)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = inputs // 2
        self.enter, self.join = ConvNorm(inputs, hidden), ConvNorm(4 * hidden, outputs)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.enter(x)]
        pooled.extend(self.pool(pooled[-1]) for _ in range(3))
        return self.join(torch.cat(pooled, 1))


class SplitPyramid(nn.Module):
    """The same with three windows, beside a branch that passes by (SPPCSPC)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.by, self.enter = ConvNorm(inputs, outputs), ConvNorm(inputs, outputs)
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in (5, 9, 13))
        self.after, self.join = ConvNorm(4 * outputs, outputs), ConvNorm(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        pooled = self.after(torch.cat([entered] + [pool(entered) for pool in self.pools], 1))
        return self.join(torch.cat((pooled, self.by(x)), 1))


class PositionAttention(nn.Module):
    """Attention over positions with narrow keys, and a depthwise convolution of the values."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.key = self.head // 2
        self.scale = self.key**-0.5
        self.qkv = nn.Sequential(nn.Conv2d(width, width + 2 * self.key * heads, 1, bias=False),
                                 nn.BatchNorm2d(width + 2 * self.key * heads))  # fmt: skip
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.out = ConvNorm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (
            self.qkv(x)
            .view(n, self.heads, 2 * self.key + self.head, h * w)
            .split([self.key, self.key, self.head], dim=2)
        )
        weights = (q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1)
        mixed = (v @ weights.transpose(-2, -1)).view(n, c, h, w) + self.place(v.reshape(n, c, h, w))
        return self.out(mixed)


class SplitAttention(nn.Module):
    """Half of the channels go through attention and a feed-forward block (C2PSA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.enter, self.join = ConvNorm(width, width), ConvNorm(width, width)
        self.attention = PositionAttention(half)
        self.feed = nn.Sequential(ConvNorm(half, 2 * half), nn.Conv2d(2 * half, half, 1), nn.BatchNorm2d(half))

    def forward(self, x: Tensor) -> Tensor:
        by, through = self.enter(x).chunk(2, dim=1)
        through = through + self.attention(through)
        through = through + self.feed(through)
        return self.join(torch.cat((by, through), 1))


class Focus(nn.Module):
    """Every second pixel into channels, then a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNorm(4 * inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class CoupledHead(nn.Module):
    """One convolution a stride: box, objectness and classes for each of three anchors."""

    def __init__(self, widths: tuple[int, ...], classes: int, decoded: bool) -> None:
        super().__init__()
        self.decoded, self.each = decoded, classes + 5
        self.heads = nn.ModuleList(nn.Conv2d(width, 3 * self.each, 1) for width in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        made = []
        for head, x in zip(self.heads, maps, strict=True):
            n, _, h, w = x.shape
            made.append(head(x).view(n, 3, self.each, h, w).permute(0, 1, 3, 4, 2).contiguous())
        if not self.decoded:
            return made
        return torch.cat([x.sigmoid().flatten(1, 3) for x in made], 1)


class DecoupledHead(nn.Module):
    """Boxes, as weighted distances to their sides, and classes by convolutions of their own."""

    def __init__(self, widths: tuple[int, ...], classes: int, decoded: bool, depthwise: bool = False) -> None:
        super().__init__()
        self.decoded, self.classes = decoded, classes
        inner = max(16, widths[0] // 4, 4 * BINS)
        seen = max(widths[0], min(classes, 100))
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvNorm(width, inner, 3), ConvNorm(inner, inner, 3), nn.Conv2d(inner, 4 * BINS, 1))
            for width in widths
        )
        self.scores = nn.ModuleList(
            nn.Sequential(*self._separable(width, seen), *self._separable(seen, seen), nn.Conv2d(seen, classes, 1))
            if depthwise
            else nn.Sequential(ConvNorm(width, seen, 3), ConvNorm(seen, seen, 3), nn.Conv2d(seen, classes, 1))
            for width in widths
        )
        self.weigh = nn.Conv2d(BINS, 1, 1, bias=False)
        self.weigh.weight.data[:] = torch.arange(BINS, dtype=torch.float).view(1, BINS, 1, 1)

    @staticmethod
    def _separable(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return ConvNorm(inputs, inputs, 3, groups=inputs), ConvNorm(inputs, outputs)

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        heads = zip(self.boxes, self.scores, maps, strict=True)
        made = [torch.cat((boxes(x), scores(x)), 1) for boxes, scores, x in heads]
        if not self.decoded:
            return made
        places = torch.cat([x.view(x.shape[0], 4 * BINS + self.classes, -1) for x in made], 2)
        boxes, scores = places.split((4 * BINS, self.classes), 1)
        n, _, count = boxes.shape
        sides = self.weigh(boxes.view(n, 4, BINS, count).transpose(2, 1).softmax(1)).view(n, 4, count)
        return torch.cat((sides, scores.sigmoid()), 1)


class ObjectnessHead(nn.Module):
    """A stem a stride, then classes beside boxes and objectness."""

    def __init__(self, widths: tuple[int, ...], classes: int, decoded: bool) -> None:
        super().__init__()
        self.decoded = decoded
        inner = widths[0]
        self.stems = nn.ModuleList(ConvNorm(width, inner) for width in widths)
        self.seen = nn.ModuleList(nn.Sequential(ConvNorm(inner, inner, 3), ConvNorm(inner, inner, 3)) for _ in widths)
        self.placed = nn.ModuleList(nn.Sequential(ConvNorm(inner, inner, 3), ConvNorm(inner, inner, 3)) for _ in widths)
        self.scores = nn.ModuleList(nn.Conv2d(inner, classes, 1) for _ in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(inner, 4, 1) for _ in widths)
        self.objects = nn.ModuleList(nn.Conv2d(inner, 1, 1) for _ in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        made = []
        for index, x in enumerate(maps):
            x = self.stems[index](x)
            placed = self.placed[index](x)
            scores = self.scores[index](self.seen[index](x))
            objects = self.objects[index](placed)
            made.append(torch.cat([self.boxes[index](placed), objects.sigmoid(), scores.sigmoid()], 1))
        return torch.cat([x.flatten(start_dim=2) for x in made], dim=2).permute(0, 2, 1) if self.decoded else made


class Detector(nn.Module):
    """Five stages, a neck that aggregates their last three maps up and down again, and a head."""

    def __init__(
        self,
        block: Block,
        head: Callable[[tuple[int, ...]], nn.Module],
        stem: Block = lambda inputs, outputs: ConvNorm(inputs, outputs, 3, 2),
        pyramid: Block = SpatialPyramid,
        after: Callable[[int], nn.Module] | None = None,
        width: int = 16,
    ) -> None:
        super().__init__()
        w = [width * 2**level for level in range(5)]
        self.stem = stem(3, w[0])
        self.down = nn.ModuleList(ConvNorm(a, b, 3, 2) for a, b in itertools.pairwise(w))
        self.stages = nn.ModuleList(block(own, own) for own in w[1:])
        self.pyramid = pyramid(w[4], w[4])
        self.after = after(w[4]) if after else nn.Identity()
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top, self.middle = block(w[4] + w[3], w[3]), block(w[3] + w[2], w[2])
        self.lower = nn.ModuleList([ConvNorm(w[2], w[2], 3, 2), ConvNorm(w[3], w[3], 3, 2)])
        self.merged = nn.ModuleList([block(w[2] + w[3], w[3]), block(w[3] + w[4], w[4])])
        self.head = head((w[2], w[3], w[4]))

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        x, maps = self.stem(x), []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        p3, p4, p5 = maps[1], maps[2], self.after(self.pyramid(maps[3]))
        p4 = self.top(torch.cat([self.up(p5), p4], 1))
        p3 = self.middle(torch.cat([self.up(p4), p3], 1))
        p4 = self.merged[0](torch.cat([self.lower[0](p3), p4], 1))
        p5 = self.merged[1](torch.cat([self.lower[1](p4), p5], 1))
        return self.head([p3, p4, p5])


def c3_coupled(decoded: bool = False) -> Detector:
    """C3 blocks and coupled heads, as in YOLOv5."""
    return Detector(C3, lambda widths: CoupledHead(widths, 80, decoded))


def c3_focus_objectness(decoded: bool = False) -> Detector:
    """Focus, C3 blocks and decoupled heads with objectness, as in YOLOX."""
    return Detector(C3, lambda widths: ObjectnessHead(widths, 80, decoded), stem=Focus)


def elan_coupled(decoded: bool = False) -> Detector:
    """ELAN blocks, a split pyramid and coupled heads, as in YOLOv7."""
    return Detector(Elan, lambda widths: CoupledHead(widths, 80, decoded), pyramid=SplitPyramid)


def c2f_decoupled(decoded: bool = False) -> Detector:
    """C2f blocks and decoupled heads, as in YOLOv8."""
    return Detector(C2fChunked, lambda widths: DecoupledHead(widths, 80, decoded))


def rep_elan_decoupled(decoded: bool = False) -> Detector:
    """ELAN blocks of re-parameterisable convolutions, as in YOLOv9."""
    return Detector(RepElan, lambda widths: DecoupledHead(widths, 80, decoded))


def c2f_attention(decoded: bool = False) -> Detector:
    """C2f blocks, attention after the pyramid, separable heads, as in YOLOv10."""
    return Detector(C2f, lambda widths: DecoupledHead(widths, 80, decoded, True), after=SplitAttention)


def c3k2_attention(decoded: bool = False) -> Detector:
    """C2f blocks of C3 blocks, attention after the pyramid, separable heads, as in YOLO11."""
    return Detector(
        lambda inputs, outputs: C2f(inputs, outputs, 2, C3),
        lambda widths: DecoupledHead(widths, 80, decoded, True),
        after=SplitAttention,
    )
