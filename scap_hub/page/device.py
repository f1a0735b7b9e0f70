"""What was measured of files for other runtimes, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def title(deploy: Mapping[str, Any]) -> str:
    """Where the figures of deploy.json come from."""
    on = f", on {deploy['dataset']}" if deploy.get("dataset") else ""
    return f"{deploy['runtime']}, {deploy['device']}, batch {deploy['batch_size']}{on}"


def by_answers(deploy: Mapping[str, Any]) -> bool:
    """Whether files are compared by their answers; models that do not answer by logits alone are by their outputs."""
    return any(own["agreement"] is not None for own in deploy["variants"])


def head(deploy: Mapping[str, Any]) -> list[str]:
    """Names of the columns of `rows`."""
    compared = "same answers" if by_answers(deploy) else "output error"
    return ["", "size", deploy["metric"], compared, "latency", "faster"]


def rows(deploy: Mapping[str, Any]) -> list[list[str]]:
    """A row for each file, the dense model first."""
    variants = deploy["variants"]
    return [
        [
            own["name"],
            f"{own['bytes'] / 1e6:,.2f} MB",
            _percent(own["top1"]),
            _percent(own.get("output_error") if own["agreement"] is None else own["agreement"]),
            f"{own['latency_ms']:.2f} ms",
            f"{variants[0]['latency_ms'] / own['latency_ms']:.2f}x",
        ]
        for own in variants
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def notes(deploy: Mapping[str, Any]) -> list[str]:
    """What was done beyond the default, in sentences."""
    int8 = deploy.get("int8")
    if int8 is None:
        return []
    found = [f"int8: {int8['scheme']}, from {int8['images']} calibration images"]
    if len(int8["attempts"]) > 1:
        found.append(f"tried on {int8['decided_on']}: {'; '.join(int8['attempts'])}")
    if int8["kept"]:
        found.append(f"in float32 stay: {', '.join(int8['kept'])}")
    before, after = (own["latency_ms"] for own in deploy["variants"][-2:])
    if after > before:
        found.append(f"int8 is slower than float32 here, {after / before:.2f} times the latency")
    return [*found, missed] if (missed := missed_loss(int8)) else found


def missed_loss(int8: Mapping[str, Any]) -> str | None:
    """How the allowed loss is missed; None where it is not."""
    if int8["loss"] <= int8["allowed"]:
        return None
    return f"int8 loses {100 * int8['loss']:.2f} points on {int8['decided_on']}, {100 * int8['allowed']:g} are allowed"


def device_view(deploy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The section of the page; None where no file was measured."""
    if not deploy:
        return None
    return {"title": title(deploy), "head": head(deploy), "rows": rows(deploy), "notes": notes(deploy)}
