"""Every error that a user can cause. Each message says what was wrong, which value, and what to do next."""

from __future__ import annotations

from typing import Any, ClassVar


class ScapHubError(Exception):
    """Base of all errors raised on purpose by scap_hub.

    Attributes:
        longest: Characters of a message; of more, the middle is left out.
    """

    longest: ClassVar[int] = 1500

    def __str__(self) -> str:
        # A value that a stranger's file holds may be of any length.
        text = super().__str__()
        return text if len(text) <= self.longest else f"{text[: self.longest - 400]} ... {text[-300:]}"


class ModelError(ScapHubError):
    """A model name, config or module that cannot be loaded, or whose forward pass cannot be recorded."""


class DataError(ScapHubError):
    """A data set that cannot be read, or does not fit the model."""

    longest = 4000  # ten names of files with their folders

    def __init__(self, message: str) -> None:
        # torch's loader processes hand on an error as its traceback; the message is the last line.
        super().__init__(
            message.strip().rpartition("\n")[2].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        )


class PlanError(ScapHubError):
    """A pruning plan that is malformed, unbalanced, or does not fit the model."""


class TargetError(ScapHubError):
    """A budget that cannot be reached, or contradictory targets."""


class RecipeError(ScapHubError):
    """A recipe with an unknown key or a wrong value."""


class CalibrationError(ScapHubError):
    """Calibration images that cannot be scored: too few of them, or activations that are constant, NaN or infinite."""


class TrainingError(ScapHubError):
    """Fine-tuning that cannot go on, such as a loss that is not finite."""


class CheckpointError(ScapHubError):
    """A saved model that is incomplete or of another origin, or an output folder that is not empty."""


class PublishError(ScapHubError):
    """A model that cannot be pushed to the Hub."""


class VerificationError(ScapHubError):
    """The pruned model's output differs from the masked model's: the plan is wrong.

    Attributes:
        difference: How much, relative to the largest element of the output; None where it cannot be said, such as when
            the pruned model does not run.
        plan: The smallest `PruningPlan` that was found to fail; None where none was looked for.
    """

    difference: float | None = None
    plan: Any = None


class UnverifiableError(VerificationError):
    """The dense model cannot be compared with anything, so nothing can be said of the plan."""
