"""What a run measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from scap_hub.criteria.diagnostics import Diagnosis
from scap_hub.deploy.deployment import Deployment
from scap_hub.run.by_class import ByClass, Changed, Counts, Mistakes
from scap_hub.run.details import Details
from scap_hub.tables import html_table, in_lines, text_table
from scap_hub.tasks import IMAGE_CLASSIFICATION, Metric
from scap_hub.text import counted
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator
from scap_hub.training.evaluate import count, evaluate
from scap_hub.training.history import kept_epoch, last_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HEAD = ("", "dense", "pruned", "change")
"""Names of the columns of `Report.rows`."""


@dataclass(frozen=True)
class Measures:
    """One model's cost and quality.

    Attributes:
        macs: Multiply-accumulates for one image.
        params: Parameters.
        bytes: Bytes of parameters and buffers, as in model.safetensors.
        top1: The task's metric (accuracy, 0 to 1), on the test split, or the validation split where there is none; None
            without labels.
        latency_ms: Median milliseconds of one forward pass at `evaluate.batch_size`; None if not asked for.
        others: What else the task measures (0 to 1), by its name in a table.
        images: On how many images `top1` was measured; None where there are no classes.
        by_class: On these, right answers and images by class; in a report of at most 1000 classes, the same ones of
            both models: of more, those whose accuracy changed most.
        mistakes: On the same images, how many of a class got another one for an answer, by class and answer; in a
            report for at most 500 pairs, the same of both models: those whose number changed most.
    """

    macs: int
    params: int
    bytes: int
    top1: float | None
    latency_ms: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    images: int | None = None
    by_class: Counts | None = None
    mistakes: Mistakes | None = None


@dataclass(frozen=True)
class GroupReport:
    """What became of one channel group of the dense model, after all steps of the schedule.

    Attributes:
        size: Channels of the dense model.
        kept: Those that stay in the end.
        scores: Importances in the dense model, on which the first step decided.
        diagnosis: Of these scores.
    """

    size: int
    kept: list[int]
    scores: list[float]
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True)
class Selection:
    """What one pruning step's target came to.

    Attributes:
        importance: Share of all importance in the channels that stay, 0 to 1.
        rounding_price: How much larger it were if channel counts were not multiples of `target.round_to`.
        latency: Measured share of the dense model's time; None where the target is another.
        budget: The share that `latency` was to be.
        met: Whether a latency budget is met within 1 %; the other kinds of target always are, or `select` raises.
    """

    importance: float
    rounding_price: float
    latency: float | None = None
    met: bool = True
    budget: float | None = None


@dataclass(frozen=True)
class Tuned:
    """The training of the dense model before it was pruned.

    Attributes:
        epochs: Passes over the training images.
        new_classes: Classes of its new classifier; None where it kept its own.
        history: As `Report.history`.
        kept: The epoch whose weights it kept; 0 where none made it better on the validation images.
    """

    epochs: int
    new_classes: int | None
    history: list[dict[str, float]]
    kept: int

    def __str__(self) -> str:
        head = "" if self.new_classes is None else f", with a new head for {self.new_classes} classes"
        vain = "" if self.kept else "; none made it better on the validation images: its weights are those from before"
        return f"for {counted(self.epochs, 'epoch')}{head}{vain}"


@dataclass(frozen=True)
class Whole:
    """The model of which one part was pruned, dense and pruned.

    Attributes:
        part: Path of the part; all other figures of the report are its own.
        params: Parameters.
        latency_ms: Median milliseconds of one image; None if not asked for.
        figures: Metrics by name, as fractions of 1, of the pruned one after it was fine-tuned; none without targets.
    """

    part: str
    params: tuple[int, int]
    latency_ms: tuple[float, float] | None = None
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Rows of the report's table."""
        rows = [("parameters, whole", *(f"{count:,}" for count in self.params), _change(*self.params))]
        rows += [_figure(f"{name}, whole", *both) for name, both in self.figures.items()]
        if self.latency_ms is not None:
            rows.append(("latency, whole", *(f"{ms:.2f} ms" for ms in self.latency_ms), _faster(*self.latency_ms)))
        return rows  # type: ignore[return-value]


