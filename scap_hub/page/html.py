"""The page itself: a template, a style sheet and a little JavaScript become one file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def render(
    report: Mapping[str, Any],
    recipe: str | None = None,
    comparison: Mapping[str, Any] | None = None,
    family: Mapping[str, Any] | None = None,
) -> str:
    """The page of one run, as HTML that asks for nothing outside itself.

    Args:
        report: What report.json holds.
        recipe: What recipe.yaml holds.
        comparison: What `scap-hub compare --out` wrote.
        family: What `scap-hub family` wrote about the sizes of one model.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from scap_hub.page.view import count, share, view

    own = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": count, "share": share}
    template = environment.from_string(own.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        **view(report, recipe, comparison, family),
        style=Markup(own.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(own.joinpath("report.js").read_text(encoding="utf-8")),
    )


def family_picture(family: Mapping[str, Any], metric: str) -> str | None:
    """The picture of a family as an SVG file of its own; None where the metric was not measured."""
    from scap_hub.page.view import family_chart

    chart = family_chart([family["dense"], *family["members"]], metric)
    if chart is None:
        return None
    opening, _, rest = str(chart).partition(">")
    return f"{opening.replace('<svg', _OPENING, 1)}><style>{_ALONE}</style>{rest}"


_OPENING = '<svg xmlns="http://www.w3.org/2000/svg"'
_ALONE = (
    "text{font:15px sans-serif;fill:#5b6673}.name{font-size:13px;font-weight:600;fill:#1b2430}.grid{stroke:#dfe3e8}"
    "circle{fill:#2563b8}polyline{fill:none;stroke:#2563b8;stroke-width:2.5}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa6b4}.name{fill:#e6eaef}.grid{stroke:#2d3540}}"
)
"""Style of a picture that is no part of the page."""
