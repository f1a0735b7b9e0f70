"""What the page says, in the order in which it says it: from documents to plain values and small pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from scap_hub.page import charts
from scap_hub.page.classes import by_number, class_name, classes_view, confusion_view
from scap_hub.page.device import device_view
from scap_hub.page.family import family_view
from scap_hub.text import count, counted


def view(
    report: Mapping[str, Any],
    recipe: str | None,
    comparison: Mapping[str, Any] | None,
    family: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that the template reads."""
    about, details = report.get("about") or {}, report.get("details") or {}
    before, after = report["before"], report["after"]
    metric = report.get("metric") or {"name": "top-1", "key": "top1"}
    names = by_number(details.get("classes"))
    return {
        "versions": about.get("versions") or {},
        "name": about.get("model") or "model",
        "lacks": lacking(report),
        "metric": metric,
        "tiles": _tiles(before, after, metric["name"]),
        "facts": _facts(report),
        "repeat": _command(recipe, None),
        "taught": bool(about.get("teacher")),
        "layers": _layers(report, details),
        "skyline": _skyline(details),
        "timed": any(layer["ms_before"] is not None for layer in details.get("layers", ())),
        "pinned": _pinned(report.get("pinned") or {}),
        "slider": _slider(report, details, recipe),
        "steps": details.get("steps", 1),
        "curves": _curves(report, metric),
        "classes": classes_view(report, names),
        "confusion": confusion_view(before, after, names),
        "answers": _answers(details),
        "portraits": [_portrait(portrait) for portrait in details.get("portraits", ())],
        "device": device_view(report.get("deploy")),
        "comparison": _comparison(comparison) if comparison else None,
        "family": family_view(family, metric["name"], about.get("target")) if family else None,
        "recipe": recipe,
        "seconds": {name: f"{value:,.1f} s" for name, value in (report.get("stages") or {}).items()},
    }