@dataclass(repr=False)
class Report:
    """Dense and pruned model side by side.

    Attributes:
        before: The dense model.
        after: The pruned model.
        groups: By name; scores are those of the dense model, from the first pruning step.
        stages: Seconds by stage, in the order they ran.
        history: One row an epoch of fine-tuning.
        pinned: Groups that could not be pruned, with the reason.
        verified: Largest difference between the outputs of the pruned model, before repair, and of the dense model with
            the pruned channels masked, relative to the largest element; None where the two could not be compared.
        unverified: Why they could not.
        precision: What they were compared in; not float64 where that did not fit into memory, or the model does not
            run in it.
        selections: What the target came to, a step each.
        metric: What `Measures.top1` is.
        skipped: How many images could not be read and were left out, by split.
        tuned: How the dense model was trained before it was pruned; None where it was not.
        deploy: What was measured of the files for other runtimes; None where there are none.
        about: Of the run: model, library, data, target, criterion, and the versions of what it ran with.
        details: What the page shows beside; None where it was not asked for.
        whole: The model that the run pruned a part of; None where it pruned all of one.
        classes: What became of all classes; None where there are none.
    """

    before: Measures
    after: Measures
    groups: dict[str, GroupReport] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    pinned: dict[str, str] = field(default_factory=dict)
    verified: float | None = None
    unverified: str | None = None
    precision: str | None = None
    selections: list[Selection] = field(default_factory=list)
    metric: Metric = IMAGE_CLASSIFICATION.metric
    skipped: dict[str, int] = field(default_factory=dict)
    tuned: Tuned | None = None
    deploy: Deployment | None = None
    about: dict[str, Any] = field(default_factory=dict)
    details: Details | None = None
    whole: Whole | None = None
    classes: Changed | None = None

    def __repr__(self) -> str:
        lines = [text_table([HEAD, *self.rows()])]
        if self.deploy is not None:
            lines += [f"{self.deploy.title}:", text_table([self.deploy.head, *self.deploy.rows()])]
        return "\n".join([*lines, *in_lines(self.notes())])

    def _repr_html_(self) -> str:
        table = html_table(str(self.about.get("model", "report")), HEAD, self.rows(), self.notes())
        if self.deploy is None:
            return table
        return table + html_table(self.deploy.title, self.deploy.head, self.deploy.rows(), self.deploy.notes())

    def plot(self, kind: str = "channels") -> Figure:
        """A picture with matplotlib (extra `plot`), which notebooks show.

        Args:
            kind: "channels" (what is left of each group), "training" (metric and losses by epoch), "targets" (the
                predicted loss at other targets) or "classes" (accuracy by class).

        Raises:
            ScapHubError: matplotlib is not installed, the kind is unknown, or the run has nothing to show of it.
        """
        from scap_hub.run.plots import plot

        return plot(self, kind)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-able values."""
        return asdict(self)

    def named_classes(self) -> set[int]:
        """Numbers of the classes that something is told of."""
        found: set[int] = set()
        for measures in (self.before, self.after):
            mistakes = measures.mistakes or {}
            found |= {*(measures.by_class or {}), *mistakes, *(answer for own in mistakes.values() for answer in own)}
        return found

    @property
    def missed(self) -> str | None:
        """How a latency budget is missed by more than 1 %; None where it is met, or there is none."""
        last = self.selections[-1] if self.selections else None
        if last is None or last.met or last.latency is None or last.budget is None:
            return None
        return f"{last.latency:.3f} of the dense model's time is left, and {last.budget:g} was asked for"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table a person reads: quantity, dense, pruned, change."""
        before, after = self.before, self.after
        rows = [
            ("MACs", f"{before.macs / 1e6:,.2f} M", f"{after.macs / 1e6:,.2f} M", _change(before.macs, after.macs)),
            ("parameters", f"{before.params:,}", f"{after.params:,}", _change(before.params, after.params)),
            (
                "size",
                f"{before.bytes / 1e6:,.2f} MB",
                f"{after.bytes / 1e6:,.2f} MB",
                _change(before.bytes, after.bytes),
            ),
        ]
        if before.top1 is not None and after.top1 is not None:
            rows.append(_figure(self.metric.name, before.top1, after.top1))
        both = before.others.keys() & after.others.keys()
        rows += [_figure(name, before.others[name], after.others[name]) for name in before.others if name in both]
        if before.latency_ms is not None and after.latency_ms is not None:
            faster = _faster(before.latency_ms, after.latency_ms)
            rows.append(("latency", f"{before.latency_ms:.2f} ms", f"{after.latency_ms:.2f} ms", faster))
        if self.whole is not None:
            rows += self.whole.rows()
        return rows

    def notes(self) -> list[str]:
        """What the table does not say, in sentences: what its figures are, and what happened on the way."""
        notes = [legend(self.before, self.metric, self.about)]
        if self.whole is not None:
            notes.append(f"All figures but those of the whole are of the part {self.whole.part!r}.")
        if self.tuned is not None:
            notes.append(f"Before it was pruned, the dense model was tuned {self.tuned}.")
        trained = last_training(self.history)
        if trained[1:] and not kept_epoch(trained, self.metric.key, self.metric.lower_is_better):
            notes.append("Fine-tuning made it no better on the validation images: its weights are those from before.")
        if self.verified is not None:
            precision = f", in {self.precision}" if self.precision else ""
            notes.append(
                "Verified: before repair, the pruned model computed what the dense model computes with the pruned "
                f"channels masked; the outputs differed by {self.verified:.1e} of the largest one{precision}."
            )
        if self.unverified is not None:
            notes.append(f"Not verified: {self.unverified}.")
        if self.missed is not None:
            notes.append(f"The budget is missed: {self.missed}.")
        notes += [
            f"{counted(count, 'image')} of {where} could not be read and {'was' if count == 1 else 'were'} left out."
            for where, count in self.skipped.items()
        ]
        if self.selections:
            lost = f"{100 * (1 - self.selections[-1].importance):.2g} %"
            notes.append(
                f"Predicted loss, before repair and training: {lost} of all importance was in the channels that went."
            )
        return notes


