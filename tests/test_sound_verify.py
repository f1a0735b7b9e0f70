"""Verify accuses the right one, the oracle replays what ran, and a model's history changes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scap_hub
from tests.independent import TOLERANCE, difference, plans, random_values, reference
from tests.small_cases import Body, Forward, each, free, image, pruned_exactly, some_plan

# Verify accuses the right one.


BLAMELESS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dropout that is always on": (
        lambda: Body(lambda net, x: net.h(F.dropout(net.b(net.a(x)).mean((2, 3)), 0.5))), image),
    "noise": (
        lambda: Body(lambda net, x: net.head(net.b(net.a(x)) + 0.1 * torch.randn(2, 1, 8, 8, dtype=x.dtype))), image),
    "stochastic depth": (
        lambda: Body(lambda net, x: (
            y := net.a(x), net.head(net.b(y * torch.bernoulli(torch.full_like(y[:, :1], 0.5)))))[1]),
        image,
    ),
    "uint8 images": (
        lambda: Body(lambda net, x: net.head(net.b(net.a(x.float() / 255)))),
        lambda: torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8),
    ),
    "float32 inside": (lambda: Body(lambda net, x: net.head(net.b(net.a(x.float())))), image),
    "float32 in the middle": (lambda: Body(lambda net, x: net.head(net.b(net.a(x).float()))), image),
    "float32 inside, and back": (
        lambda: Body(lambda net, x: net.head(F.conv2d(net.a(x).float(), net.b.weight.float()).to(x.dtype))), image),
    "data": (lambda: Body(lambda net, x: net.head(net.b(net.a(x)).data.relu())), image),
    "a shallow copy": (lambda: Body(lambda net, x: (y := net.b(net.a(x)), net.head(y + copy.copy(y)))[1]), image),
}  # fmt: skip


@each(BLAMELESS)
def test_verify_does_not_call_the_plan_wrong_where_the_model_cannot_be_compared(name):
    build, images = BLAMELESS[name]
    net, x = random_values(build()).eval(), images()
    try:
        groups = scap_hub.channel_groups(net, x)
    except scap_hub.ScapHubError:
        return
    if not free(groups):
        return
    try:
        assert scap_hub.verify(net, some_plan(groups), x) < 1e-4
    except scap_hub.ScapHubError as error:
        assert "the plan is wrong" not in str(error)
        assert "the pruned model does not run" not in str(error)


def test_a_fresh_head_of_zeros_is_compared_beside_a_parameter_without_elements():
    net = Body(registers=nn.Parameter(torch.zeros(0, 4)))
    nn.init.zeros_(net.h.weight)
    nn.init.zeros_(net.h.bias)
    groups = scap_hub.channel_groups(net.eval(), image())
    assert scap_hub.verify(net, some_plan(groups), image()) < TOLERANCE


@pytest.mark.parametrize("made", [F.softplus, torch.exp, lambda w: w.clone().sigmoid_().expand(1, -1, -1, -1, -1)[0]])
def test_weights_may_be_computed_by_what_makes_no_zero_of_a_zero(made):
    def forward(net, x):
        y = F.conv2d(x, made(net.a.weight), net.a.bias, padding=1)
        return net.head(F.conv2d(y.relu(), made(net.b.weight), net.b.bias))

    net, x = random_values(Body(forward)).double().eval(), image().double()
    plan = some_plan(scap_hub.channel_groups(net, x))
    assert {"a.weight", "b.weight"} <= set(plan.tensors)
    assert scap_hub.verify(net, plan, x) < TOLERANCE
    plain = Body().double()
    plain.load_state_dict(net.state_dict() | {name: made(net.get_parameter(name)) for name in ("a.weight", "b.weight")})
    with torch.no_grad():
        ours, theirs = scap_hub.apply_plan(net, plan)(x), reference(plain, plan, "readers")(x)
    assert difference(ours, theirs) < TOLERANCE


def _in_place(net):
    net.compile(backend="eager")


def _a_part_in_place(net):
    net.b.compile(backend="eager")


def _a_part(net):
    net.b = torch.compile(net.b, backend="eager")


@pytest.mark.parametrize("compiled", [_in_place, _a_part_in_place, _a_part])
def test_what_is_compiled_is_pruned_and_watched_as_it_was_written(compiled):
    plain, x = random_values(Body()).eval(), image()
    net = copy.deepcopy(plain)
    compiled(net)
    with torch.no_grad():
        net(x)  # compiled before there are hooks
    known, groups = scap_hub.channel_groups(plain, x), scap_hub.channel_groups(net, x)
    assert [(group.size, group.prunable) for group in groups] == [(group.size, group.prunable) for group in known]
    plan = some_plan(groups)
    small = scap_hub.apply_plan(net, plan)
    with torch.no_grad():
        assert torch.equal(small(x), scap_hub.apply_plan(plain, some_plan(known))(x))
    ours, theirs = (
        scap_hub.score(model, [x], "scap-set", groups=own).values() for model, own in ((net, groups), (plain, known))
    )
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("layers", [1, 2])
def test_verify_of_torchs_transformer_encoder_does_not_call_the_plan_wrong(layers):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
            self.a, self.h = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
            self.e = nn.TransformerEncoder(layer, layers, enable_nested_tensor=True)

        def forward(self, x):
            return self.h(self.e(self.a(x).flatten(2).transpose(1, 2)).mean(1))

    net, x = random_values(Tokens()).eval(), image()
    try:
        groups = scap_hub.channel_groups(net, x)
        assert not free(groups) or scap_hub.verify(net, some_plan(groups), x) < TOLERANCE
    except scap_hub.ScapHubError as error:
        assert "the plan is wrong" not in str(error)


# The same answer for any history of the model, and a plan for whatever is called prunable.


class Cached(Body):
    """Keeps a table that follows the size of its input."""

    def __init__(self, forward: Forward) -> None:
        super().__init__(forward)
        self.table: Tensor | None = None


def from_attribute(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    if net.table is None:
        net.table = torch.linspace(0, 1, y.shape[3]).to(y)
    return net.head(net.b(y + net.table))


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


def from_lru_cache(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.head(net.b(y + ramp(y.shape[3]).to(y)))


def from_wide_table(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    if net.table is None:
        net.table = torch.linspace(0, 1, y.shape[1]).to(y)
    return net.head(net.b(y + net.table[:, None, None]))


@pytest.mark.parametrize("forward", [from_attribute, from_lru_cache, from_wide_table])
def test_a_model_that_has_run_has_the_groups_of_a_fresh_one(forward):
    fresh, used = Cached(forward).eval(), Cached(forward).eval()
    used(image())
    described = [[(g.name, g.size, g.prunable) for g in scap_hub.channel_groups(net, image())] for net in (fresh, used)]
    assert described[0] == described[1]
    pruned_exactly(Cached(forward), image())


class Missing:
    """Stands for a package that is not installed, as libraries with optional parts have it: any use raises."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError("not installed")


