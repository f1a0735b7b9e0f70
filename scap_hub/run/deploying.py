"""The recipe's `deploy` block: files for other runtimes, made and measured before a run is saved."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from scap_hub.deploy.capture import check_judged
from scap_hub.deploy.formats import format_named
from scap_hub.deploy.onnx_int8 import Subject, deploy_int8
from scap_hub.deploy.source import Source
from scap_hub.errors import ScapHubError
from scap_hub.recipe import DeploySettings
from scap_hub.run.result import Result, shown_name
from scap_hub.run.stages import Stages
from scap_hub.text import one_line
from scap_hub.training.data import Data


def check_deploy(settings: DeploySettings) -> None:
    """Makes sure that what the block asks for is installed; ask before long work.

    Raises:
        ScapHubError: Something is not; names the extra.
    """
    if settings.int8:
        format_named("onnx")


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
            check_judged(Source.of(subject.model, subject.input_size).net)
            result.report.deploy = deploy_int8(
                subject, Path(scratch.name), settings.max_loss, result.recipe.evaluate.batch_size
            )
    except (ScapHubError, OSError) as error:
        warnings.warn(
            f"the model is pruned, but not in int8: {one_line(error)}; `scap-hub export FOLDER --int8` tries again",
            stacklevel=2,
        )
    else:
        result.exported = scratch
    return result