def legend(measures: Measures, metric: Metric, about: Mapping[str, Any]) -> str:
    """What the figures of a table are.

    Args:
        measures: Of a model in it.
        metric: Of the task.
        about: As `Report.about`.
    """
    words = ["MACs are multiply-accumulate operations for one image."]
    if measures.images:
        images = counted(measures.images, "image")
        title = "" if metric.title == metric.name else f" ({metric.title})"
        words.append(f"{metric.name}{title} is measured on {images} that the run did not train on.")
    if measures.latency_ms is not None:
        batch = counted(about["latency_batch_size"], "image") if "latency_batch_size" in about else "a batch"
        device = f" on {about['device']}" if "device" in about else ""
        words.append(f"Latency is the median time of one forward pass with {batch}{device}.")
    return " ".join(words)


def measure(
    model: nn.Module, input_size: tuple[int, int, int], data: Data, classes: int = 0, teacher: nn.Module | None = None
) -> Measures:
    """Measures one model, but for its latency, which means something beside another's only.

    Args:
        model: In eval mode.
        input_size: (channels, height, width) in pixels.
        data: Its test images are used, or its validation images where there are none.
        classes: Width of its classifier; 0 counts nothing by class.
        teacher: The dense model, for a task that is measured by its outputs.
    """
    costs: dict[str, Any] = count(model, input_size)
    loader, task = data.measured_on, data.task
    if loader is None:
        return Measures(**costs, top1=None)
    meter = ByClass(task, classes, accelerator().device)
    found = evaluate(model, loader, task=task, teacher=teacher, meter=meter)
    others = {metric.name: found[metric.key] for metric in task.others if metric.key in found}
    by_class, mistakes = meter.counted()
    images = sum(images for _, images in by_class.values()) if by_class else None
    return Measures(
        **costs, top1=found[task.metric.key], others=others, images=images, by_class=by_class, mistakes=mistakes
    )


def _figure(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    """A row of the table, of what is a fraction of 1."""
    return name, f"{100 * before:.2f} %", f"{100 * after:.2f} %", f"{100 * (after - before):+.2f} points"


def _faster(before: float, after: float) -> str:
    return f"{before / after:.2f}x faster" if before >= after else f"{after / before:.2f}x slower"


def _change(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.1f} %"
