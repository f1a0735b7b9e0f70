"""What people write in their own networks can be pruned: literal sizes, unusual operators, computed weights."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import scap_hub
from scap_hub.errors import ModelError
from scap_hub.training.evaluate import count
from scap_hub.zoo import load_model
from tests.independent import TOLERANCE, difference, random_values, reference
from tests.small_cases import Body, Forward, each, free, image, pruned_exactly, some_plan

# Operators.

OPERATORS: dict[str, Forward] = {
    "type_as": lambda net, x: (y := net.b(net.a(x)), net.head(y + torch.arange(8).type_as(y)))[1],
    "to another's type": lambda net, x: (y := net.b(net.a(x)), net.head(y + torch.arange(8).to(y)))[1],
    "type_as of features": lambda net, x: (y := net.a(x), net.head(net.b(y * (y > 0).type_as(y))))[1],
    "expand_as of a grid": lambda net, x: (
        y := net.a(x), net.head(net.b(y + torch.arange(8.0).to(y).expand_as(y[0, 0]))))[1],
    "where with one argument": lambda net, x: (
        y := net.b(net.a(x)), net.head(y.index_select(2, torch.where(torch.ones(y.shape[2], device=y.device) > 0)[0]))
    )[1],
    "nonzero": lambda net, x: (
        y := net.b(net.a(x)), net.head(y.index_select(2, torch.ones(y.shape[2], device=y.device).nonzero().flatten()))
    )[1],
    "where with a number": lambda net, x: (y := net.a(x), net.head(net.b(torch.where(y > 0, y, 0.0))))[1],
    "pixel_shuffle": lambda net, x: net.head(net.shuffled(F.pixel_shuffle(net.up(net.a(x).relu()), 2))),
    "pixel_unshuffle": lambda net, x: net.head(net.unshuffled(F.pixel_unshuffle(net.a(x).relu(), 2))),
    "channel_shuffle": lambda net, x: net.head(net.b(F.channel_shuffle(net.a(x), 2))),
    "permutation by a buffer": lambda net, x: net.head(net.b(net.a(x).relu()[:, net.order])),
    "permutation by a list": lambda net, x: net.head(net.b(net.a(x).relu()[:, [3, 1, 0, 2, *range(15, 3, -1)]])),
    "permutation by index_select": lambda net, x: net.head(net.b(net.a(x).relu().index_select(1, net.order))),
    "copy_": lambda net, x: (y := net.a(x), z := torch.empty_like(y), z.copy_(y), net.head(net.b(z)))[-1],
    "maximum over pairs": lambda net, x: (y := net.a(x), net.head(net.eight(y.view(2, 2, 8, 8, 8).amax(1))))[1],
    "local response norm": lambda net, x: net.head(net.b(F.local_response_norm(net.a(x), 3))),
    "flip": lambda net, x: net.head(net.b(net.a(x).flip(1))),
    "roll": lambda net, x: net.head(net.b(net.a(x).roll(3, 1))),
    "adaptive_max_pool1d": lambda net, x: net.head(net.b(F.adaptive_max_pool1d(net.a(x).flatten(2), 4)[..., None])),
    "max_unpool": lambda net, x: (
        z := F.max_pool2d(net.a(x), 2, return_indices=True), net.head(net.b(F.max_unpool2d(z[0], z[1], 2))))[1],
}  # fmt: skip
MAY_BE_HELD = {"local response norm", "permutation by a list"}


@each(OPERATORS)
def test_channels_pass_the_operator(name):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    layers = {"up": nn.Conv2d(16, 48, 1), "shuffled": nn.Conv2d(12, 12, 3), "unshuffled": nn.Conv2d(64, 12, 1)}
    net = Body(OPERATORS[name], eight=nn.Conv2d(8, 12, 1), order=order, **layers)
    counts = name in {"maximum over pairs", "local response norm"}
    groups = pruned_exactly(net, image(), checks=() if counts else ("readers", "all"))
    wanted = {"a"} | ({"up"} if name == "pixel_shuffle" else set())
    assert wanted <= free(groups) or name in MAY_BE_HELD, [(g.name, g.pinned_because) for g in groups]


class Around(nn.Module):
    """Zero channels on both sides, as many as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = 4

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.amount, self.amount))


