"""The sizes of one model beside each other: a table, and pictures of the metric over what each size costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from scap_hub.page.charts import Frame

_COSTS = (
    ("macs", 1e-9, "billion MACs"), ("macs", 1e-6, "million MACs"), ("macs", 1e-3, "thousand MACs"),
    ("latency_ms", 1.0, "milliseconds of latency"),
)  # fmt: skip
_LETTER = 8.5
"""Width of a letter of a name, in units of a chart."""
_GAP = 28
"""Height of the line below the charts that stand alone."""
_CONFUSED = 300
"""What it costs if a name is nearer to another point than to its own; a covered point costs 64."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def family_view(family: Mapping[str, Any], metric: str, target: str | None = None) -> dict[str, Any]:
    """What the page shows of a family.

    Args:
        family: What family.json holds.
        metric: Name of the task's metric, for a document that does not tell.
        target: That of the member that the page is of.
    """
    metric, members, siblings = _parts(family, metric)
    everyone = [{**own, "here": target is not None and own.get("target") == target} for own in (*members, *siblings)]
    return {
        "charts": charts_of(family, metric),
        "others": list(everyone[0].get("others") or {}),
        "members": everyone,
        "siblings": bool(siblings),
    }


def charts_of(family: Mapping[str, Any], metric: str) -> list[tuple[str, Markup]]:
    """A chart for each cost that was measured, with its name."""
    metric, members, siblings = _parts(family, metric)
    costs = [next((cost for cost in _COSTS if cost[0] == "macs" and _fits(members, cost[1])), _COSTS[2]), _COSTS[3]]
    found = []
    for key, unit, name in costs:
        own, others = _measured(members, key), _measured(siblings, key)
        if len(own) > 1:
            found.append((f"{metric} over {name}", _chart(own, others, key, unit, f"{metric} over {name}")))
    return found


def family_picture(family: Mapping[str, Any], metric: str) -> str | None:
    """The charts as an SVG file of its own; None where the metric was not measured."""
    charts = charts_of(family, metric)
    if not charts:
        return None
    siblings = bool(family.get("siblings"))
    width, height = 480 * len(charts), 240 + _GAP * siblings
    label = "; ".join(f"{name}, of the sizes of one model" for name, _ in charts)
    panels = "".join(
        str(chart).replace("<svg ", f'<svg x="{480 * number}" width="480" height="240" ', 1)
        for number, (_, chart) in enumerate(charts)
    )
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return f"{opening.format(width, height, label)}<style>{_ALONE}</style>{panels}{_KEY if siblings else ''}</svg>\n"


_ALONE = (
    "text{font:15px sans-serif;fill:#5b6673}.name{font-size:13px;font-weight:600;fill:#1b2430;paint-order:stroke;"
    "stroke:#fff;stroke-width:3px}.grid{stroke:#dfe3e8}"
    "circle{fill:#2563b8}circle.other,.name.other{fill:#b3621a}polyline{fill:none;stroke:#2563b8;stroke-width:2.5}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa6b4}.name{fill:#e6eaef;stroke:#0d1117}.grid{stroke:#2d3540}"
    "circle.other,.name.other{fill:#e7a562}}"
)
"""Style of a picture that is no part of the page."""
_KEY = (
    '<circle cx="74" cy="252" r="5"/><text x="86" y="257">dense and pruned</text>'
    '<circle class="other" cx="234" cy="252" r="5"/><text x="246" y="257">smaller models of the zoo</text>'
)


def _parts(family: Mapping[str, Any], metric: str) -> tuple[str, list[Any], list[Any]]:
    """Name of the metric, dense and pruned members, smaller models of the zoo."""
    return family.get("metric") or metric, [family["dense"], *family["members"]], list(family.get("siblings") or ())


def _fits(members: Sequence[Mapping[str, Any]], unit: float) -> bool:
    return max(member["macs"] for member in members) * unit >= 1


def _measured(members: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Those of which both cost and metric are known, the cheapest first."""
    known = [member for member in members if member.get("top1") is not None and member.get(key) is not None]
    return sorted(known, key=lambda member: member[key])


def _chart(
    members: Sequence[Mapping[str, Any]], siblings: Sequence[Mapping[str, Any]], key: str, unit: float, across: str
) -> Markup:
    everyone = [*members, *siblings]
    xs, ys = [unit * member[key] for member in everyone], [member["top1"] for member in everyone]
    frame = Frame([0, *xs], ys, percent=True)
    count = len(members)
    points = [frame.at(*point) for point in zip(xs, ys, strict=True)]
    dots = "".join(f'<circle class="other" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points[count:])
    names = [str(member["name"]) for member in everyone]
    label = f"{across} of {len(names)} models, " + ", ".join(names)
    return frame.svg(frame.line(xs[:count], ys[:count], "stays") + dots + _named(points, names, count), across, label)


def _named(points: Sequence[tuple[float, float]], names: Sequence[str], own: int) -> str:
    """Names beside their points, each where it hides least; those after the first `own` are of other models."""
    taken = [_around(x, y) for x, y in (*points, *_between(points[:own]))]
    texts: list[str] = []
    for (x, y), name in zip(points, names, strict=True):
        others = [point for point in points if point != (x, y)]
        long = _LETTER * len(name)
        # Above to the left first, where a rising curve is not; a line further away where nothing else is free.
        rows = [(x - 8 - long, y - 8), (x + 10, y + 18), (x + 8, y - 8), (x - 8 - long, y + 18)]
        rows += [(x + 8, y + 4), (x - 8 - long, y + 4)]
        rows += [(x - long / 2, y + away) for away in (-10, 18, -24, 34)]
        boxes = [(left, bottom - 11, left + long, bottom + 3) for left, bottom in rows]
        costs = [_hidden(box, taken) + _CONFUSED * _confused(box, (x, y), others) for box in boxes]
        best = boxes[costs.index(min(costs))]
        taken.append(best)
        place = (best[2], "end") if best[2] < x else (best[0], "start")
        kind = "name" if len(texts) < own else "name other"
        text = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        texts.append(text.format(kind, place[0], best[3] - 3, place[1], name))
    return "".join(texts)


def _around(x: float, y: float) -> Box:
    return x - 4, y - 4, x + 4, y + 4


def _confused(box: Box, own: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """Whether a name in a box would be taken for that of another point."""
    return any(_distance(box, other) < _distance(box, own) for other in others)


def _distance(box: Box, point: tuple[float, float]) -> float:
    """From a box to a point outside of it."""
    left, top, right, bottom = box
    x, y = point
    return math.hypot(max(left - x, 0.0, x - right), max(top - y, 0.0, y - bottom))


def _between(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places on the line through points, close enough for names to keep off it."""
    steps = [part / 12 for part in range(1, 12)]
    return [(x + s * (u - x), y + s * (v - y)) for (x, y), (u, v) in itertools.pairwise(points) for s in steps]


def _hidden(box: Box, taken: Sequence[Box]) -> float:
    """How much of what is drawn already a box covers, and of itself lies outside the chart."""
    left, top, right, bottom = box
    outside = max(0.0, 70 - left) + max(0.0, right - 478) + max(0.0, bottom - 194) + max(0.0, 1 - top)
    over = sum(max(0.0, min(right, r) - max(left, x)) * max(0.0, min(bottom, b) - max(top, y)) for x, y, r, b in taken)
    return over + 100 * outside
