"""Real architectures of both zoos: pruned equals masked, at uniform and at random ratios."""

import copy
import inspect

import pytest
import timm
import torch
import transformers as hf
from timm.models._features import FeatureHookNet
from timm.utils import reparameterize_model
from torch import nn

from scap_hub import PruningPlan, apply_plan, channel_groups, surgery, verify
from scap_hub.channels.oracle import randomize
from scap_hub.zoo import modeling_scap
from tests.nets import Residual, random_plan

# Fewer layers and a narrower head where the rest would only repeat itself.
TIMM = {
    "resnet18": {},
    "vgg16_bn": {"mlp_ratio": 0.0625},
    "mobilenetv2_100": {},
    "convnext_atto": {},
    "densenet121": {"block_config": [3, 4, 4, 3]},
    "regnety_002": {},
}
TRANSFORMERS = {
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512], num_labels=10)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 2, 2], num_labels=10)
    ),
    "mobilenet_v2": lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(num_labels=10)),
}
MODELS = {
    **{name: lambda name=name, options=options: timm.create_model(name, **options) for name, options in TIMM.items()},
    **TRANSFORMERS,
    "module": lambda: Residual(width=16),
}


LONG = ("regnety_002", "mobilenet_v2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in MODELS])
def test_pruned_equals_masked(name):
    model = randomize(MODELS[name]())
    x = torch.randn(1, 3, 64, 64)
    groups = channel_groups(model, x)
    for ratio in (0.5, None):
        plan = PruningPlan.from_json(random_plan(groups, seed=1, ratio=ratio).to_json())
        assert len(plan.groups) == sum(group.prunable for group in groups)
        assert verify(model, plan, x) < 1e-9


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "regnety_002", "convnext"])
def test_only_the_classifier_stays_whole(name):
    model = MODELS[name]()
    pinned = [group for group in channel_groups(model, torch.randn(1, 3, 64, 64)) if not group.prunable]
    assert len(pinned) == 1
    assert pinned[0].pinned_because == "is an output of the model"