SHORTCUTS: dict[str, Forward] = {
    "on both sides": lambda net, x: F.pad(x, (0, 0, 0, 0, 4, 4), "constant", 0),
    "behind": lambda net, x: F.pad(x, (0, 0, 0, 0, 0, 8)),
    "what is missing": lambda net, x: F.pad(x, (0, 0, 0, 0, 8, net.wide(x).shape[1] - x.shape[1] - 8)),
    "an attribute": lambda net, x: net.around(x),
}


@each(SHORTCUTS)
def test_channels_of_zeros_leave_with_what_they_are_added_to(name):
    """As in the shortcuts of CIFAR's ResNets, which have no parameters."""
    net = Body(
        lambda net, x: (y := net.a(x).relu(), net.last(net.wide(y) + SHORTCUTS[name](net, y)))[1].mean((2, 3)),
        wide=nn.Conv2d(16, 24, 3, padding=1), last=nn.Conv2d(24, 5, 1), around=Around(),
    )  # fmt: skip
    groups = pruned_exactly(net, image())
    assert sorted(group.size for group in groups.prunable if "wide" in group.producers) == [8, 16]
    plan = some_plan(groups)
    small = scap_hub.apply_plan(net, plan)
    again = some_plan(scap_hub.channel_groups(small, image()), seed=1)
    assert scap_hub.verify(small, again, (image(),)) < TOLERANCE


def test_channels_of_another_constant_stay():
    net = Body(
        lambda net, x: net.last(net.wide(y := net.a(x).relu()) + F.pad(y, (0, 0, 0, 0, 0, 8), value=1.0)).mean((2, 3)),
        wide=nn.Conv2d(16, 24, 1), last=nn.Conv2d(24, 5, 1),
    )  # fmt: skip
    groups = pruned_exactly(net, image())
    assert [group.size for group in groups.prunable if "wide" in group.producers] == [16]


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(16), nn.BatchNorm2d(16, affine=False, track_running_stats=False)])
def test_a_norm_without_parameters_is_told_its_width(norm):
    net, x = Body(lambda net, x: net.head(net.b(net.norm(net.a(x)).relu())), norm=norm).eval(), image()
    plan = some_plan(scap_hub.channel_groups(net, x))
    small = scap_hub.apply_plan(net, plan)
    assert small.norm.num_features == small.a.out_channels < 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(x)


class Volume(nn.Module):
    def __init__(self, pools: Any) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv3d(3, 16, 3, padding=1), nn.Conv3d(16, 12, 1), nn.Linear(12, 5)
        self.pools = pools

    def forward(self, x):
        first, second, last = self.pools
        return self.h(last(second(self.b(first(self.a(x).relu())))).flatten(1))


VOLUMES = {
    "max and average": (
        lambda x: F.max_pool3d(x, 2), lambda x: F.avg_pool3d(x, 2), lambda x: F.adaptive_avg_pool3d(x, 1)),
    "adaptive maximum": (lambda x: F.adaptive_max_pool3d(x, 2), nn.Identity(), lambda x: F.adaptive_max_pool3d(x, 1)),
    "resized": (
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x.mean((2, 3, 4))),
    "padded": (
        lambda x: F.pad(x, (1,) * 6, mode="replicate"), lambda x: F.pad(x, (1,) * 6, mode="reflect"),
        lambda x: x.mean((2, 3, 4))),
}  # fmt: skip


@each(VOLUMES)
def test_channels_pass_pools_in_three_dimensions(name):
    assert {"a", "b"} <= free(pruned_exactly(Volume(VOLUMES[name]), image(8, 3)))


ATTENTIONS: dict[str, Forward] = {
    "maximum beside the mean": lambda net, x: (
        y := net.a(x).relu(),
        net.head(net.b(y * net.g(torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], 1)).sigmoid())))[1],
    "max beside the mean": lambda net, x: (
        y := net.a(x).relu(),
        net.head(net.b(y * net.g(torch.cat([y.max(1, keepdim=True)[0], y.mean(1, keepdim=True)], 1)).sigmoid())))[1],
    "two poolings through one layer": lambda net, x: (
        y := net.a(x).relu(),
        net.head(net.b(y * (net.s(y.mean((2, 3), keepdim=True)) + net.s(y.amax((2, 3), keepdim=True))).sigmoid())))[1],
}  # fmt: skip


@each(ATTENTIONS)
def test_channels_pass_block_attention(name):
    net = Body(ATTENTIONS[name], g=nn.Conv2d(2, 1, 3, padding=1), s=nn.Conv2d(16, 16, 1))
    checks = ("readers",) if "layer" in name else ()  # a mean over the survivors differs from plain masking by design
    assert {"a", "b"} <= free(pruned_exactly(net, image(), checks=checks))


