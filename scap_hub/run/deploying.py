"""The recipe's `deploy` block: files for other runtimes, made and measured before a run is saved."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from scap_hub.deploy.formats import FORMATS, ONNX_INT8, format_named
from scap_hub.deploy.manifest import write_manifest
from scap_hub.deploy.quantized import Subject, deploy_int8
from scap_hub.deploy.source import Source
from scap_hub.errors import CalibrationError, ModelError, ScapHubError
from scap_hub.progress import announce
from scap_hub.recipe import DeploySettings, Recipe
from scap_hub.run.result import Result, shown_name
from scap_hub.run.stages import Stages
from scap_hub.text import one_line
from scap_hub.training.data import Data
from scap_hub.training.distributed import from_main
from scap_hub.zoo import LoadedModel


def check_deploy(settings: DeploySettings) -> None:
    """Makes sure that what the block asks for is installed; ask before long work.

    Raises:
        ScapHubError: Something is not; names the extra.
    """
    if settings.int8:
        format_named("onnx", int8=True)


def check_export(loaded: LoadedModel, data: Data, recipe: Recipe) -> None:
    """Makes sure that what the recipe deploys can be exported, by trying it on the dense model; ask before long work.

    A pruned model has the operators of the dense one.

    Raises:
        CalibrationError: int8 without calibration images.
        ModelError: The model cannot be exported; names the operator and the module, if it is one that ONNX lacks.
    """
    exported = recipe.target.target.kind == "latency" and recipe.target.runtime != "torch"
    if recipe.deploy.int8 and not any(len(batch[0]) for batch in data.calibration):
        raise CalibrationError("deploy.int8 needs calibration images, and the data set has none: give one with images")
    if recipe.deploy.int8 or exported:
        with announce("trying the export on the dense model"):
            from_main(lambda: _try_export(loaded))


def _try_export(loaded: LoadedModel) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source = Source.of(loaded.module, loaded.preprocessing.input_size)
            FORMATS["onnx"].write(source, Path(scratch, "dense.onnx"))
        except ModelError as error:
            raise ModelError(
                f"the dense model cannot be exported, nor could the pruned one: {error}; without deploy.int8 and "
                "target.runtime it can be pruned"
            ) from error


def deployed(data: Data, stages: Stages, result: Result) -> Result:
    """The result with the files that its recipe asks for, measured beside the dense model.

    Where they cannot be made, a warning says why and the result is as it was: hours of training stand behind it.
    """
    settings = result.recipe.deploy
    if not settings.int8:
        return result
    scratch = tempfile.TemporaryDirectory(prefix="scap_hub-")
    subject = Subject(
        result.model,
        data,
        result.loaded.preprocessing.input_size,
        result.loaded.module,
        result.report.before.top1,
        shown_name(result.recipe.data.dataset),
    )
    try:
        with stages("int8"):
            source = subject.source
            result.report.deploy = deploy_int8(
                subject, Path(scratch.name), settings.max_loss, result.recipe.evaluate.batch_size
            )
            write_manifest(source, "onnx", Path(scratch.name, ONNX_INT8.file))
    except (ScapHubError, OSError) as error:
        warnings.warn(
            f"the model is pruned, but not in int8: {one_line(error)}; `scap-hub export FOLDER --int8` tries again",
            stacklevel=2,
        )
    else:
        result.exported = scratch
    return result
