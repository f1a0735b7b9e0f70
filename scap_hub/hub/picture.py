"""A picture of what pruning left of every layer's channels."""

from __future__ import annotations

import importlib.util
import io

from scap_hub.plan import PruningPlan


def channels_picture(plan: PruningPlan) -> bytes | None:
    """A PNG with one bar per pruned channel group, dense and pruned; None without matplotlib or without a cut."""
    if not plan.groups or importlib.util.find_spec("matplotlib") is None:
        return None
    # The object interface: pyplot would keep the figure and may want a display.
    from matplotlib.figure import Figure

    before = [cut.size for cut in plan.groups.values()]
    after = [len(plan.kept(name)) for name in plan.groups]
    places = range(len(before))
    figure = Figure(figsize=(min(14.0, 4 + 0.25 * len(before)), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(places, before, color="#d5dae1", label="removed")
    axes.bar(places, after, color="#2b6cb0", label="kept")
    axes.set_ylabel("channels")
    if len(before) <= 40:
        axes.set_xticks(places, [_short(name) for name in plan.groups], rotation=90, fontsize=6)
    else:
        axes.set_xlabel("channel groups, from the first layer to the last")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()


def _short(name: str, most: int = 30) -> str:
    """The end of a long name, so that names leave room for the bars."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