# Sizes written as numbers.


class LeNet(nn.Module):
    """Five layers, the third of which reads a flattened map."""

    def __init__(self, view: Any) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.view = nn.Linear(16 * 5 * 5, 30), nn.Linear(30, 10), view

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(self.view(x))))


FLATTENED = {
    "view(-1, 16 * 5 * 5)": lambda x: x.view(-1, 16 * 5 * 5),
    "view(x.size(0), 400)": lambda x: x.view(x.size(0), 400),
    "reshape(-1, 400)": lambda x: x.reshape(-1, 400),
    "reshape((len(x), 400))": lambda x: x.reshape((len(x), 400)),
    "view(x.size(0), -1)": lambda x: x.view(x.size(0), -1),
    "flatten(1)": lambda x: x.flatten(1),
}


@each(FLATTENED)
def test_flattening_to_a_literal_size(name):
    assert free(pruned_exactly(LeNet(FLATTENED[name]), image(32))) == {"c1", "c2", "f1"}


def by_the_width(scaled: Callable[[Tensor, int], Tensor]) -> Forward:
    """Attention whose heads and scale the code computes from the channels that enter, as in torchvision's Swin."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        heads = y.shape[1] // 2
        q, k, v = (own(y).flatten(2).reshape(len(y), 2, heads, -1) for own in (net.q16, net.k16, net.v16))
        w = scaled(q.transpose(2, 3) @ k, heads).softmax(-1)
        return net.head(net.b((v @ w.transpose(2, 3)).reshape(len(y), y.shape[1], *y.shape[2:])))

    return forward


class Heads(nn.Module):
    """The same as a module: four heads of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)

    def forward(self, y: Tensor) -> Tensor:
        width = y.shape[1] // 4
        q, k, v = self.qkv(y).reshape(len(y), 3, 4, width, -1).unbind(1)
        w = (q.transpose(2, 3) @ k * width**-0.5).softmax(-1)
        return self.out((v @ w.transpose(2, 3)).reshape(y.shape))


LITERAL: dict[str, Forward] = {
    "gate by slices": lambda net, x: (y := net.a(x), net.head(net.eight(y[:, :8] * torch.sigmoid(y[:, 8:]))))[1],
    "gate by a split": lambda net, x: (
        y := net.a(x).split([8, 8], 1), net.head(net.eight(y[0] * torch.sigmoid(y[1]))))[1],
    "uneven split": lambda net, x: (y := net.a(x).split([4, 12], 1), net.head(net.p(y[0]) + net.q(y[1])))[1],
    "uneven slices": lambda net, x: (y := net.a(x), net.head(net.p(y[:, :4]) + net.q(y[:, 4:])))[1],
    "part through a layer": lambda net, x: (
        y := net.a(x), net.head(net.b(torch.cat([net.r(y[:, :4]), y[:, 4:]], 1))))[1],
    "shuffle": lambda net, x: (
        y := net.a(x),
        net.head(net.b(y.view(len(y), 2, 8, 8, 8).transpose(1, 2).reshape(len(y), 16, 8, 8))))[1],
    "heads": lambda net, x: (
        y := net.a(x), q := net.q16(y).view(2, 2, 8, 64), k := net.k16(y).view(2, 2, 8, 64),
        w := (q.transpose(2, 3) @ k * 0.3).softmax(-1),
        net.head(net.b((net.v16(y).view(2, 2, 8, 64) @ w.transpose(2, 3)).reshape(2, 16, 8, 8))))[-1],
    "queries of two heads share a key": lambda net, x: (
        y := net.a(x), q := net.q16(y).flatten(2)[..., None], k := net.few(y).flatten(2)[..., None],
        w := F.scaled_dot_product_attention(q, k, k, scale=0.3, enable_gqa=True),
        net.head(net.b(w.squeeze(-1).unflatten(2, (8, 8)))))[-1],
    "heads by the width that enters, scaled by its root": by_the_width(lambda w, root: w * root**-0.5),
    "heads by the width that enters, over its root": by_the_width(lambda w, root: w / math.sqrt(root)),
    "heads so narrow that their width is right by chance": lambda net, x: (
        y := net.a(x), net.head(net.b(y + net.attention(y))))[1],
    "maps from a line": lambda net, x: (
        y := net.a(x).mean((2, 3)), net.head(net.up(net.wide(y).relu().view(-1, 16, 4, 4))))[1],
    "pixel shuffle by hand": lambda net, x: (
        y := net.a(x).view(len(x), 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3),
        net.head(net.p(y.reshape(len(x), 4, 16, 16))))[1],
    "bias of a literal shape": lambda net, x: net.head(net.b(net.a(x) + net.bias.view(1, 16, 1, 1))),
    "expand to a literal size": lambda net, x: (
        y := net.a(x), net.head(net.b(y * y.mean((2, 3)).view(2, 16, 1, 1).expand(2, 16, 8, 8))))[1],
    "zeros of a literal size": lambda net, x: (
        y := net.a(x).relu(), net.head(net.b(torch.zeros(2, 16, 8, 8, dtype=y.dtype) + y)))[1],
}  # fmt: skip
PRODUCTS = {name for name in LITERAL if name.startswith(("heads", "queries", "expand"))}


