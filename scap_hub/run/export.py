"""Exports what a run has saved: files for other runtimes, and int8, measured before and after."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.deploy.deployment import DOCUMENT, Deployment, with_deployment
from scap_hub.deploy.formats import format_named, write_checked
from scap_hub.deploy.manifest import OPENED, write_manifest
from scap_hub.deploy.onnx_metadata import size_multiple
from scap_hub.deploy.quantized import Subject, deploy_int8
from scap_hub.deploy.source import Source
from scap_hub.errors import CheckpointError
from scap_hub.files import path_of, replacing
from scap_hub.hub.checkpoint import RECIPE, dense_model, input_size, load
from scap_hub.hub.publish import CARD
from scap_hub.page import PAGE, REPORT, write_page
from scap_hub.recipe import Recipe
from scap_hub.run.inputs import data_for
from scap_hub.run.result import shown_name
from scap_hub.tasks import task_of
from scap_hub.text import one_line
from scap_hub.zoo import load_model


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        file: The file that was asked for.
        deployment: What was measured; None where nothing was to be.
        size_multiple: What heights and widths of images must be multiples of, 1 or 32; None where the file takes images
            of the model's own size alone.
    """

    file: Path
    deployment: Deployment | None = None
    size_multiple: int | None = None

    def __fspath__(self) -> str:
        return str(self.file)


def export(
    folder: str | Path,
    to: str = "onnx",
    output: str | Path | None = None,
    model: nn.Module | None = None,
    *,
    int8: bool = False,
    dataset: Any = None,
    max_loss: float = 0.01,
) -> Exported:
    """Writes a saved model for another runtime, for any batch size, and compares all its outputs with the model's.

    An ONNX file in float32 of a model that is no classifier takes images of any height and width, where the model and
    torch's exporter do.

    With `int8`, the file in float32 is written too, and both are measured beside the dense model: the task's metric,
    how often they give the same answer (if they give other things than logits, the relative output error), and latency
    in turns. `deploy.json`, the model card and `report.json` of the folder tell what was found.

    Args:
        folder: Saved pruned model, or its Hub id.
        to: One of `scap_hub.deploy.formats.FORMATS`: "onnx", "torch-export", ...
        output: The file; by default the format's place in the folder, such as onnx/model.onnx; below the working
            directory for a Hub id.
        model: The dense model, where it comes from no zoo.
        int8: Quantise weights and activations to eight bits; for "onnx", "openvino" and "executorch".
        dataset: Calibration and test images, as for `prune`; those of the recipe in the folder if left out.
        max_loss: What int8 may lose of the metric on the validation images, as a fraction. Other ways to int8 are tried
            where the first loses more, then layers stay in float32.

    Raises:
        ModelError: An unknown format, or a model that cannot be exported.
        CheckpointError: The folder holds no pruned model, or the file cannot be written.
        VerificationError: An output differs from the model's by more than 1e-4 max(1, its largest number); nothing is
            kept.
        CalibrationError: int8 without calibration images.
        DataError: The images cannot be had.
    """
    form = format_named(to, int8)
    given = path_of(folder)
    saved = given.is_dir()
    place = given if saved else Path()
    kept = form.int8.file if int8 and form.int8 else form.file
    target = path_of(output) if output else place / kept
    net, size = load(folder, model), input_size(folder)
    source = Source.of(net, size, folder, _zoo(net, size), resizable=True)
    deployment = None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if int8:
                subject = _subject(folder, net, model, dataset)
                deployment = deploy_int8(subject, Path(scratch), max_loss, to=to)
            else:
                write_checked(form, source, Path(scratch, kept))
            if not output and to in OPENED:
                write_manifest(source, to, Path(scratch, kept))
            _place(Path(scratch), kept, None if output else place, target)
        # Below the working directory, card and report would be another project's.
        if deployment and saved and not output:
            _tell(place, deployment)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {one_line(error)}") from error
    return Exported(target, deployment, size_multiple(target) if to == "onnx" else None)


def _zoo(net: nn.Module, size: tuple[int, int, int]) -> str:
    return load_model(net, input_size=size).zoo.name


def _place(scratch: Path, kept: str, folder: Path | None, target: Path) -> None:
    """Moves all that was written to its place in a folder, or one file, and what belongs to it, to the target."""
    if folder is None:
        file = scratch / kept
        moves = {path: target.with_suffix(path.suffix) for path in file.parent.glob(f"{file.stem}.*") if path != file}
        moves[file] = target
    else:
        moves = {path: folder / path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()}
    for source, path in moves.items():
        with replacing(path) as unfinished:
            shutil.copyfile(source, unfinished)


def _subject(folder: str | Path, net: nn.Module, model: nn.Module | None, dataset: Any) -> Subject:
    """The model with its data, as the recipe beside it says, and its dense model."""
    place = path_of(folder)
    recipe = Recipe.from_yaml(place / RECIPE) if (place / RECIPE).is_file() else Recipe()
    name, dense_top1 = recipe.data.dataset, None
    if dataset is None:
        dense_top1 = _report(place).get("before", {}).get("top1")  # measured on the recipe's data
    else:
        name = str(dataset) if isinstance(dataset, str | Path) else None
    loaded = load_model(net, input_size=input_size(folder), task=recipe.task)
    return Subject(
        net,
        data_for(loaded, dataset, recipe, task_of(loaded, recipe.task)),
        input_size(folder),
        model if model is not None else dense_model(folder),
        dense_top1,
        shown_name(name),
        folder,
        loaded.zoo.name,
    )


def _report(folder: Path) -> dict[str, Any]:
    """What a run reported; empty where nothing is there."""
    if not (folder / REPORT).is_file():
        return {}
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / REPORT} is not JSON ({one_line(error)}): remove it, or run again") from None
    return report if isinstance(report, dict) else {}


def _tell(folder: Path, deployment: Deployment) -> None:
    """Writes `deploy.json`, and what was measured into the report, its page and the card, where these are."""
    texts = {DOCUMENT: deployment.to_json()}
    if report := _report(folder):
        texts[REPORT] = json.dumps({**report, "deploy": deployment.to_dict()}, indent=1) + "\n"
    if (folder / CARD).is_file():
        texts[CARD] = with_deployment((folder / CARD).read_text(encoding="utf-8"), deployment)
    for name, text in texts.items():
        with replacing(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    if (folder / PAGE).is_file():
        write_page(folder)
