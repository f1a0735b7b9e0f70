"""Pictures of a report, with matplotlib."""

from __future__ import annotations

import io
from typing import Any

from scap_hub.errors import ScapHubError
from scap_hub.text import did_you_mean

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise ScapHubError("pictures need matplotlib: pip install 'scap-hub[plot]'") from None

_STAYS, _GOES, _OTHER = "#2563b8", "#d3d9e1", "#b3621a"


class Picture(Figure):
    """A figure that shows itself in a notebook, with pyplot or without."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=110)
        return png.getvalue()


def plot(report: Any, kind: str) -> Figure:
    """See `Report.plot`; that module imports this one, so the report's type has no name here."""
    kinds = {"channels": _channels, "training": _training, "targets": _targets, "classes": _classes}
    if kind not in kinds:
        raise ScapHubError(f"no picture {kind!r}{did_you_mean(kind, kinds)}; take one of {', '.join(kinds)}")
    figure = Picture(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    kinds[kind](report, axes)
    # Above the axes: inside of them it would lie on what is drawn.
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    return figure


def _channels(report: Any, axes: Axes) -> None:
    places = range(len(report.groups))
    axes.bar(places, [group.size for group in report.groups.values()], color=_GOES, label="removed")
    axes.bar(places, [len(group.kept) for group in report.groups.values()], color=_STAYS, label="kept")
    if len(report.groups) <= 40:
        axes.set_xticks(places, list(report.groups), rotation=90, fontsize=7)
    axes.set_ylabel("channels")


def _training(report: Any, axes: Axes) -> None:
    if len(report.history) < 2:
        raise ScapHubError("nothing was trained in this run, so there are no curves")
    for key, colour in (("loss", _STAYS), ("validation_loss", _OTHER)):
        points = [(number, row[key]) for number, row in enumerate(report.history) if key in row]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=key.replace("_", " "))
    key = report.metric.key
    metric = [(number, 100 * row[key]) for number, row in enumerate(report.history) if key in row]
    if metric:
        right = axes.twinx()
        right.plot(*zip(*metric, strict=True), color="#333", linestyle="--", label=report.metric.name)
        right.set_ylabel(f"{report.metric.name}, %")
        right.spines["top"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")


def _targets(report: Any, axes: Axes) -> None:
    if report.details is None:
        raise ScapHubError("this report has no other targets; run prune to get them")
    choices = report.details.choices
    axes.plot([choice.macs / 1e6 for choice in choices], [100 * choice.loss for choice in choices], "o-", color=_STAYS)
    axes.axvline(report.after.macs / 1e6, color=_OTHER, linestyle="--", label="this run")
    axes.set_xlabel("million MACs that stay")
    axes.set_ylabel("predicted loss, %")


def _classes(report: Any, axes: Axes) -> None:
    before, after = report.before.by_class, report.after.by_class
    if not before or not after:
        raise ScapHubError("nothing was measured by class in this run")
    shares = [[100 * right / images if images else 0 for right, images in own.values()] for own in (before, after)]
    places = range(len(before))
    axes.bar([place - 0.2 for place in places], shares[0], 0.4, color=_GOES, label="dense")
    axes.bar([place + 0.2 for place in places], shares[1], 0.4, color=_STAYS, label="pruned")
    names = (report.details.classes if report.details else None) or {}
    if len(before) <= 40:
        shown = [names.get(number, str(number)) for number in before]
        turned = max(map(len, shown)) > 3
        axes.set_xticks(places, shown, rotation=90 if turned else 0, fontsize=7 if turned else 9)
    axes.set_xlabel("class")
    axes.set_ylabel(f"{report.metric.name}, %")