@each(LITERAL)
def test_sizes_written_as_numbers(name):
    layers = {
        "eight": nn.Conv2d(8, 12, 1),
        "p": nn.Conv2d(4, 12, 1),
        "q": nn.Conv2d(12, 12, 1),
        "r": nn.Conv2d(4, 4, 1),
        "few": nn.Conv2d(16, 8, 1),
        "wide": nn.Linear(16, 256),
        "up": nn.ConvTranspose2d(16, 12, 4, 2, 1),
    }
    layers |= {f"{own}16": nn.Conv2d(16, 16, 1) for own in "qkv"}
    net = Body(LITERAL[name], **layers, bias=nn.Parameter(torch.randn(16)), attention=Heads())
    groups = pruned_exactly(net, image(), checks=("all",) if name in PRODUCTS else ("readers", "all"))
    inside = {"heads": {"q16", "v16"}, "maps": {"wide"}}.get(name.split()[0], set())
    inside = {"attention.qkv"} if "chance" in name else inside
    assert {"a"} | inside <= free(groups), [(g.name, g.pinned_because) for g in groups]


# Towers of images: positions are looked up in a table, and SigLIP's head is one of torch's attentions.


def tower(kind: str) -> nn.Module:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, num_labels=5)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@each(["CLIP", "Siglip"])
def test_towers_of_images(name):
    net = tower(name)
    groups = pruned_exactly(net, image(32), checks=())
    ends = {path.rpartition(".")[2] for path in free(groups)}
    assert {"q_proj", "v_proj", "fc1"} <= ends
    assert ("patch_embedding" in ends) == (name == "CLIP")  # torch's attention ties the stream to its heads
    assert scap_hub.latency_table(net, groups, image(32)).entries  # numbers to look up are no input of a layer


def test_a_tower_is_measured_at_the_size_of_its_config():
    loaded = load_model(tower("CLIP"))
    assert loaded.preprocessing.input_size == (3, 32, 32)
    assert count(loaded.module, (3, 32, 32))["macs"] > 0
    with pytest.raises(ModelError, match=r"does not run on one image \(3, 64, 64\): .*; set model.input_size to"):
        count(loaded.module, (3, 64, 64))


# Torch's own attention, whose code computes the width of its heads from that of what enters.


class Attending(nn.Module):
    """A stream of patches that is changed by an attention and by a hidden layer."""

    def __init__(self, attend: Callable[[nn.Module, Tensor], Tensor], attention: nn.Module, layers: int = 1) -> None:
        super().__init__()
        self.attend = attend
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(copy.deepcopy(attention) for _ in range(layers))
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for layer in self.layers:
            x = x + self.attend(layer, x)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


class OwnLayer(nn.TransformerEncoderLayer):
    """One of torch's transformer layers by inheritance."""


