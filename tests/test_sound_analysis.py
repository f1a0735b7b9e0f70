"""The analysis is sound: what it cannot see it holds, and every plan that it hands out is exact.

Small networks that once were pruned wrongly, each with others of its kind.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scap_hub
from tests.independent import TOLERANCE, copied, difference, plans, random_values, reference
from tests.small_cases import Body, Forward, each, free, image, pruned_exactly, some_plan

# Strided slices, and slices whose bounds follow the width.


def strided(width: int, step: int, first: tuple[int, ...]) -> nn.Module:
    convs = nn.ModuleList(nn.Conv2d(len(range(start, width, step)), 12, 1) for start in first)

    def read(net: Any, y: Tensor) -> Any:
        return sum(conv(y[:, start::step]) for conv, start in zip(net.p, first, strict=True))

    return Body(
        lambda net, x: net.head(read(net, net.w(x).relu())),
        w=nn.Conv2d(3, width, 3, padding=1), p=convs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "width, step, first",
    [
        pytest.param(12, 2, (0, 1)),
        pytest.param(16, 2, (0, 1)),
        *((20, 2, (0, 1)), (12, 3, (0, 1, 2)), (13, 2, (0, 1)), (16, 2, (1,)), (15, 4, (0, 2))),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_strided_slices_of_channels(width, step, first, seed):
    pruned_exactly(strided(width, step, first), image(), seed=seed)


SLICES: dict[str, Forward] = {
    "half by width": lambda net, x: (
        y := net.a(x), net.head(net.p(y[:, : y.shape[1] // 2]) + net.p(y[:, y.shape[1] // 2 :])))[1],
    "quarter by width": lambda net, x: (y := net.a(x), net.head(net.b(y) + net.q(y[:, : y.shape[1] // 4])))[1],
    "all but the last": lambda net, x: (y := net.a(x), net.head(net.r(y[:, :-1])))[1],
    "all but the first": lambda net, x: (y := net.a(x), net.head(net.r(y[:, 1:])))[1],
    "by a list of widths": lambda net, x: (y := net.a(x), net.head(net.p(y.split([y.shape[1] // 2] * 2, 1)[1])))[1],
    "one channel": lambda net, x: (y := net.a(x), net.head(net.b(y * y[:, 3:4].sigmoid())))[1],
    "the last channel": lambda net, x: (y := net.a(x), net.head(net.b(y * y[:, -1:].sigmoid())))[1],
    "strided after a concatenation": lambda net, x: (y := net.a(x), net.head(net.b(torch.cat([y, -y], 1)[:, ::2])))[1],
    "strided in the last dimension": lambda net, x: (
        y := net.a(x).movedim(1, -1),
        net.head(net.b(torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2).movedim(-1, 1)))
    )[1],
}  # fmt: skip


@each(SLICES)
@pytest.mark.parametrize("seed", range(3))
def test_slices_of_channels(name, seed):
    layers = {"p": nn.Conv2d(8, 12, 1), "q": nn.Conv2d(4, 12, 1), "r": nn.Conv2d(15, 12, 1)}
    pruned_exactly(Body(SLICES[name], **layers), image(), seed=seed)


GRIDS: dict[str, Forward] = {
    "read by another layer": lambda net, x: (
        y := net.a(x).relu(), f := net.f(y).tanh(), w := F.grid_sample(y, f.permute(0, 2, 3, 1), align_corners=False),
        net.head(net.m(torch.cat([w, net.r(f)], 1))),
    )[-1],
    "alone": lambda net, x: (
        y := net.a(x).relu(),
        net.head(net.b(F.grid_sample(y, net.f(y).tanh().permute(0, 2, 3, 1), align_corners=False))),
    )[-1],
    "added to a fixed grid": lambda net, x: (
        y := net.a(x).relu(), f := net.f(y).permute(0, 2, 3, 1) + torch.arange(8).to(x.dtype)[:, None, None],
        net.head(net.b(F.grid_sample(y, f, align_corners=False))),
    )[-1],
    "affine": lambda net, x: (
        y := net.a(x).relu(), t := net.t(y.mean((2, 3))).view(-1, 2, 3),
        net.head(net.b(F.grid_sample(y, F.affine_grid(t, y.shape, align_corners=False), align_corners=False))),
    )[-1],
}  # fmt: skip


@each(GRIDS)
def test_the_two_channels_of_a_sampling_grid_are_held(name):
    layers = {"f": nn.Conv2d(16, 2, 3, padding=1), "r": nn.Conv2d(2, 8, 3, padding=1), "m": nn.Conv2d(24, 12, 1)}
    groups = pruned_exactly(Body(GRIDS[name], **layers, t=nn.Linear(16, 6)), image(), checks=("readers",))
    assert not free(groups) & {"f", "t"}
    assert "a" in free(groups)


def test_a_channel_taken_out_for_its_shape_is_held_if_it_is_returned_too():
    def lent(net, x):
        y = net.a(x).relu()
        one = y[:, 0]
        return net.head(net.b(y + x.mean((1, 2, 3))[:1, None].expand_as(one)[:, None])), one

    assert "a" not in free(pruned_exactly(Body(lent), image(), checks=()))
    assert "a" in free(pruned_exactly(Body(lambda net, x: lent(net, x)[0]), image(), checks=()))


# What cannot be seen is an error or is held.


@dataclass
class Record:
    features: Tensor
    logits: Tensor


class Named(NamedTuple):
    features: Tensor
    logits: Tensor


class Plain:
    def __init__(self, features: Tensor, logits: Tensor) -> None:
        self.features, self.logits = features, logits


def hugging(features: Tensor, logits: Tensor) -> Any:
    from transformers.modeling_outputs import ImageClassifierOutput

    return ImageClassifierOutput(logits=logits, hidden_states=(features,))


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    **{"dataclass": Record, "named tuple": Named, "plain object": Plain, "output of transformers": hugging},
    "dict": lambda features, logits: {"out": logits, "features": [features]},
    "list of objects": lambda features, logits: [Record(features, logits), None],
    "object in a dict": lambda features, logits: {"instances": Plain(features, logits)},
}
outputs = each(OUTPUTS)


def answering(name: str) -> nn.Module:
    return Body(lambda net, x: (f := net.b(net.a(x).relu()), OUTPUTS[name](f, net.head(f)))[1])


@outputs
def test_features_in_an_output_are_held(name):
    net, x = answering(name), image()
    groups = pruned_exactly(net, x)
    assert free(groups) == {"a"}


@outputs
def test_verify_sees_a_wrong_plan_whatever_the_output(name):
    net, x = random_values(answering(name)).eval(), image()
    plan = some_plan(scap_hub.channel_groups(net, x))
    assert scap_hub.verify(net, plan, x) < TOLERANCE
    document = json.loads(plan.to_json())
    cut = document["tensors"]["b.weight"]["keep"]
    kept = plan.indices(cut["1"])
    other = next(index for index in range(16) if index not in kept)
    document["keeps"].append(",".join(map(str, sorted([other, *kept[1:]]))))
    cut["1"] = len(document["keeps"]) - 1
    with pytest.raises(scap_hub.ScapHubError):
        scap_hub.verify(net, scap_hub.PruningPlan.from_json(json.dumps(document)), x)


@pytest.mark.parametrize("output", [lambda x: None, lambda x: {"count": 3}, lambda x: x.mean().item])
def test_an_output_without_any_tensor_is_an_error(output):
    net = Body(lambda net, x: output(net.b(net.a(x))))
    with pytest.raises(scap_hub.ScapHubError, match="tensor"):
        scap_hub.channel_groups(net, image())


ORIGINS: dict[str, Forward] = {
    "data": lambda net, x: net.head(net.b(net.a(x).relu()).data.relu()),
    "detach": lambda net, x: net.head(net.b(net.a(x).detach().relu())),
    "copy": lambda net, x: net.head(net.b(copy.copy(net.a(x).relu()))),
    "deepcopy": lambda net, x: net.head(net.b(copy.deepcopy(net.a(x).detach()).relu())),
    "numpy": lambda net, x: net.head(net.b(torch.from_numpy(net.a(x).detach().numpy().clip(0)))),
    "tolist": lambda net, x: net.head(net.b(torch.tensor(net.a(x).tolist(), dtype=x.dtype))),
    "set_": lambda net, x: (y := net.a(x), z := torch.empty(0, dtype=x.dtype).set_(y.detach()), net.head(net.b(z)))[-1],
    "data and kept": lambda net, x: (y := net.a(x).relu(), net.head(net.b(y + y.data.relu())))[1],
}


@each(ORIGINS)
def test_a_tensor_whose_origin_is_lost_is_noticed(name):
    net = Body(ORIGINS[name])
    try:
        groups = scap_hub.channel_groups(random_values(net).eval(), image())
    except scap_hub.ScapHubError:
        return
    for kind, plan in plans(groups, 0) if free(groups) else ():
        assert isinstance(plan, scap_hub.PruningPlan), f"{kind}: {plan!r}"
        small = scap_hub.apply_plan(copied(net).double(), plan).eval()
        assert difference(small(image().double()), reference(net, plan, "readers")(image().double())) < TOLERANCE
        assert scap_hub.verify(net, plan, image()) < TOLERANCE


# What runs in training mode alone.


def with_head(net: Any, x: Tensor) -> Any:
    y = net.a(x).relu()
    out = net.head(net.b(y))
    return (out, net.aux(y).mean((2, 3))) if net.training else out


def with_branch(net: Any, x: Tensor) -> Any:
    y = net.a(x).relu()
    return net.head(net.b(y + net.side(y) if net.training else y))


def with_two_heads(net: Any, x: Tensor) -> Any:
    y = net.a(x).relu()
    z = net.b(y)
    return {"out": net.head(z), **({"aux": [net.aux(y), net.deep(z)]} if net.training else {})}


def with_a_slice(net: Any, x: Tensor) -> Any:
    y = net.a(x).relu()
    return (net.head(net.b(y)), net.part(y[:, :5])) if net.training else net.head(net.b(y))


def with_another_way(net: Any, x: Tensor) -> Any:
    return net.head(net.b(net.a(x).relu())) if net.training else net.head(net.b(net.a(x).relu() * 1.0))


def with_drop_path(net: Any, x: Tensor) -> Any:
    y = net.a(x).relu()
    keep = torch.ones(len(y), 1, 1, 1, dtype=y.dtype) if net.training else 1.0
    return net.head(net.b(y + net.side(y) * keep))


@pytest.mark.parametrize(
    "forward",
    [
        *(with_head, with_branch, with_two_heads, with_a_slice),
        *(with_another_way, with_drop_path),
    ],
)
def test_what_runs_in_training_alone_is_pruned_with_the_rest(forward):
    layers = {
        "aux": nn.Conv2d(16, 5, 1),
        "side": nn.Conv2d(16, 16, 1),
        "deep": nn.Conv2d(12, 5, 1),
        "part": nn.Conv2d(5, 4, 1),
    }
    net, x = Body(forward, **layers), image()
    groups = pruned_exactly(net, x)
    for _, plan in plans(groups, 0) if free(groups) else ():
        small = scap_hub.apply_plan(net.double(), plan).train()
        assert difference(small(x.double()), reference(net, plan, "all").train()(x.double())) < TOLERANCE
        net.float()


def test_googlenet_trains_with_its_auxiliary_heads():
    models = pytest.importorskip("torchvision").models
    net = models.googlenet(weights=None, num_classes=7, aux_logits=True, init_weights=False).eval()
    groups = scap_hub.channel_groups(net, (torch.randn(1, 3, 64, 64),))
    small = scap_hub.apply_plan(net, some_plan(groups))
    small.eval()(torch.randn(1, 3, 64, 64))
    small.train()(torch.randn(2, 3, 224, 224)).aux_logits1.sum().backward()


def test_widths_may_be_integers_of_numpy():
    width = np.int64(16)
    net = Body(lambda net, x: (y := net.q(net.p(x)), net.head(net.b(y.reshape(len(y), net.width, 8, 8))))[-1],
               p=nn.Conv2d(3, width, 1), q=nn.Conv2d(width, width, 1))  # fmt: skip
    net.width = width
    assert {"p", "q"} <= free(pruned_exactly(net, image()))


class WithoutTokens(nn.Module):
    """A stream of tokens that begins with further ones, of which there are none: as in a ViT that pools by the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.further = nn.Parameter(torch.zeros(0, 8))

    def forward(self, x: Tensor) -> Tensor:
        further = self.further[None, None].expand(len(x), 1, 0, 8).reshape(len(x), 0, 8)
        return self.head(torch.cat((further, self.stem(x).flatten(2).transpose(1, 2)), 1).relu().mean(1))


def test_channels_pass_a_tensor_without_elements():
    net, x = random_values(WithoutTokens()).eval(), image()
    groups = scap_hub.channel_groups(net, x)
    assert free(groups) == {"stem"}
    plan = scap_hub.PruningPlan.from_keep(groups, {"stem": [1, 2, 6]})
    assert scap_hub.verify(net, plan, x) < TOLERANCE
    small = scap_hub.apply_plan(net, plan).double()
    assert difference(small(x.double()), reference(net, plan, "readers")(x.double())) < TOLERANCE
