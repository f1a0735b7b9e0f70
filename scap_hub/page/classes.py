"""What became of single classes: which lost accuracy, and which are taken for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CLASSES = 24
"""Classes that are all shown; of more, those that changed most."""
_MATRIX = 16
"""Classes of which the whole confusion matrix is shown; of more, the pairs that changed most."""
_PAIRS = 16

Mistakes = Mapping[str, Mapping[str, int]]
"""Of report.json: how many images of a class got another one for an answer."""


def class_name(number: int, classes: Sequence[str] | None) -> str:
    """A class in words."""
    return str(classes[number]) if classes and number < len(classes) else f"class {number}"


def classes_view(
    before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str] | None
) -> dict[str, Any] | None:
    """Accuracy by class, those that lost most first."""
    old, new = before.get("by_class"), after.get("by_class")
    if not old or not new or len(old) != len(new):
        return None
    rows = [
        {"name": class_name(i, names), "images": images, "before": right / images, "after": now / images,
         "change": (now - right) / images}
        for i, ((right, images), (now, _)) in enumerate(zip(old, new, strict=True))
        if images
    ]  # fmt: skip
    rows.sort(key=lambda row: row["change"])
    hidden = max(0, len(rows) - _CLASSES)
    worst = sum(row["change"] < 0 for row in rows)
    shown = rows if not hidden else [*rows[: _CLASSES - 6], *rows[-6:]]
    largest = max((abs(row["change"]) for row in rows), default=0) or 1
    for row in shown:
        row["bar"] = 50 * abs(row["change"]) / largest
    return {"rows": shown, "hidden": hidden, "lost": worst, "won": sum(row["change"] > 0 for row in rows),
            "all": len(rows)}  # fmt: skip


def confusion_view(
    before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str] | None
) -> dict[str, Any] | None:
    """Which classes dense and pruned model take for another; None where there are no classes, or no mistakes.

    Few classes have a whole matrix each, (true, answered); of many, there are the pairs that changed most.
    """
    old, new, counts = before.get("mistakes"), after.get("mistakes"), after.get("by_class")
    if old is None or new is None or not (old or new) or not counts or not before.get("by_class"):
        return None
    if len(counts) > _MATRIX:
        return {"matrices": [], "pairs": _pairs(old, new, names)}
    all_names = [class_name(i, names) for i in range(len(counts))]
    matrices = [
        {"title": title, "rows": _rows(own, measures["by_class"], old)}
        for title, own, measures in (("dense", old, before), ("pruned", new, after))
    ]
    return {"matrices": matrices, "pairs": [], "names": all_names}


def _rows(own: Mistakes, counts: Sequence[Sequence[int]], dense: Mistakes) -> list[list[dict[str, Any]]]:
    """Cells of a matrix: images, and how dark and which colour the cell is."""
    rows = []
    for truth, (right, images) in enumerate(counts):
        row = []
        for answer in range(len(counts)):
            count = right if truth == answer else _count(own, truth, answer)
            share = count / images if images else 0.0
            kind = "stays" if truth == answer else "lost"
            shade = round(12 + 40 * share if kind == "stays" else 20 + 60 * share) if count else 0
            more = kind == "lost" and count > _count(dense, truth, answer)
            row.append({"count": count, "kind": kind, "shade": shade, "more": more})
        rows.append(row)
    return rows


def _pairs(old: Mistakes, new: Mistakes, names: Sequence[str] | None) -> list[dict[str, Any]]:
    known = {(int(truth), int(answer)) for found in (old, new) for truth, own in found.items() for answer in own}
    rows: list[dict[str, Any]] = [
        {
            "truth": class_name(truth, names), "answer": class_name(answer, names),
            "before": _count(old, truth, answer), "after": _count(new, truth, answer),
        }
        for truth, answer in sorted(known)
    ]  # fmt: skip
    changed = [row for row in rows if row["before"] != row["after"]]
    return sorted(changed, key=lambda row: (-abs(row["after"] - row["before"]), row["before"] - row["after"]))[:_PAIRS]


def _count(mistakes: Mistakes, truth: int, answer: int) -> int:
    return mistakes.get(str(truth), {}).get(str(answer), 0)