class Projections(nn.Module):
    """The attention pool of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return F.multi_head_attention_forward(
            x.mean(0, keepdim=True), x, x, x.shape[-1], 4, None,
            torch.cat([self.q.bias, self.k.bias, self.v.bias]), None, None, False, 0.0, self.out.weight, self.out.bias,
            use_separate_proj_weight=True, training=self.training, need_weights=False,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0].transpose(0, 1)  # fmt: skip


ATTENTION: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "of itself": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), lambda own, x: own(x, x, x)[0]),
    "of itself, no weights": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda own, x: own(x, x, x, need_weights=False)[0],
    ),
    "of another": (lambda: nn.MultiheadAttention(16, 4, bias=False), lambda own, x: own(x, 2 * x, 2 * x)[0]),
    "of two others": (lambda: nn.MultiheadAttention(16, 2), lambda own, x: own(x, 2 * x, 3 * x, need_weights=False)[0]),
    "of another width": (
        lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=8),
        lambda own, x: own(x, x[..., :12], x[..., 2:10])[0],
    ),
    "a pool": (Projections, lambda own, x: own(x)),
    "a layer": (lambda: nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True), lambda own, x: own(x)),
    "layers": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=True), 2),
        lambda own, x: own(x),
    ),
}


@each(ATTENTION)
def test_heads_of_torchs_attention(name):
    """Torch computes an encoder's layer past its modules where nothing is to be trained: so the small one is run."""
    make, attend = ATTENTION[name]
    net = Attending(attend, make())
    groups = pruned_exactly(net, image(8), checks=("all",))
    heads = {group for group in free(groups) if group.startswith("layers.")}
    within = [path for path, own in net.named_modules() if isinstance(own, nn.MultiheadAttention)]
    assert all(path in heads for path in within) and ("layers.0.v" in heads) == (name == "a pool")
    # Torch asks for a stream of the width of all heads. That of a pool may be as wide as its values.
    assert ("stem" in free(groups)) == (name == "a pool")


def test_torchs_attention_counts_with_and_without_its_fast_path():
    make, attend = ATTENTION["of itself, no weights"]
    net = Attending(attend, make()).eval()
    groups = scap_hub.channel_groups(net, image(8)[:1])
    plan = scap_hub.PruningPlan.from_keep(groups, {"layers.0": [0, 2]})
    assert count(net, (3, 8, 8))["macs"] == groups.macs(groups.everything())
    assert count(scap_hub.apply_plan(net, plan), (3, 8, 8))["macs"] == groups.macs(groups.staying({"layers.0": [0, 2]}))


def test_an_einsum_of_three_counts_as_the_two_products_that_torch_computes():
    product = "bchw,cd,de->behw"
    net = Body(
        lambda net, x: net.head(net.b(torch.einsum(product, net.a(x), net.one, net.two))),
        one=nn.Parameter(torch.randn(16, 8)), two=nn.Parameter(torch.randn(8, 16)),
    )  # fmt: skip
    groups = scap_hub.channel_groups(net, image()[:1])
    assert count(net, (3, 8, 8))["macs"] == groups.macs(groups.everything())


def test_torchs_attention_is_pruned_twice():
    make, attend = ATTENTION["of itself, no weights"]
    net = random_values(Attending(attend, make(), 2)).eval()
    heads = {"layers.0": [0, 2, 3], "layers.1": [1, 2, 3]}
    once = scap_hub.apply_plan(net, scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net, image(8)), heads))
    groups = pruned_exactly(once, image(8), checks=("all",))
    assert once.layers[0].in_proj_weight.shape == (36, 16) and heads.keys() <= free(groups)


@torch.no_grad()
def test_a_layer_of_ones_own_takes_no_fast_path():
    """Torch would hand on nested tensors here, and compute the layer past its attention."""

    def attend(own: nn.Module, x: Tensor) -> Tensor:
        here = torch.arange(x.shape[1]).expand(x.shape[:2]) < 3
        return own(x, src_key_padding_mask=~here) * here[..., None]

    layers = nn.TransformerEncoder(OwnLayer(16, 4, 24, 0.0, batch_first=True), 1)
    net, x = random_values(Attending(attend, layers)).eval().double(), image(8).double()
    kept = {"layers.0.layers.0.self_attn": [0, 2, 3]}
    plan = scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net, x), kept)
    assert difference(scap_hub.apply_plan(net, plan)(x), reference(net, plan, "all")(x)) < TOLERANCE


def test_a_scale_from_a_width_is_kept_in_a_second_round():
    """Torch scales by the root of a width, where it returns weights; the first plan has changed the width."""
    make, attend = ATTENTION["of itself"]
    net, x = random_values(Attending(attend, make())).eval().double(), image(8).double()
    for kept in ([0, 1, 3], [1, 2], [0]):
        plan = scap_hub.PruningPlan.from_keep(scap_hub.channel_groups(net, x), {"layers.0": kept})
        dense, net = net, scap_hub.apply_plan(net, plan)
        assert difference(net(x), reference(dense, plan, "all")(x)) < TOLERANCE


