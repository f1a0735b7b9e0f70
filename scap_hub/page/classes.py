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
Names = Mapping[int, str]


def by_number(found: Mapping[str, Any] | Sequence[Any] | None) -> dict[int, Any]:
    """What report.json tells of classes, by their numbers; an earlier version wrote lists of all classes."""
    if isinstance(found, Mapping):
        return {int(number): value for number, value in found.items()}
    return dict(enumerate(found or ()))


def class_name(number: int, names: Names) -> str:
    """A class in words."""
    return str(names.get(number, f"class {number}"))


def classes_view(report: Mapping[str, Any], names: Names) -> dict[str, Any] | None:
    """Accuracy by class, those that lost most first."""
    old, new = (by_number(report[model].get("by_class")) for model in ("before", "after"))
    if not old or old.keys() != new.keys():
        return None
    rows: list[dict[str, Any]] = [
        {"name": class_name(number, names), "images": images, "before": right / images,
         "after": new[number][0] / images, "change": (new[number][0] - right) / images}
        for number, (right, images) in old.items()
        if images
    ]  # fmt: skip
    rows.sort(key=lambda row: row["change"])
    told = report.get("classes") or {}
    everything = told.get("classes", len(rows))
    lost = told.get("lost", sum(row["change"] < 0 for row in rows))
    won = told.get("won", sum(row["change"] > 0 for row in rows))
    shown = rows if len(rows) <= _CLASSES else [*rows[: _CLASSES - 6], *rows[-6:]]
    largest = max((abs(row["change"]) for row in rows), default=0) or 1
    for row in shown:
        row["bar"] = 50 * abs(row["change"]) / largest
    return {"rows": shown, "hidden": everything - len(shown), "lost": lost, "won": won, "all": everything}


def confusion_view(before: Mapping[str, Any], after: Mapping[str, Any], names: Names) -> dict[str, Any] | None:
    """Which classes dense and pruned model take for another; None where there are no classes, or no mistakes.

    Few classes have a whole matrix each, (true, answered); of many, there are the pairs that changed most.
    """
    old, new = before.get("mistakes"), after.get("mistakes")
    counts, others = by_number(before.get("by_class")), by_number(after.get("by_class"))
    if old is None or new is None or not (old or new) or not counts or not others:
        return None
    if len(counts) > _MATRIX or max(counts) >= len(counts):  # not all of them are there
        return {"matrices": [], "pairs": _pairs(old, new, names)}
    all_names = [class_name(i, names) for i in range(len(counts))]
    matrices = [
        {"title": title, "rows": _rows(own, [own_counts[i] for i in range(len(counts))], old)}
        for title, own, own_counts in (("dense", old, counts), ("pruned", new, others))
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


def _pairs(old: Mistakes, new: Mistakes, names: Names) -> list[dict[str, Any]]:
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