optional = Missing()


def test_a_package_that_is_missing_beside_the_models_code_does_no_harm():
    class Own(Body):
        pass

    pruned_exactly(Own(), image())


class Frozen(dict[str, int]):
    """A config that nobody may write to, as diffusers has it."""

    def _refused(self, *_: Any) -> None:
        raise TypeError("frozen")

    update = clear = _refused


def test_a_config_that_nobody_may_write_to_is_left_alone():
    net = Body()
    net.settings = Frozen(width=16)
    pruned_exactly(net, image())
    assert net.settings == {"width": 16}


@pytest.mark.parametrize(
    "backbone, heads", [([16, 24, 32, 40], 2), pytest.param([16, 16, 32, 32], 4, marks=pytest.mark.slow)]
)
def test_what_is_called_prunable_in_detr_can_be_pruned(backbone, heads):
    import transformers

    resnet = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=backbone, depths=[1] * 4, out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": resnet},
        **{"d_model": 16, "num_queries": 5},
        **{"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_labels": 3},
        **{"encoder_attention_heads": heads, "decoder_attention_heads": heads},
    )
    net, x = transformers.DetrForObjectDetection(config).eval(), torch.randn(1, 3, 64, 64)
    groups = scap_hub.channel_groups(net, x)
    for kind, plan in plans(groups, 0, singles=1):
        assert isinstance(plan, scap_hub.PruningPlan), f"{kind}: {plan!r}"
        assert scap_hub.verify(net, plan, x) < 1e-6