# Arithmetic with a width that is read at run time.


def non_local(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    t, p, g = (layer(y).flatten(2) for layer in (net.q16, net.k16, net.v16))
    w = (t.transpose(1, 2) @ p / math.sqrt(t.shape[1])).softmax(-1)
    return net.head(net.b(y + (g @ w.transpose(1, 2)).unflatten(2, x.shape[2:])))


ARITHMETIC: dict[str, Forward] = {
    "non-local": non_local,
    "sum / width": lambda net, x: (y := net.a(x), net.head(net.b(y - y.sum(1, keepdim=True) / y.shape[1])))[1],
    "x / sqrt(width)": lambda net, x: (y := net.a(x), net.head(net.b(y * y.shape[1] ** -0.5)))[1],
    "width as a tensor": lambda net, x: (y := net.a(x), net.head(net.b(y / torch.tensor(float(y.shape[1])))))[1],
    "width in full": lambda net, x: (
        y := net.a(x), net.head(net.b(y / torch.full((1,), y.shape[1], dtype=y.dtype))))[1],
    "sum of ones": lambda net, x: (y := net.a(x), net.head(net.b(y / torch.ones_like(y).sum(1, keepdim=True))))[1],
    "clamp by the width": lambda net, x: (y := net.a(x), net.head(net.b(y.clamp(max=y.shape[1] / 50))))[1],
    "slope of the width": lambda net, x: (y := net.a(x), net.head(net.b(F.leaky_relu(y, 1 / y.shape[1]))))[1],
    "ramp over the width": lambda net, x: (
        y := net.a(x), net.head(net.b(y + torch.linspace(0, 1, y.shape[1], dtype=y.dtype)[:, None, None])))[1],
    "branch on the width": lambda net, x: (y := net.a(x), net.head(net.b(y if y.shape[1] >= 16 else -y)))[1],
    "number of elements": lambda net, x: (y := net.a(x), net.head(net.b(y / y.numel())))[1],
    "root of an attribute": lambda net, x: (y := net.a(x), net.head(net.b(y / net.a.out_channels)))[1],
}  # fmt: skip


@each(ARITHMETIC)
def test_numbers_that_follow_the_width(name):
    layers = {f"{own}16": nn.Conv2d(16, 16, 1) for own in "qkv"}
    pruned_exactly(Body(ARITHMETIC[name], **layers), image(), checks=("all",))


# Weights that are no plain parameters of a module.


class Gain(nn.Module):
    def forward(self, w):
        return 2 * w + 0.1 * w.abs()


def gained(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Gain())
    return layer


def through(layer: nn.Module) -> nn.Module:
    return Body(lambda net, x: net.head(net.b(net.w(net.a(x).relu()).relu())), w=layer)


def functional(shape: tuple[int, ...], call: Any) -> nn.Module:
    return Body(lambda net, x: net.head(net.b(call(net.a(x).relu(), net.w).relu())), w=nn.Parameter(torch.randn(shape)))


COMPUTED = {
    "parametrized": lambda: through(gained(nn.Conv2d(16, 16, 3, padding=1))),
    "parametrized depthwise": lambda: through(gained(nn.Conv2d(16, 16, 3, padding=1, groups=16))),
    "parametrized grouped": lambda: through(gained(nn.Conv2d(16, 16, 3, padding=1, groups=4))),
    "weight_norm": lambda: through(parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))),
    "spectral_norm": lambda: through(parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))),
    "orthogonal": lambda: through(parametrizations.orthogonal(nn.Conv2d(16, 16, 1))),
    "old weight_norm": lambda: through(torch.nn.utils.weight_norm(nn.Conv2d(16, 16, 3, padding=1))),
    "old weight_norm of a depthwise": lambda: through(
        torch.nn.utils.weight_norm(nn.Conv2d(16, 16, 3, padding=1, groups=16))),
    "old spectral_norm": lambda: through(torch.nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))),
    "pruning masks": lambda: through(prune.random_unstructured(nn.Conv2d(16, 16, 3, padding=1), "weight", 0.3)),
    "pruning masks of a depthwise": lambda: through(
        prune.random_unstructured(nn.Conv2d(16, 16, 3, padding=1, groups=16), "weight", 0.3)),
    "functional": lambda: functional((16, 16, 3, 3), lambda x, w: F.conv2d(x, w, padding=1)),
    "functional grouped": lambda: functional((16, 4, 3, 3), lambda x, w: F.conv2d(x, w, padding=1, groups=4)),
    "functional depthwise": lambda: functional((16, 1, 3, 3), lambda x, w: F.conv2d(x, w, padding=1, groups=16)),
    "functional depthwise by width": lambda: functional(
        (16, 1, 3, 3), lambda x, w: F.conv2d(x, w, padding=1, groups=x.shape[1])),
    "functional transposed": lambda: functional((16, 16, 3, 3), lambda x, w: F.conv_transpose2d(x, w, padding=1)),
    "functional grouped of a product": lambda: functional(
        (16, 4, 3, 3), lambda x, w: F.conv2d(x, w * 2.0, padding=1, groups=4)),
}  # fmt: skip
TRAINED = {"old spectral_norm", "old weight_norm", "old weight_norm of a depthwise"}


