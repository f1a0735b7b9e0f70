"""The page of a saved folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scap_hub.documents import parse_json, read_document
from scap_hub.errors import CheckpointError
from scap_hub.files import path_of, replacing
from scap_hub.page.html import render
from scap_hub.page.view import lacking, settings_in
from scap_hub.text import one_line

PAGE, REPORT = "report.html", "report.json"
FAMILY, FAMILY_PICTURE = "family.json", "family.svg"
_RECIPE, _COMPARISON = "recipe.yaml", "comparison.json"


def write_page(folder: str | Path) -> tuple[Path, str | None]:
    """Writes report.html into a saved folder, from the other files in it.

    Args:
        folder: What `save_pretrained` wrote; `scap-hub compare --out` may have added a comparison.json.

    Returns:
        The file, and in words what the folder lacks for a whole page; None where it lacks nothing.

    Raises:
        CheckpointError: The folder has no report.json, a file in it cannot be read, or the page cannot be written.
    """
    folder = path_of(folder)
    report = _document(folder, REPORT)
    if not isinstance(report, dict):
        raise CheckpointError(f"{str(folder)!r} has no {REPORT}: give a folder that prune saved")
    path = folder / PAGE
    text = page_of(folder, report)
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {one_line(error)}") from error
    return path, lacking(report)


def page_of(folder: Path, report: dict[str, Any]) -> str:
    """The page, from a report and what else lies in a folder.

    Raises:
        CheckpointError: A file cannot be read, or does not hold what it should.
    """
    try:
        recipe = read_document(folder, _RECIPE) if (folder / _RECIPE).is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(folder / _RECIPE)!r}: {one_line(error)}") from error
    from jinja2 import TemplateError

    try:
        return render(report, recipe, _document(folder, _COMPARISON), _document(folder, FAMILY))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise CheckpointError(
            f"a file in {str(folder)!r} is not as scap_hub writes it ({one_line(error)}): save the model again"
        ) from error


def family_json(family: Mapping[str, Any]) -> str:
    """The document that the folders of a family hold."""
    return json.dumps(family, indent=1) + "\n"


def to_publish(folder: Path) -> dict[str, bytes]:
    """Report and page without images of the data set; nothing where they show none, or the recipe lets them be shown.

    Raises:
        CheckpointError: As `page_of`.
    """
    report = _document(folder, REPORT)
    answers = (report.get("details") or {}).get("answers") if isinstance(report, dict) else None
    if not answers or not any(answer["jpeg"] for answer in answers["shown"]) or _may_be_shown(folder):
        return {}
    for answer in answers["shown"]:
        answer["jpeg"] = None
    return {REPORT: (json.dumps(report, indent=1) + "\n").encode(), PAGE: page_of(folder, report).encode()}


def _may_be_shown(folder: Path) -> bool:
    try:
        return bool(settings_in(read_document(folder, _RECIPE)).get("publish", {}).get("thumbnails"))
    except (OSError, ValueError, AttributeError):
        return False


def _document(folder: Path, name: str) -> Any:
    if not (folder / name).is_file():
        return None
    try:
        return parse_json(read_document(folder, name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(folder / name)!r}: {one_line(error)}") from error