# The oracle replays what ran: tensors that are made in forward and written in place.


def filled(kind: str) -> Forward:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        acc = torch.zeros(y.shape[0], 12, *y.shape[2:], device=y.device, dtype=y.dtype)
        for conv in net.list:
            if kind == "add":
                acc += conv(y)
            elif kind == "slice":
                acc[:, :] = acc + conv(y)
            elif kind == "copy":
                acc.copy_(acc + conv(y))
            elif kind == "rows":
                acc[:, :, 2:5] += conv(y)[:, :, 2:5]
            elif kind == "index_add":
                acc.index_add_(0, torch.tensor([1, 0]), conv(y))
            elif kind == "view":
                acc.view(2, 12, -1).add_(conv(y).flatten(2))
            elif kind == "out":
                torch.add(acc, conv(y), out=acc)
        return net.head(acc)

    return forward


FLOAT32: dict[str, Forward] = {
    "zeros of the default type": lambda net, x: (y := net.b(net.a(x)), net.head(torch.zeros(y.shape) + y))[1],
    "mask of the default type": lambda net, x: net.head(net.b(net.a(x)) * torch.ones(8, 8).tril()),
    "accumulator from zeros_like": lambda net, x: (
        y := net.a(x), acc := torch.zeros_like(y), acc.add_(y), net.head(net.b(acc)))[-1],
    "features written to": lambda net, x: (y := net.a(x) * 1.0, y[:, :, 0].zero_(), net.head(net.b(y)))[-1],
    "channels written to": lambda net, x: (y := net.a(x) * 1.0, y[:, :4].mul_(2.0), net.head(net.b(y)))[-1],
    "assembled by channels": lambda net, x: (
        y := x.new_zeros(2, 16, 8, 8), y[:, :6].copy_(net.p(x)), y[:, 6:].copy_(net.q(x)), net.head(net.b(y)))[-1],
    "views held and written to in turn": lambda net, x: (
        y := net.a(x) * 1.0, front := y[:, :4], back := y[:, 4:], front.fill_(0.5), back.mul_(2.0), net.head(net.b(y))
        )[-1],
    "a weight that forward computes": lambda net, x: (
        setattr(net.b.weight, "data", net.b.weight.data.sign() * 0.1), net.head(net.b(net.a(x))))[-1],
    "shapes changed in place": lambda net, x: (
        y := net.a(x), y.unsqueeze_(1), z := y * 2, z.squeeze_(1), w := z.relu(), w.transpose_(1, 3), v := w + 1,
        net.head(net.b(v.transpose_(1, 3))))[-1],
    "the input written to": lambda net, x: (x.mul_(2.0), x[:, 0].sub_(1.0), net.head(net.b(net.a(x))))[-1],
}  # fmt: skip


ACCUMULATORS = ("add", "slice", "copy", "rows", "index_add", "view", "out")


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_a_tensor_that_forward_fills_in_place(kind):
    convs = nn.ModuleList(nn.Conv2d(16, 12, 1) for _ in range(3))
    groups = pruned_exactly(Body(filled(kind), list=convs), image(), trains=False)
    assert "a" in free(groups)


@each(FLOAT32)
def test_tensors_that_forward_makes_and_writes(name):
    net = Body(FLOAT32[name], p=nn.Conv2d(3, 6, 1), q=nn.Conv2d(3, 10, 1))
    assert {"a", "p"} & free(pruned_exactly(net, image(), trains=False))
