"""What is told of exported files: `deploy.json`, a table, and a section of the model card."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from scap_hub.deploy.capture import INPUT, OUTPUT
from scap_hub.deploy.search import Found
from scap_hub.hub.card import HERE
from scap_hub.markdown import code, escaped, fenced
from scap_hub.page import device

DOCUMENT = "deploy.json"
_BEGIN, _END = "<!-- scap_hub deploy: begin -->", "<!-- scap_hub deploy: end -->"
_BEFORE = "## Limits"
_FED = "float32 (N, C, H, W), preprocessed as above"


@dataclass(frozen=True)
class Variant:
    """One file, in its runtime.

    Attributes:
        name: "dense fp32", "pruned fp32" or "pruned int8".
        file: Its place in the folder; None where it is not kept, as that of the dense model.
        bytes: Its size.
        top1: The task's metric, 0 to 1, on the images that models are measured on; None without labels.
        agreement: Share of the images to which it gives the answer of the pruned model in float32; None for the dense
            one, and for models that do not answer by logits alone.
        latency_ms: Milliseconds of one forward pass, measured in turns with the others.
        output_error: Of these other models, the relative output error to the pruned model in float32.
    """

    name: str
    file: str | None
    bytes: int
    top1: float | None
    agreement: float | None
    latency_ms: float
    output_error: float | None = None


@dataclass(frozen=True)
class Int8:
    """How int8 was made.

    Attributes:
        scheme: How numbers are mapped to eight bits.
        kept: Layers that stay in float32, by the model's module names.
        images: Calibration images.
        allowed: Loss that was allowed, as a fraction.
        loss: What it loses on the images that decided.
        decided_on: Which images these are, and what the loss is of.
        attempts: What was tried, with what each lost.
    """

    scheme: str
    kept: list[str]
    images: int
    allowed: float
    loss: float
    decided_on: str
    attempts: list[str]

    @classmethod
    def of(cls, found: Found, images: int, allowed: float, decided_on: str) -> Int8:
        """From what a search found."""
        best = found.best
        return cls(
            str(best.scheme), list(best.kept), images, allowed, best.loss, decided_on, list(map(str, found.attempts))
        )

    @property
    def missed(self) -> str | None:
        """How the allowed loss is missed; None where it is not."""
        return device.missed_loss(asdict(self))


@dataclass(frozen=True)
class Deployment:
    """What was measured of exported files.

    Attributes:
        runtime: What ran them, with its version.
        device: What latency was measured on.
        batch_size: Images at once when latency is measured.
        metric: Name of the metric.
        dataset: What it was measured on.
        variants: The files.
        int8: How int8 was made.
    """

    runtime: str
    device: str
    batch_size: int
    metric: str
    dataset: str | None
    variants: list[Variant] = field(default_factory=list)
    int8: Int8 | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON-able values."""
        return asdict(self)

    def to_json(self) -> str:
        """`deploy.json`."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @property
    def title(self) -> str:
        """Where the figures come from."""
        return device.title(self.to_dict())

    @property
    def _by_answers(self) -> bool:
        return device.by_answers(self.to_dict())

    @property
    def head(self) -> list[str]:
        """Names of the columns of `rows`."""
        return device.head(self.to_dict())

    def rows(self) -> list[list[str]]:
        """The table a person reads."""
        return device.rows(self.to_dict())

    def notes(self) -> list[str]:
        """What was done beyond the default, in sentences."""
        return device.notes(self.to_dict())

    def card(self) -> str:
        """The section of the model card."""
        head = [text or " " for text in self.head]
        lines = ["| " + " | ".join(map(escaped, head)) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(map(escaped, row)) + " |" for row in self.rows()]
        files = [code(variant.file) for variant in self.variants if variant.file]
        notes = [f"- {escaped(note)}" for note in self.notes()]
        return "\n".join(
            [
                "## On a device", "", f"{escaped(self.title)}:", "", *lines, "", *notes, *([""] if notes else []),
                f"{' and '.join(files)} need neither scap_hub nor code from this repository:", "", self._snippet(),
            ]
        )  # fmt: skip

    def _snippet(self) -> str:
        """Code that runs the last file without scap_hub: with ONNX Runtime alone, or as transformers opens it."""
        file = next(variant.file for variant in reversed(self.variants) if variant.file)
        left = f"({OUTPUT},)" if self._by_answers else "outputs"
        if file.endswith(".onnx"):
            lines = [
                "import onnxruntime",
                "from huggingface_hub import hf_hub_download",
                "",
                f'session = onnxruntime.InferenceSession(hf_hub_download("{HERE}", "{file}"))',
                f'{left} = session.run(None, {{"{INPUT}": images}})  # {_FED}',
            ]
        else:
            folder = file.partition("/")[0]
            options = ', config={"INFERENCE_PRECISION_HINT": "f32"}' if folder == "openvino" else ""
            lines = [
                "from transformers.exporters import ExportedModel",
                "",
                f'model = ExportedModel.from_pretrained("{HERE}", subfolder="{folder}"{options})',
                f"output = model({INPUT}=images)  # a tensor, {_FED}",
            ]
        return fenced("\n".join(lines), "python")


def with_deployment(card: str, deployment: Deployment) -> str:
    """A model card with the section in it, in the place of an older one."""
    section = f"{_BEGIN}\n{deployment.card()}\n{_END}\n"
    old = re.compile(rf"^{re.escape(_BEGIN)}$.*?^{re.escape(_END)}$\n?", re.DOTALL | re.MULTILINE)
    if old.search(card):
        return old.sub(lambda _: section, card, count=1)
    before, limits, after = card.partition(f"\n{_BEFORE}\n")
    return f"{before}\n{section}\n{_BEFORE}\n{after}" if limits else f"{card.rstrip()}\n\n{section}"