@each(COMPUTED)
def test_weights_that_are_computed(name):
    net, x = COMPUTED[name](), image()
    if name in TRAINED:
        net(x).sum().backward()  # now the weight belongs to a graph
    normed = "norm" in name or name == "orthogonal"  # zeros change what such a weight is computed from
    checks = () if normed else ("all",) if "masks" in name else ("readers", "all")
    readers = {"w": 1, "w.parametrizations.weight.original": 1}
    if name == "functional transposed":
        readers["w"] = 0
    refused_or(lambda: pruned_exactly(net, x, readers=readers, checks=checks), "remove_|parametri[sz]|weight")


def refused_or(step: Callable[[], Any], match: str) -> Any:
    """What a step returns, or None if it was refused with a message that says what to do."""
    try:
        return step()
    except scap_hub.ScapHubError as error:
        assert re.search(match, str(error)), error
        return None


def cached(net: Any, x: Tensor) -> Tensor:
    net.feat = net.a(x).relu()
    return net.head(net.b(net.feat))


def cached_in_a_list(net: Any, x: Tensor) -> Tensor:
    net.seen = [net.a(x).relu()]
    return net.head(net.b(net.seen[0]))


def cached_output(net: Any, x: Tensor) -> Tensor:
    net.last = net.head(net.b(net.a(x).relu()))
    return net.last


@pytest.mark.parametrize("forward", [cached, cached_in_a_list, cached_output])
def test_activations_that_the_model_keeps(forward):
    net, x = Body(forward), image()
    net(x).sum().backward()
    random_values(net).eval()
    groups = refused_or(lambda: scap_hub.channel_groups(net, x), r"feat|seen|last")
    if groups is not None:
        small = refused_or(lambda: scap_hub.apply_plan(net, some_plan(groups)), r"feat|seen|last")
        assert small is None or scap_hub.verify(net, some_plan(groups), x) < 1e-9


# Attributes that are read outside forward.


REPARAMETERISED = ("fastvit_t8", "repvgg_a0")
MORE = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("repvit_m0_9", "repghostnet_050", "fastvit_sa12", "mobileone_s0", "mobileclip_s0")
]


@pytest.mark.parametrize("name", [*REPARAMETERISED, *MORE])
def test_a_pruned_model_is_reparameterised_like_a_dense_one(name):
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    net, x = random_values(timm.create_model(name, num_classes=5)).eval(), torch.randn(1, 3, 64, 64)
    small = scap_hub.apply_plan(net, some_plan(scap_hub.channel_groups(net, x))).eval()
    assert difference(reparameterize_model(small)(x), small(x)) < 1e-3


class NormOfOneNumber(nn.Module):
    """Blocks as monai has them: a norm without tensors stands beside an activation with a single number."""

    def __init__(self):
        super().__init__()
        for name, entering in (("one", 3), ("two", 16)):
            after = nn.Sequential(nn.InstanceNorm2d(16), nn.PReLU())
            self.add_module(name, nn.Sequential(nn.Conv2d(entering, 16, 3), after))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.two(self.one(x)).mean((2, 3)))


def test_a_norm_without_tensors_goes_by_what_shrinks_around_it():
    net = random_values(NormOfOneNumber()).eval()
    groups = scap_hub.channel_groups(net, image())
    assert [group.name for group in groups.prunable] == ["one.0", "two.0"]
    plan = some_plan(groups)
    assert scap_hub.verify(net, plan, image()) < 1e-9
    small = scap_hub.apply_plan(net, plan)
    assert small.one[1][0].num_features == small.one[0].out_channels < 16
