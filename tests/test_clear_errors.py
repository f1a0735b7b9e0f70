"""What cannot be pruned, or is asked for wrongly, ends in an error of ours that says what it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scap_hub
from tests.independent import random_values
from tests.small_cases import Body, each, image, some_plan


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.LazyConv2d(16, 3), nn.LazyLinear(5)

    def forward(self, x):
        return self.h(self.a(x).relu().mean((2, 3)))


class Plain(nn.Module):
    """A network that can be scripted and traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        return self.h(self.b(self.a(x).relu()).relu().mean((2, 3)))


def whole(net: nn.Module, x: Any) -> Any:
    """Everything that a user does with a model."""
    groups = scap_hub.channel_groups(net, x)
    plan = some_plan(groups)
    scap_hub.verify(net, plan, x)
    return scap_hub.apply_plan(net, plan)


def dynamically_quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Plain().eval(), {nn.Linear})


def statically_quantised() -> nn.Module:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised convolutions here")
    torch.backends.quantized.engine = "fbgemm"
    net = nn.Sequential(torch.ao.quantization.QuantStub(), Plain(), torch.ao.quantization.DeQuantStub()).eval()
    net.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(net)
    prepared(image())
    return torch.ao.quantization.convert(prepared)


def on_meta() -> Any:
    return whole(Plain().to("meta"), (image().to("meta"),))


def faster_rcnn() -> Any:
    detection = pytest.importorskip("torchvision").models.detection
    net = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
    return scap_hub.channel_groups(net.eval(), ([torch.rand(3, 64, 64)],))


MODELS: dict[str, Callable[[], Any]] = {
    "detector with lists of boxes": faster_rcnn,
    "uninitialised lazy modules": lambda: whole(Lazy(), (image(),)),
    "scripted": lambda: whole(torch.jit.script(Plain().eval()), (image(),)),
    "traced": lambda: whole(torch.jit.trace(Plain().eval(), image()), (image(),)),
    "a scripted part": lambda: whole(nn.Sequential(torch.jit.script(nn.Conv2d(3, 8, 1)), Body()), (image(),)),
    "on meta": on_meta,
    "quantised dynamically": lambda: whole(dynamically_quantised(), (image(),)),
    "quantised": lambda: whole(statically_quantised(), (image(),)),
    "exported": lambda: whole(torch.export.export(Plain().eval(), (image(),)).module(), (image(),)),
    "traced by fx": lambda: whole(torch.fx.symbolic_trace(Plain().eval()), (image(),)),
    "compiled": lambda: whole(torch.compile(Plain().eval(), backend="eager"), (image(),)),
    "data parallel": lambda: whole(nn.DataParallel(Plain()).eval(), (image(),)),
    "no module": lambda: scap_hub.channel_groups(torch.relu, (image(),)),
    "inputs of the wrong size": lambda: scap_hub.channel_groups(Plain(), (torch.randn(2, 4, 8, 8),)),
}


@each(MODELS)
def test_a_model_works_or_is_refused_by_an_error_of_ours(name):
    try:
        MODELS[name]()
    except scap_hub.ScapHubError as error:
        assert len(str(error)) > 20 and "please report it" not in str(error)


def tried(call: Callable[[Any, dict[str, Tensor]], Any]) -> None:
    net = random_values(Plain()).eval()
    groups = scap_hub.channel_groups(net, image())
    scores = {group.name: torch.rand(group.size) for group in groups if group.prunable}
    with pytest.raises(scap_hub.ScapHubError):
        call(groups, scores)


def changed(scores: dict[str, Tensor], value: Any) -> dict[str, Tensor]:
    return {**scores, "a": value}


ARGUMENTS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "a number as target": lambda groups, scores: scap_hub.select(groups, scores, target=0.5),
    "no target": lambda groups, scores: scap_hub.select(groups, scores, target=None),
    "a fraction above one": lambda groups, scores: scap_hub.select(groups, scores, target={"a": 1.5}),
    "a fraction that is no number": lambda groups, scores: scap_hub.select(groups, scores, target={"a": math.nan}),
    "a target for an unknown group": lambda groups, scores: scap_hub.select(groups, scores, target={"z": 0.5}),
    "too few scores": lambda groups, scores: scap_hub.select(groups, changed(scores, torch.rand(3)), "ratio=0.5"),
    "too many scores": lambda groups, scores: scap_hub.select(groups, changed(scores, torch.rand(20)), "ratio=0.5"),
    "scores with NaN": lambda groups, scores: scap_hub.select(
        groups, changed(scores, torch.full((16,), math.nan)), "ratio=0.5"),
    "scores of two dimensions": lambda groups, scores: scap_hub.select(
        groups, changed(scores, torch.rand(4, 4)), "ratio=0.5"),
    "scores of an unknown group": lambda groups, scores: scap_hub.select(groups, {"z": torch.rand(16)}, "ratio=0.5"),
    "no groups": lambda groups, scores: scap_hub.select([], scores, "macs=0.5"),
    "no scores": lambda groups, scores: scap_hub.select(groups, {}, "macs=0.5"),
    "indices that are floats": lambda groups, scores: scap_hub.PruningPlan.from_keep(
        groups, {"a": torch.tensor([1.0, 2.0])}),
    "indices with a fraction": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"a": [0.5, 2]}),
    "indices that are booleans": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"a": [True] * 16}),
    "an index twice": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"a": [1, 1, 2]}),
    "an index beyond": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"a": [1, 16]}),
    "a negative index": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"a": [-1, 2]}),
    "no index": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"a": []}),
    "an unknown group": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"z": [0]}),
    "a pinned group": lambda groups, scores: scap_hub.PruningPlan.from_keep(groups, {"h": [0]}),
    "a group of no groups": lambda groups, scores: scap_hub.PruningPlan.from_keep([], {"a": [0]}),
}  # fmt: skip
UNCHECKED = {"a number as target", "no target", "too few scores", "scores with NaN", "scores of two dimensions",
             "indices that are floats", "indices with a fraction"}  # fmt: skip


@each(ARGUMENTS)
def test_wrong_arguments_are_refused(name):
    tried(ARGUMENTS[name])


class Answers(nn.Module):
    """A classifier that returns more than logits."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.h, self.answer = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5), answer

    def forward(self, x):
        features = self.a(x).relu().mean((2, 3))
        return self.answer(self.h(features), features)


ANSWERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda logits, features: (logits, features),
    "list": lambda logits, features: [logits, features],
    "dict": lambda logits, features: {"logits": logits, "features": features},
    "nothing": lambda logits, features: None,
    "features first": lambda logits, features: (features, logits),
}


@each(ANSWERS)
def test_prune_of_a_module_that_returns_more_than_logits_works_or_says_so(name):
    labels = torch.randint(0, 5, (8,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), labels), batch_size=4)
    settings = {"target": "macs=0.5", "model_input_size": [3, 8, 8], "finetune_epochs": 0, "criterion": "random"}
    try:
        scap_hub.prune(Answers(ANSWERS[name]), dataset=data, **settings)
    except scap_hub.ScapHubError as error:
        assert "does not run" not in str(error)
        assert any(word in str(error) for word in ("tuple", "list", "dict", "output", "returns"))


def test_what_python_does_not_copy_is_named():
    net = Plain().eval()
    net.scales = {"8": 8, "4": 4}.keys()
    with pytest.raises(scap_hub.errors.ModelError, match=r"'dict_keys' object, which Plain\.scales holds"):
        scap_hub.channel_groups(net, image())