SPECIAL = {
    "weight standardisation, group norm": lambda: hf.BitForImageClassification(
        hf.BitConfig(hidden_sizes=[32, 64], depths=[1, 1], embedding_size=16, num_groups=4)
    ),
    "widths in attributes, splits": lambda: timm.create_model("res2net50_26w_4s", layers=[2, 2, 2, 2]),
    "halves of an attribute": lambda: timm.create_model("skresnet18"),
    "unequal splits in a list": lambda: timm.create_model("inception_next_atto"),
    "a buffer as a filter": lambda: timm.create_model("resnetblur18"),
    "channel gates, partial residuals": lambda: timm.create_model("rexnet_100"),
    "slices and concatenations of concatenations": lambda: timm.create_model("ghostnet_100"),
    "a window over channels": lambda: timm.create_model("ecaresnet26t", layers=[1, 1, 1, 1]),
    "grouped standardised weights": lambda: timm.create_model("test_nfnet"),
    "as many groups as channels": lambda: timm.create_model("resnetv2_50d_gn", layers=[1, 1, 1, 1]),
    "stretched statistics, one number in two roles": lambda: timm.create_model(
        "resnetv2_50d_evos", layers=[1, 1, 1, 1]
    ),
    "a number that is a quarter of another by chance": lambda: timm.create_model("fasternet_t0", depths=(1, 1, 1, 1)),
    "the whole less a part": lambda: timm.create_model("shvit_s1", depth=(1, 1, 1)),
    "padded values, a size that hides in another": lambda: timm.create_model("efficientvit_b0"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_constructions_that_need_more_than_shapes(name):
    model = randomize(SPECIAL[name]())
    x = torch.randn(1, 3, 64, 64)
    groups = channel_groups(model, x)
    assert all(group.prunable or "output of the model" in group.pinned_because for group in groups)
    for ratio in (0.5, None):
        assert verify(model, random_plan(groups, seed=1, ratio=ratio), x) < 1e-9


# A few of their channels are gates, one for each of so many tensors.
GATED = {
    "the width of what enters, read off and checked": lambda: hf.FocalNetForImageClassification(
        hf.FocalNetConfig(embed_dim=24, depths=[1, 1], hidden_sizes=[24, 48], focal_levels=[2, 2], focal_windows=[3, 3])
    ),
    "windows unfolded and folded": lambda: hf.MobileViTV2ForImageClassification(
        hf.MobileViTV2Config(width_multiplier=0.25, n_attn_blocks=[1, 1, 1])
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_all_but_gates_go(name):
    model = randomize(GATED[name]())
    x = torch.randn(1, 3, 64, 64)
    groups = channel_groups(model, x)
    pinned = [group for group in groups if not group.prunable and "output of the model" not in group.pinned_because]
    assert all(group.size < 4 and "is taken out alone" in group.pinned_because for group in pinned)
    for ratio in (0.5, None):
        assert verify(model, random_plan(groups, seed=1, ratio=ratio), x) < 1e-9


def test_group_names_are_module_paths_and_stable():
    model = timm.create_model("regnety_002")
    one, two = (channel_groups(model, torch.randn(n, 3, 64, 64)) for n in (1, 2))
    assert [group.name for group in one] == [group.name for group in two]
    for group in one:
        assert model.get_submodule(group.name) is not None
        assert all(model.get_submodule(path) is not None for path in (*group.producers, *group.consumers))
        assert dict(group.members), "every group says what shrinks"


def test_pruned_model_can_be_trained_and_pruned_again():
    model = randomize(timm.create_model("regnety_002", num_classes=4))
    x = torch.randn(2, 3, 64, 64)
    small = apply_plan(model, random_plan(channel_groups(model, x), seed=0, ratio=0.5)).train()
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    small.eval()
    plan = random_plan(channel_groups(small, x), seed=1, ratio=0.5)
    assert verify(small, plan, x) < 1e-9
    assert sum(p.numel() for p in apply_plan(small, plan).parameters()) < sum(p.numel() for p in small.parameters())


def halved(model, x):
    plan = random_plan(channel_groups(model, x), seed=0, ratio=0.5)
    return plan, apply_plan(model, plan).eval()


class OwnHeads(nn.Module):
    """Self-attention as many write it: the merged heads are reshaped to the width of the input."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (layer(x).reshape(b, n, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, c))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, stride=4)
        self.attention = OwnHeads(24, heads=3, head_dim=8)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x).mean(1))


def test_a_reshape_to_the_width_of_another_tensor_does_not_hold_it():
    model, x = randomize(Tokens()), torch.randn(2, 3, 16, 16)
    groups = {group.name: group for group in channel_groups(model, x)}
    assert all(groups[name].prunable for name in ("stem", "attention.q", "attention.v"))
    plan = PruningPlan.from_json(random_plan(list(groups.values()), seed=0).to_json())
    assert {(own.function, own.old, own.new) for own in plan.calls["attention"]} == {
        ("reshape", len(plan.kept("stem")), 3 * len(plan.kept("attention.v"))),
        ("scaled_dot_product_attention", None, 8**-0.5),  # of the dense width, which the code leaves to torch
    }
    assert verify(model, plan, x) < 1e-9
    small = apply_plan(model, plan).eval()
    want = small(x)
    assert torch.equal(copy.deepcopy(small)(x), want)
    assert copy.deepcopy(small).attention.forward.args[0] is not small.attention
    torch.testing.assert_close(torch.compile(small, backend="eager")(x), want)
    fresh = apply_plan(Tokens().eval(), plan)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), want)
    assert small(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    again = random_plan(channel_groups(small, x), seed=1)
    assert verify(small, again, x) < 1e-9
    for name in ("Numbers", "renumbered", "opened", "changeable", "exchangeable", "narrower"):
        assert inspect.getsource(getattr(surgery, name)) == inspect.getsource(getattr(modeling_scap, name))


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(96, 2)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = x.view(-1, 96).view(-1, 6, 4, 4)
        return self.head(x.view(-1, 96))


def test_numbers_in_calls_stand_in_their_order():
    """Sets are in another order in every process, and the same run has to give the same plan."""
    model, x = randomize(Written()), torch.randn(2, 3, 6, 6)
    changes = random_plan([*channel_groups(model, x)], seed=0).calls[""]
    assert [change.call for change in changes] == list(range(1, 8))


class OwnWidth(nn.Module):
    """Keeps the width of its heads under a name that elsewhere means the width of the output."""

    def __init__(self, width):
        super().__init__()
        self.out_dim, self.heads = width, 3
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, self.out_dim))


def test_a_width_that_the_forward_pass_means_otherwise_stays():
    model, x = Tokens(), torch.randn(1, 3, 16, 16)
    model.attention = OwnWidth(24)
    plan = random_plan(channel_groups(randomize(model), x), seed=0, ratio=0.5)
    assert plan.groups["stem"].size == 24 and "attention" not in plan.attributes
    assert verify(model, plan, x) < 1e-9


class Packed(nn.Module):
    """Queries, keys and values lie side by side; a batch size of -1 would take in whatever is wrong with the rest."""

    def __init__(self):
        super().__init__()
        self.dim = 8
        self.qkv = nn.Conv2d(3, 3 * 8 * 4, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3 * self.dim, 64).chunk(3, dim=2)
        y = (q * k).sigmoid() * v
        return self.head(y.flatten(1, 2).mean(-1))


def test_a_size_of_minus_one_hides_no_number_that_should_change():
    model, x = randomize(Packed()), torch.randn(1, 3, 8, 8)
    plan = random_plan(channel_groups(model, x), seed=0, ratio=0.5)
    assert plan.attributes[""]["dim"] == 4
    assert verify(model, plan, x) < 1e-9


class Scaled(nn.Module):
    """The width of a head is a size and a scale: the sizes change where they are used, the scale does not."""

    def __init__(self, head_dim=8):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(12, 2 * head_dim) for _ in range(3))
        self.stem, self.head = nn.Linear(3, 12), nn.Linear(2 * head_dim, 5)

    def forward(self, x):
        x = self.stem(x.flatten(2).transpose(1, 2))
        q, k, v = (f(x).view(*x.shape[:2], 2, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1)
        return self.head((weights @ v).transpose(1, 2).flatten(2).mean(1))


def test_a_scale_is_not_changed_with_a_width():
    model, x = randomize(Scaled()), torch.randn(1, 3, 4, 4)
    groups = channel_groups(model, x)
    assert {"stem", "q", "v"} <= {group.name for group in groups.prunable}
    plan = random_plan(groups, seed=0)
    assert verify(model, plan, x) < 1e-9
    assert apply_plan(model, plan).head_dim == 8


class Caching(nn.Module):
    """Keeps what it computed in an attribute and in a dict."""

    def __init__(self):
        super().__init__()
        self.width, self.cache, self.last = 4, {}, None
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        if x.device not in self.cache:
            self.cache[x.device] = torch.ones(1, device=x.device) * 2
        self.last = self.one(x)
        y = self.last[:, : self.width] * self.last[:, self.width :]
        return self.two(y * self.cache[x.device]).mean((2, 3))


def test_what_a_model_caches_is_neither_left_nor_missed():
    model, x = randomize(Caching()), torch.randn(1, 3, 4, 4)
    plan = random_plan(channel_groups(model, x), seed=0, ratio=0.5)
    assert not model.cache and model.last is None
    assert plan.attributes[""]["width"] == 2
    assert verify(model, plan, x) < 1e-9


def test_uneven_parts_lose_equally_many():
    model, x = randomize(timm.create_model("edgenext_xx_small")), torch.randn(1, 3, 64, 64)
    groups = channel_groups(model, x)
    pinned = {group.pinned_because.partition(" (")[0] for group in groups if not group.prunable}
    assert pinned == {"is an output of the model", "is normalised or sorted over"}
    assert verify(model, random_plan(groups, seed=1), x) < 1e-9


@pytest.mark.skipif(not timm.is_model("efficientvim_m1"), reason="this timm has none")
def test_a_width_that_is_the_sum_over_several_heads_follows():
    model = timm.create_model("efficientvim_m1", num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    _, small = halved(model, x)
    read = [head.in_features for head in small.heads]
    assert small.num_features == small.head_hidden_size == sum(read) < model.num_features
    small.reset_classifier(7)
    assert small(x).shape == (1, 7) and [head.in_features for head in small.heads] == read


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_050",
        "inception_next_atto",
        "regnety_002",
        "test_vit",
        pytest.param("mambaout_femto", marks=pytest.mark.slow),
    ],
)
def test_timm_knows_the_new_widths(name):
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    _, small = halved(model, x)
    with torch.no_grad():
        features = small.forward_features(x)
        assert small.num_features in features.shape and small.num_features < model.num_features
        assert small.forward_head(features, pre_logits=True).shape[-1] == small.head_hidden_size
        if "vit" not in name:
            channels = -1 if name.startswith("mamba") else 1
            info = [stage["num_chs"] for stage in small.feature_info]
            maps = FeatureHookNet(small, out_indices=range(len(info)))(x)
            assert info[1:] == [feature.shape[channels] for feature in maps][1:]
        for classes in (7, 0):
            small.reset_classifier(classes)
            assert small(x).shape[-1] == (classes or small.head_hidden_size)
    assert model(x).shape == (1, 10)


def test_feature_extractors_of_timm_keep_their_outputs():
    model, x = randomize(timm.create_model("resnet18", features_only=True)), torch.randn(1, 3, 64, 64)
    plan, small = halved(model, x)
    assert verify(model, plan, x) < 1e-9
    assert small.feature_info.channels() == [feature.shape[1] for feature in small(x)]


@pytest.mark.parametrize("config", [
    hf.ResNetConfig(depths=[1, 1], hidden_sizes=[32, 64], embedding_size=16, num_labels=3),
    hf.RegNetConfig(depths=[1, 1], hidden_sizes=[32, 64], embedding_size=16, groups_width=8, num_labels=3),
    hf.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48], num_labels=3),
])  # fmt: skip
def test_configs_of_transformers_know_the_new_widths(config):
    model, x = hf.AutoModelForImageClassification.from_config(config).eval(), torch.randn(1, 3, 64, 64)
    _, small = halved(model, x)
    states = small(x, output_hidden_states=True).hidden_states
    sizes = small.config.embed_dims if hasattr(config, "embed_dims") else small.config.hidden_sizes
    assert (
        sizes[-1]
        == states[-1].shape[1]
        < (config.embed_dims if hasattr(config, "embed_dims") else config.hidden_sizes)[-1]
    )
    if hasattr(config, "embedding_size"):
        assert [small.config.embedding_size, *sizes] == [state.shape[1] for state in states]


def test_backbones_of_transformers_know_the_new_widths():
    config = hf.ResNetConfig(depths=[1, 1, 1], hidden_sizes=[32, 48, 64], embedding_size=16, out_features=["stage2"])
    model, x = randomize(hf.ResNetBackbone(config)), torch.randn(1, 3, 64, 64)
    plan, small = halved(model, x)
    assert verify(model, plan, x) < 1e-9
    output = small(x, output_hidden_states=True)
    assert small.channels == [feature.shape[1] for feature in output.feature_maps] == [48]
    assert small.num_features == [state.shape[1] for state in output.hidden_states]


@pytest.mark.parametrize("name", ["repghostnet_050", pytest.param("mobileone_s0", marks=pytest.mark.slow)])
def test_branches_can_be_fused_before_and_after(name):
    model, x = randomize(timm.create_model(name, num_classes=5)).eval(), torch.randn(1, 3, 64, 64)
    plan, small = halved(model, x)
    assert verify(model, plan, x) < 1e-9
    fused = reparameterize_model(small)
    torch.testing.assert_close(fused(x), small(x), rtol=1e-3, atol=1e-4)
    dense = reparameterize_model(model)
    assert verify(dense, random_plan(channel_groups(dense, x), seed=0), x) < 1e-9
