"""The blocks of a recipe: every key, its type, its default and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from scap_hub.errors import TargetError
from scap_hub.scores import DEFAULT_CRITERION
from scap_hub.selection.target import KINDS, Target


def _no_truth_value(value: Any) -> Any:
    # To Python, True is the number 1.
    if isinstance(value, bool):
        raise ValueError(f"a number is wanted, not {str(value).lower()}")
    return value


_NUMBER = BeforeValidator(_no_truth_value)
Fraction = Annotated[float, Field(gt=0, le=1), _NUMBER]
Share = Annotated[float, Field(ge=0, le=1), _NUMBER]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Positive = Annotated[float, Field(gt=0), _NUMBER]
NotNegative = Annotated[float, Field(ge=0), _NUMBER]
Count = Annotated[int, Field(ge=1), _NUMBER]
CountOrZero = Annotated[int, Field(ge=0), _NUMBER]


class Block(BaseModel):
    # Docstrings under the fields become the descriptions of the JSON schema.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def written_out(block: type[BaseModel], value: Any) -> Any:
    """A short form of a block as the mapping that it stands for; anything else as it is.

    Args:
        block: Of which block; those of the criterion and the target have short forms.
        value: A criterion's name; "macs=0.5" or a `Target`.

    Raises:
        ValueError: A target that is not understood.
    """
    if block is CriterionSettings and isinstance(value, str):
        return {"name": value}
    if block is TargetSettings and not isinstance(value, Mapping | TargetSettings):
        try:
            target = Target.of(value)
        except TargetError as error:
            raise ValueError(str(error)) from None
        return {target.kind: target.value}
    return value


def _or_text(schema: dict[str, Any]) -> None:
    """JSON schema of a block that has a shorthand."""
    schema["type"] = ["object", "string"]


class ModelSettings(Block):
    name: str | None = None
    """timm name, "hf-hub:..." or "local-dir:...", Hugging Face repository id or folder."""
    pretrained: bool = True
    """Load trained weights."""
    checkpoint: str | None = None
    """File with the weights, .safetensors or .pth (a state dict), instead of those that the name stands for."""
    num_classes: Count | None = None
    """Width of the classifier, which is new where the weights have another; the model's own, or what the data's class
    names ask for, if left out. See also `finetune.dense_epochs`."""
    input_size: tuple[Count, Count, Count] | None = None
    """(channels, height, width) in pixels; if left out, that of tensors in Python, or else the model's own."""
    part: str | None = None
    """Module path of the part to prune, such as "backbone", of a model whose forward pass depends on the values of the
    images; it is measured by its outputs. All of the model if left out."""


class DataSettings(Block):
    dataset: str | None = None
    """Hub id, image folder, parquet file or folder, save_to_disk folder, or "digits"."""
    train_split: str | None = None
    """Split to train on; "train", or the only one there is, if left out."""
    validation_split: str | None = None
    """Split that decides on the best weights; "validation", or a tenth of the training images, if left out."""
    test_split: str | None = None
    """Split that nothing is decided on; "test", if there is one, if left out."""
    image_column: str | None = None
    """Column of the images; found by its type if left out."""
    label_column: str | None = None
    """Column of the labels; found by its type if left out."""
    labels: bool = True
    """Use the labels; false for images whose classes are not the model's."""
    match_classes: bool = True
    """Find the model's number of each class by its name; false if the labels are the model's numbers already, whatever
    the classes are called."""
    max_broken: Share | None = None
    """Share of a split's images that may be unreadable and are skipped; 0.001, and at most 100 images, if left out."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read a Hub data set as it comes instead of downloading it first."""
    calibration_images: Count = 256
    """Training images used for scoring, repair and batch norm."""
    batch_size: Count = 64
    """Images a step, per process."""
    augmentation: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    """Of training images: shifts by up to an eighth, mirrored or not; "auto" mirrors colour images only."""
    workers: CountOrZero | None = None
    """Loader processes; if left out, none for small data kept in memory, else the cores there are, up to 8."""


class CriterionSettings(Block):
    """A criterion and its options; a name alone stands for that criterion with its defaults."""

    model_config = ConfigDict(json_schema_extra=_or_text)

    name: str = DEFAULT_CRITERION
    """Name of a registered criterion; with a threshold, "scap" is the default, whose importances it is made for."""
    options: dict[str, Any] = {}
    """Keyword options of that criterion."""
    diagnostics: bool = True
    """Report dead channels, energies and the stability of the ranking; takes about another scoring."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return written_out(cls, value)


class TargetSettings(Block):
    """One budget; fractions are what stays. `macs: 0.5` if none is given; "macs=0.5" is short for that."""

    model_config = ConfigDict(json_schema_extra=_or_text)

    threshold: Share | None = None
    """Keep the channels whose importance is at least this."""
    macs: Fraction | None = None
    """Multiply-accumulate operations that stay, as a fraction."""
    params: Fraction | None = None
    """Parameters that stay, as a fraction."""
    latency: Fraction | None = None
    """Time of a forward pass that stays, as a fraction, measured on the device of the run, in `runtime`."""
    runtime: Literal["torch", "onnxruntime", "openvino"] = "torch"
    """What runs the model in the end, so that a budget of latency is met there: torch, or a file on the CPU, in int8
    if `deploy.int8` is set."""
    batch_size: Count = 1
    """Images at once when the budget is latency."""
    ratio: Fraction | Annotated[dict[str, Fraction], Field(min_length=1)] | None = None
    """Channels that stay in each group, as a fraction; or {group name: fraction}."""
    scope: Literal["auto", "global", "cost-aware", "uniform"] = "auto"
    """Compare scores across groups, or scores for what a channel costs (importance per MAC, parameter or millisecond),
    or keep the same fraction in each; auto is what the criterion's scores are made for."""
    round_to: Count | Literal["auto"] = 8
    """Kept channels are a multiple of this; fast kernels want 8, many CPUs 16. auto measures which of 8, 16 and 32
    `runtime` likes; the saved recipe has the number."""
    floor: Share = 0.05
    """Channels that stay in each group whatever the scores say, as a fraction."""

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        value = written_out(cls, value)
        if isinstance(value, Mapping):
            given = [kind for kind in cls.model_fields if kind in KINDS and value.get(kind) is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} contradict each other; keep one of them")
            if not given:
                return {**value, "macs": 0.5}
        return value

    @property
    def multiple(self) -> int:
        """`round_to`, once "auto" is replaced by what was measured."""
        assert isinstance(self.round_to, int)
        return self.round_to

    @property
    def target(self) -> Target:
        """What shall stay."""
        return next(Target(kind, value) for kind in KINDS if (value := getattr(self, kind)) is not None)