def lacking(report: Mapping[str, Any]) -> str | None:
    """What a folder of an earlier version has not kept, in one line."""
    if report.get("details"):
        return None
    return "it has no layers, other targets, spectra and changed answers: prune again with its recipe.yaml to see them"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def _tiles(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> list[dict[str, str]]:
    tiles = [
        {"name": "MACs", "value": _change(before["macs"], after["macs"]),
         "more": f"{count(before['macs'])} to {count(after['macs'])}"},
        {"name": "parameters", "value": _change(before["params"], after["params"]),
         "more": f"{count(before['params'])} to {count(after['params'])}"},
        {"name": "size", "value": _change(before["bytes"], after["bytes"]),
         "more": f"{before['bytes'] / 1e6:,.2f} MB to {after['bytes'] / 1e6:,.2f} MB"},
    ]  # fmt: skip
    metrics = {metric: (before.get("top1"), after.get("top1"))}
    metrics |= {name: (value, _others(after).get(name)) for name, value in _others(before).items()}
    for name, (old, new) in metrics.items():
        if old is not None and new is not None:
            more = f"{100 * old:.2f} % to {100 * new:.2f} %"
            tiles.append({"name": name, "value": f"{100 * (new - old):+.2f} points", "more": more})
    if before.get("latency_ms") and after.get("latency_ms"):
        ratio = before["latency_ms"] / after["latency_ms"]
        value = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        more = f"{before['latency_ms']:.2f} ms to {after['latency_ms']:.2f} ms"
        tiles.append({"name": "latency", "value": value, "more": more})
    return tiles


def _others(measures: Mapping[str, Any]) -> Mapping[str, float]:
    """What the task measures beside its metric, by name."""
    return measures.get("others") or {}


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    about, facts = report.get("about") or {}, []
    for key, name in (
        ("part", "part, whose figures these are"),
        ("data", "data"),
        ("target", "target, what stays"),
        ("criterion", "criterion"),
        ("teacher", "teacher"),
        ("device", "device"),
    ):
        if about.get(key):
            facts.append((name, str(about[key])))
    if tuned := report.get("tuned"):
        vain = "; none made it better, and its weights are those from before" if tuned.get("kept") == 0 else ""
        facts.append(("dense model", f"tuned for {counted(tuned['epochs'], 'epoch')} before it was pruned{vain}"))
    if report.get("unverified"):
        facts.append(("not verified", str(report["unverified"])))
    elif report.get("verified") is not None:
        text = "before repair, it computed what the dense model computes with the pruned channels masked"
        facts.append(("verified", f"{text} (relative difference {report['verified']:.1e})"))
    if selections := report.get("selections"):
        last = selections[-1]
        facts.append(
            ("predicted loss", f"{share(1 - last['importance'])} of all importance was in the channels that went")
        )
        if not last.get("met", True):
            facts.append(
                ("budget missed", f"{last['latency']:.3f} of the time is left, {last['budget']:g} was asked for")
            )
    facts += [
        ("unreadable", f"{number} images of {where} were left out")
        for where, number in (report.get("skipped") or {}).items()
    ]
    return facts


def share(value: float) -> str:
    """A share with the digits that matter, however small it is."""
    percent = 100 * value
    return f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def settings_in(recipe: str | None) -> Mapping[str, Any]:
    """What recipe.yaml says; nothing where it cannot be read."""
    try:
        found = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _command(recipe: str | None, target: str | None) -> str:
    """What to type to run the recipe again; {TARGET} and {OUT} are filled in by the page where a target is chosen."""
    settings = settings_in(recipe)
    named = (settings.get("model") or {}).get("name"), (settings.get("data") or {}).get("dataset")
    out = "again" if target is None else "{OUT}"
    if all(named):
        change = "" if target is None else " --target {TARGET}"
        return f"scap-hub prune --recipe recipe.yaml{change} --out {shlex.quote(out) if target is None else out}"
    given = [] if named[0] else ["model"]
    given += [] if named[1] else ["dataset=dataset"]
    given += ['recipe="recipe.yaml"', *([] if target is None else ['target="{TARGET}"']), f'output_dir="{out}"']
    return f"scap_hub.prune({', '.join(given)})"


def _layers(report: Mapping[str, Any], details: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers, groups, pinned = details.get("layers", ()), report.get("groups") or {}, report.get("pinned") or {}
    total = sum(layer["macs_before"] for layer in layers) or 1
    dearest = max((layer["macs_before"] for layer in layers), default=1) or 1
    total_ms = sum(layer["ms_before"] or 0 for layer in layers) or 1
    widest = max((layer["before"] for layer in layers), default=1) or 1
    drawn: dict[str, str] = {}
    rows = []
    for layer in layers:
        owner = next((name for name in layer["groups"] if name in groups), None)
        row = {
            **layer,
            "name": layer["path"] or layer["kind"],
            "kind": layer["kind"] if layer["path"] else "",
            "macs": share(layer["macs_before"] / total),
            "macs_bar": (100 * layer["macs_before"] / dearest, 100 * layer["macs_after"] / dearest),
            "width_bar": (100 * layer["before"] / widest, 100 * layer["after"] / widest),
            "ms": None if layer["ms_before"] is None else share(layer["ms_before"] / total_ms),
            "spark": None,
            "as": None,
            "why": sorted({pinned[name] for name in layer["groups"] if name in pinned}),
        }
        if owner is not None and owner in drawn:
            row["as"] = drawn[owner]
        elif owner is not None:
            group = groups[owner]
            row["spark"] = charts.importances(group["scores"], group["kept"])
            drawn[owner] = row["name"]
        rows.append(row)
    return rows


def _skyline(details: Mapping[str, Any]) -> Markup | None:
    layers = [layer for layer in details.get("layers", ()) if layer["before"]]
    if not layers:
        return None
    label = (
        f"widths of {len(layers)} layers from the first to the last, dense and pruned; the table below has the numbers"
    )
    return charts.skyline([layer["before"] for layer in layers], [layer["after"] for layer in layers], label)


def _pinned(pinned: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in pinned.items():
        reasons.setdefault(reason, []).append(name)
    return list(reasons.items())


def _slider(report: Mapping[str, Any], details: Mapping[str, Any], recipe: str | None) -> dict[str, Any] | None:
    choices: list[Any] = details.get("choices") or []
    if len(choices) < 2:
        return None
    own = (report.get("about") or {}).get("target")
    targets = [choice["target"] for choice in choices]
    names, sizes = list(details["groups"]), list(details["groups"].values())
    first = targets.index(own) if own in targets else min(len(targets) - 1, len(targets) // 2)
    xs, ys = [choice["macs"] / choices[0]["macs"] for choice in choices], [choice["loss"] for choice in choices]
    frame = charts.Frame(xs, ys, percent=True, x_percent=True)
    x, y = frame.at(xs[first], ys[first])
    marker = f'<circle id="marker" class="marker" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
    curve = frame.svg(
        frame.line(xs, ys, "stays") + marker, "MACs that stay", "predicted loss over the MACs that stay; less is better"
    )
    return {
        "choices": choices,
        "own": own,
        "first": first,
        "names": names,
        "sizes": sizes,
        "skyline": charts.skyline(sizes, choices[first]["widths"], "widths of the channel groups at the chosen target"),
        "curve": curve,
        "data": {
            "choices": choices,
            "sizes": sizes,
            "own": own,
            "points": [[round(value, 1) for value in frame.at(*point)] for point in zip(xs, ys, strict=True)],
            "command": _command(recipe, "{TARGET}"),
            "name": (report.get("about") or {}).get("model") or "model",
        },
    }


def _curves(report: Mapping[str, Any], metric: Mapping[str, str]) -> list[dict[str, Any]]:
    """Charts of the training of the pruned model, and of the dense one before it."""
    histories = [("fine-tuning of the pruned model", report.get("history") or [])]
    if tuned := report.get("tuned"):
        histories.insert(0, ("tuning of the dense model", tuned["history"]))
    found = []
    for title, rows in histories:
        if len(rows) < 2:
            continue
        parts = []
        quality = [(number, row[metric["key"]]) for number, row in enumerate(rows) if metric["key"] in row]
        if len(quality) > 1:
            label = f"{metric['name']} after each epoch, from {share(quality[0][1])} to {share(quality[-1][1])}"
            parts.append((metric["name"], charts.curves([("stays", quality)], label, True)))
        lines = []
        for key, kind in (("loss", "stays"), ("validation_loss", "other")):
            points = [(number, row[key]) for number, row in enumerate(rows) if key in row]
            if points:
                lines.append((kind, points))
        if lines:
            parts.append(
                ("loss: training (solid), validation (dashed)", charts.curves(lines, "losses by epoch", False))
            )
        found.append({"title": title, "charts": parts})
    return found


def _answers(details: Mapping[str, Any]) -> dict[str, Any] | None:
    answers = details.get("answers")
    if not answers:
        return None
    names = by_number(details.get("classes"))
    shown = [
        {**answer, "was": class_name(answer["before"], names), "now": class_name(answer["after"], names)}
        for answer in answers["shown"]
    ]
    return {**answers, "shown": shown}


def _portrait(portrait: Mapping[str, Any]) -> dict[str, Any]:
    pictures = []
    for key, title in (("goes", "a channel that goes"), ("stays", "a channel that stays")):
        channel = portrait[key]
        pictures.append({
            "title": title,
            "row": channel["row"],
            "fidelity": channel["fidelity"],
            "spectrum": charts.heat(channel["spectrum"], f"spectrum of {title}"),
            "restored": charts.heat(channel["restored"], f"what the autoencoder restores of {title}"),
        })  # fmt: skip
    return {
        "layer": portrait["layer"],
        "images": portrait["images"],
        "input": charts.heat(portrait["input"], f"spectrum of the input of {portrait['layer']}"),
        "channels": pictures,
        "strip": _strip(portrait["fidelity_gone"], portrait["fidelity_kept"]),
    }


def _strip(gone: Sequence[float], kept: Sequence[float]) -> Markup:
    """Fidelities as ticks on two lines, 0 to 1."""
    low = min(0.0, *gone, *kept)
    parts = []
    for values, kind, y in ((gone, "goes", 8), (kept, "stays", 34)):
        ticks = "".join(f"M{4 + 312 * (value - low) / (1 - low):.1f} {y}v18" for value in values)
        parts.append(f'<path class="tick {kind}" d="{ticks}"/>')
    ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in (gone, kept)]
    label = f"fidelities of channels that go, {ranges[0]}, and that stay, {ranges[1]}"
    axis = f'<text x="4" y="66">{low:.2g}</text><text x="316" y="66" text-anchor="end">1</text>'
    return Markup(
        f'<svg class="strip" viewBox="0 0 320 70" role="img" aria-label="{label}">{"".join(parts)}{axis}</svg>'
    )


def _comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The table of `scap-hub compare`."""
    split = "test" if "test" in comparison["summary"] else "validation"
    targets = list(dict.fromkeys(cell["target"] for cell in comparison["cells"]))
    rows = [["dense", *[f"{100 * comparison['dense'][split]:.2f}"] * len(targets), ""]]
    for row in comparison["summary"][split]:
        cells = [
            f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f}" if (found := row["targets"].get(target)) else "-"
            for target in targets
        ]
        rows.append([row["criterion"], *cells, "" if row["rank"] is None else f"{row['rank']:.2f}"])
    metric = comparison.get("metric") or {}
    what = f"criterion ({metric['name']}, less is better)" if metric.get("lower_is_better") else "criterion"
    return {"head": [what, *targets, "mean rank"], "rows": rows, "split": split}
