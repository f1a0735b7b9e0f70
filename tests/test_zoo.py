"""Real architectures of both zoos: pruned equals masked, at uniform and at random ratios."""

import pytest
import timm
import torch
import transformers as hf

from scap_hub import PruningPlan, apply_plan, channel_groups, verify
from scap_hub.channels.oracle import randomize
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


@pytest.mark.parametrize("name", MODELS)
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
}


@pytest.mark.parametrize("name", SPECIAL)
def test_constructions_that_need_more_than_shapes(name):
    model = randomize(SPECIAL[name]())
    x = torch.randn(1, 3, 64, 64)
    groups = channel_groups(model, x)
    assert all(group.prunable or "output of the model" in group.pinned_because for group in groups)
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