class TuneSettings(Block):
    steps: CountOrZero | None = None
    """Steps on the calibration images towards the dense model's outputs, without labels; 200 where no fine-tuning
    follows and none where it does, if left out."""
    learning_rate: Positive | None = None
    """The highest one, of AdamW over one cycle; the highest of three that does no harm in short trials, if left out."""


class RepairSettings(Block):
    least_squares: bool = True
    """Re-solve the weights of each layer that lost inputs, so that its output matches the dense model's."""
    ridge: NotNegative = 0.01
    """Ridge of that least-squares problem, relative to the mean diagonal of its Gram matrix."""
    batch_norm: bool = True
    """Recompute batch-norm statistics on the calibration images."""
    tune: TuneSettings = TuneSettings()
    """Afterwards, move all weights so that the model's outputs come near the dense model's."""


class ScheduleSettings(Block):
    steps: Count = 1
    """Rounds of prune, repair and fine-tune; 1 is one shot."""


class DistillationSettings(Block):
    weight: Share = 0.5
    """Share of the loss that follows the dense model's logits; 0 leaves them out."""
    temperature: Positive = 2.0
    """Both logits are divided by this before they are compared."""
    features: NotNegative = 0.0
    """Weight, beside the rest of the loss, of the distance from the dense model's attention maps; 0 leaves them out."""

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of the dense model is learned."""
        return bool(self.weight or self.features)


class FinetuneSettings(Block):
    epochs: CountOrZero = 5
    """Passes over the training images, or equal parts of `steps`; 0 trains nothing."""
    steps: Count | None = None
    """Optimiser steps to train for, whatever the number of images, which a stream may not know; all passes, if left
    out. After each of `epochs` parts the model is measured and a checkpoint is kept."""
    dense_epochs: CountOrZero | Literal["auto"] = "auto"
    """Passes that tune the dense model before it is pruned. auto: 5 for a new classifier, else 0. A classifier is
    replaced by a new one where the data names another number of classes, unless this is 0."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: Positive = 1e-3
    """Highest learning rate of the schedule."""
    weight_decay: NotNegative = 0.02
    """Not applied to biases and norms."""
    schedule: Literal["cosine", "onecycle"] = "cosine"
    """How the learning rate goes."""
    warmup: ShareBelowOne = 0.1
    """Share of the steps over which the learning rate rises."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the probability spread over all classes."""
    mixup: NotNegative = 0.0
    """Alpha of the Beta distribution that mixes pairs of images; 0 turns it off."""
    distillation: DistillationSettings = DistillationSettings()
    """Learning from the dense model."""
    ema: ShareBelowOne = 0.0
    """Decay of an exponential moving average of the weights, which is then what is kept; 0 turns it off."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast to bf16, or to fp16 with a scaled loss, or none."""
    channels_last: bool = False
    """Train in the NHWC memory layout."""
    gradient_accumulation: Count = 1
    """Batches per optimiser step."""
    patience: Count | None = None
    """Stop after this many epochs without a better validation result; never, if left out."""
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where each epoch's figures are logged as well, under the project "scap_hub"; nowhere, if left out."""

    def lasting(self, epochs: int) -> FinetuneSettings:
        """The same for another number of epochs, each as long as before."""
        steps = self.steps and max(1, round(self.steps * epochs / max(1, self.epochs)))
        return self.model_copy(update={"epochs": epochs, "steps": steps})


class EvaluateSettings(Block):
    latency: bool = True
    """Measure the latency of the dense and the pruned model."""
    batch_size: Count = 1
    """Images at once when latency is measured."""
    verify: bool = True
    """Refuse a model that cannot be compared with its masked one, such as one that is random in eval mode; false only
    warns. A plan that is found to be wrong is never used."""


class DeploySettings(Block):
    int8: bool = False
    """Write ONNX files in float32 and in int8 beside the weights, and measure both."""
    max_loss: Share = 0.01
    """What int8 may lose of the metric on the validation images, or of the same answers where there are no labels, as
    a fraction; where the first way to int8 loses more, others are tried, and then layers stay in float32."""


class PublishSettings(Block):
    repo_id: str | None = None
    """Hub repository to push to; nothing is pushed if left out."""
    private: bool = False
    """Whether a new repository is private."""
    thumbnails: bool = False
    """Whether the published report shows calibration images that changed their answer; the one on disk does."""
    layout: Literal["pruned", "uniform"] = "pruned"
    """"uniform" writes a plain config, where the zoo's own constructor arguments can express the widths."""
