"""Parts of models whose control flow depends on values, such as the backbones of torchvision's detectors."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

import scap_hub
from scap_hub.channels.oracle import randomize
from scap_hub.errors import ModelError, UnverifiableError, VerificationError

IMAGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Body(nn.Sequential):
    """Three convolutions; its last channels are what the detector reads."""

    out_channels = 16

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1)
        )


def detector():
    """Whole, as torchvision runs it: proposals, non-maximum suppression, boxes."""
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    net = FasterRCNN(
        Body(), num_classes=3, min_size=64, max_size=64, rpn_anchor_generator=anchors, box_detections_per_img=5
    )
    return randomize(net).eval()


def plan_of(net):
    groups = scap_hub.channel_groups(net, IMAGES, part="backbone")
    assert [(group.name, group.size) for group in groups.prunable] == [("backbone.0", 12), ("backbone.2", 12)]
    keep = {"backbone.0": range(0, 12, 2), "backbone.2": [0, 3, 5, 11]}
    return scap_hub.PruningPlan.from_keep(groups, keep)


def test_what_cannot_be_recorded_names_the_parts_that_can():
    with pytest.raises(ModelError, match=r"size depends on the values of.*part='backbone' .*of the parameters"):
        scap_hub.channel_groups(detector(), IMAGES)


def test_a_part_is_pruned_put_back_and_verified_in_the_whole():
    net = detector()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = plan_of(net)
    small = scap_hub.apply_plan(net, plan)
    assert (small.backbone[0].out_channels, small.backbone[2].weight.shape) == (6, (4, 6, 3, 3))
    assert len(small(IMAGES)[0]["boxes"]) > 0
    assert scap_hub.verify(net, plan, IMAGES, part="backbone") < 1e-9
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    # By hand: the dense model in which nobody reads what is gone.
    with torch.no_grad():
        net.backbone[2].weight[:, [1, 3, 5, 7, 9, 11]] = 0
        net.backbone[4].weight[:, [1, 2, 4, 6, 7, 8, 9, 10]] = 0
        ours, theirs = small(IMAGES)[0], net(IMAGES)[0]
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-4) for name in ours)


def other_keep(plan, tensor, dim, keep):
    """A plan that keeps other channels along one dimension of one tensor."""
    cut = plan.tensors[tensor]
    wrong = cut.model_copy(update={"keep": {**cut.keep, dim: len(plan.keeps)}})
    return plan.model_copy(update={"keeps": (*plan.keeps, keep), "tensors": {**plan.tensors, tensor: wrong}})


def test_a_wrong_plan_of_a_part_is_seen():
    net = detector()
    with pytest.raises(VerificationError):
        scap_hub.verify(net, other_keep(plan_of(net), "backbone.4.weight", 1, "0,3,5,10"), IMAGES, part="backbone")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("neck", "has no part 'neck': its parts are 'transform', 'backbone', 'rpn', 'roi_heads'"),
        ("backbone.1.x", "has no part"),
        ("roi_heads.box_predictor.bbox_pred", None),
        ("rpn", "size depends on the values"),
    ],
)
def test_parts_that_cannot_be_taken(part, message):
    if message is None:
        assert not scap_hub.channel_groups(detector(), IMAGES, part=part).prunable
        return
    with pytest.raises(ModelError, match=message):
        scap_hub.channel_groups(detector(), IMAGES, part=part)


def test_a_part_that_is_never_called():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ModelError, match="does not call its part 'idle'"):
        scap_hub.channel_groups(Idle(), IMAGES, part="idle")


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_outputs_that_are_the_same_for_any_image_prove_nothing(bias):
    """A wrong plan is seen although the dense model's last layer is zero."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 2))
    nn.init.zeros_(net[4].weight)
    nn.init.constant_(net[4].bias, bias)
    images = IMAGES[:, :, :4, :4]
    groups = scap_hub.channel_groups(net, images)
    plan = scap_hub.PruningPlan.from_keep(groups, {"0": range(4)})
    assert scap_hub.verify(net, plan, images) < 1e-9
    with pytest.raises(VerificationError):
        scap_hub.verify(net, other_keep(plan, "2.weight", 1, "1-4"), images)


def test_images_of_whole_numbers_are_disturbed_too():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.head(self.conv(x.float() / 255).relu()).mean((2, 3))

    net, images = Pixels().eval(), torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    groups = scap_hub.channel_groups(net, images)
    plan = scap_hub.PruningPlan.from_keep(groups, {"conv": range(4)})
    assert scap_hub.verify(net, plan, images) < 1e-6
    with pytest.raises(VerificationError):
        scap_hub.verify(net, other_keep(plan, "head.weight", 1, "1-4"), images)


class Standardised(nn.Module):
    """Divides by the root of a buffer that is positive in every model."""

    def __init__(self, variance=1.0):
        super().__init__()
        self.register_buffer("variance", torch.full((8, 1, 1), variance))
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.head(self.conv(x) / self.variance.sqrt()).mean((2, 3))


def test_random_weights_keep_what_is_positive_so():
    net = randomize(Standardised().eval())
    assert net.variance.min() > 0 and net(IMAGES).isfinite().all()


def test_outputs_that_are_no_numbers_are_told():
    groups = scap_hub.channel_groups(Standardised(), IMAGES)
    plan = scap_hub.PruningPlan.from_keep(groups, {"conv": range(4)})
    assert scap_hub.verify(Standardised().eval(), plan, IMAGES) < 1e-9
    with pytest.raises(UnverifiableError, match="returns NaN or Inf"):
        scap_hub.verify(Standardised(-1.0).eval(), plan, IMAGES)


def test_a_model_that_reads_no_image_is_told():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return (self.conv(x) * 0).mean((2, 3)) + 3

    groups = scap_hub.channel_groups(Deaf(), IMAGES)
    with pytest.raises(UnverifiableError, match="the same for any input"):
        scap_hub.verify(Deaf(), scap_hub.PruningPlan.from_keep(groups, {}), IMAGES)
