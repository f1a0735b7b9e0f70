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

    from scap_hub.page.view import share, view
    from scap_hub.text import count

    own = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": count, "share": share}
    template = environment.from_string(own.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        **view(report, recipe, comparison, family),
        style=Markup(own.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(own.joinpath("report.js").read_text(encoding="utf-8")),
    )
