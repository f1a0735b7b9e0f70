"""Whole runs on a part of a model: torchvision's detectors, whose control flow depends on values."""

import json

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD

import scap_hub
from scap_hub.channels import oracle
from scap_hub.errors import ModelError, RecipeError, VerificationError

IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
QUICK = {
    "target": "macs=0.6",
    "criterion": "l1",
    "finetune_epochs": 0,
    "repair_tune": {"steps": 5},
    "evaluate_latency": False,
    "target_round_to": 1,
}


class Body(nn.Sequential):
    """Three convolutions; its last channels are what the detector reads."""

    def __init__(self, channels=8):
        convolutions = [nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 2, 1), nn.Conv2d(12, channels, 3, 2, 1)]
        super().__init__(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.out_channels = channels


def detector(kind, seed=0):
    torch.manual_seed(seed)
    sizes = {"min_size": 32, "max_size": 32}
    if kind is SSD:
        boxes = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
        body = Body()
        body.out_channels = [8]  # an SSD reads several maps
        return SSD(body, boxes, (32, 32), 3, score_thresh=0.0, detections_per_img=5).eval()
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    if kind in (RetinaNet, FCOS):
        body = Body(32 if kind is FCOS else 8)  # its norms are of 32 groups
        return kind(body, 3, anchor_generator=anchors, score_thresh=0.0, detections_per_img=5, **sizes).eval()
    heads = {"num_classes": 3} if kind is FasterRCNN else {"box_predictor": FastRCNNPredictor(1024, 3)}
    if kind is MaskRCNN:
        heads |= {"mask_head": MaskRCNNHeads(8, (8,), 1), "mask_predictor": MaskRCNNPredictor(8, 8, 3)}
    if kind is KeypointRCNN:
        heads |= {"keypoint_head": KeypointRCNNHeads(8, (8,)), "keypoint_predictor": KeypointRCNNPredictor(8, 2)}
    return kind(
        Body(), rpn_anchor_generator=anchors, box_score_thresh=0.0, box_detections_per_img=5,
        rpn_post_nms_top_n_test=20, **heads, **sizes,
    ).eval()  # fmt: skip


def loader(labels=()):
    return DataLoader(TensorDataset(IMAGES, *labels), batch_size=6)


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet, SSD])
def test_a_detector_is_pruned_by_its_backbone(kind, tmp_path):
    dense = detector(kind)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    result = scap_hub.prune(dense, loader(), part="backbone", output_dir=tmp_path / "out", **QUICK)
    assert isinstance(result.model, kind)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    assert result.report.verified < 1e-9
    assert 0 < result.report.after.top1 < 1  # relative error of the part's outputs, once repaired
    whole, rest = result.report.whole, sum(w.numel() for w in dense.parameters())
    assert (whole.part, whole.params[0]) == ("backbone", rest)
    assert whole.params[1] == sum(w.numel() for w in result.model.parameters()) < rest
    assert any("part 'backbone'" in note for note in result.report.notes())
    # Only the part has changed, and the file holds the whole.
    others = [name for name in before if not name.startswith("backbone.")]
    assert all(torch.equal(before[name], result.model.state_dict()[name]) for name in others)
    again = scap_hub.load(tmp_path / "out", model=detector(kind, seed=1))
    ours, theirs = result.model(IMAGES[:2])[1], again(IMAGES[:2])[1]
    assert len(ours["boxes"]) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "`backbone` alone was pruned" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_given_to_the_part_counts_not_the_image():
    """The detector normalises images; calibration follows, so repair fits what the backbone is really given."""
    dense = detector(FasterRCNN)
    result = scap_hub.prune(dense, loader(), part="backbone", **{**QUICK, "repair_tune": {"steps": 0}})
    given = dense.transform(list(IMAGES))[0].tensors
    with torch.no_grad():
        wanted, repaired = dense.backbone(given), result.model.backbone(given)
        bare = scap_hub.apply_plan(dense, result.plan).backbone(given)
    spread = (wanted - wanted.mean(0)).square().sum()
    error = float((repaired - wanted).square().sum() / spread)
    assert error == pytest.approx(result.report.after.top1, rel=1e-3)
    assert error < 0.5 * float((bare - wanted).square().sum() / spread)


def test_the_error_without_a_part_offers_the_backbone_first():
    with pytest.raises(ModelError, match=r"boxes by their scores.*by themselves: part='backbone'"):
        scap_hub.prune(detector(FasterRCNN), loader(), **QUICK)


def oneformer():
    """OneFormer, as it is without the question that it wants beside the images."""
    body = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.OneFormerConfig(
        backbone_config=body, num_queries=4, task_seq_len=4, conv_dim=32, mask_dim=32, hidden_dim=32, num_labels=3,
        encoder_feedforward_dim=48, encoder_layers=1, decoder_layers=3, num_attention_heads=4, dim_feedforward=48,
    )  # fmt: skip
    return transformers.OneFormerForUniversalSegmentation(config).eval()


class Asked(nn.Module):
    """OneFormer with the same question for all images."""

    def __init__(self):
        super().__init__()
        self.model = oneformer()
        self.register_buffer("question", torch.arange(4.0)[None])

    def forward(self, images):
        return self.model(images, self.question.expand(len(images), -1))


PIXELS = "model.model.pixel_level_module"
LARGER = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_parts_of_a_transformers_model_are_offered():
    """This one lies below a wrapper, and wants values when it is recorded."""
    with pytest.raises(ModelError, match=f"values of the input.*by themselves: part='{PIXELS}'"):
        scap_hub.channel_groups(Asked(), LARGER[:1])


@pytest.mark.slow
def test_the_part_that_is_offered_of_a_transformers_model_is_pruned():
    """It is called with a flag beside the images."""
    data = DataLoader(TensorDataset(LARGER), batch_size=4)
    result = scap_hub.prune(Asked(), data, part=PIXELS, **{**QUICK, "repair_tune": {"steps": 0}})
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    assert result.report.verified < 1e-9
    assert result.report.whole.part == PIXELS
    assert result.model(LARGER[:2]).class_queries_logits.shape == (2, 4, 4)


def test_a_part_that_is_called_with_a_setting_beside_its_tensor():
    class Halving(Body):
        def forward(self, x, halved):
            return super().forward(x) / (2 if halved else 1)

    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Halving()

        def forward(self, x):
            found = self.body(x, True)
            return found[found.mean((1, 2, 3)) > -9]

    with pytest.raises(ModelError, match="part='body'"):
        scap_hub.channel_groups(Flagged(), IMAGES)
    result = scap_hub.prune(Flagged(), loader(), part="body", **QUICK)
    assert result.report.verified < 1e-9


def test_a_model_that_wants_more_than_images_is_told_so():
    with pytest.raises(ModelError, match=r"takes 'task_inputs' beside the images: give a module of your own"):
        scap_hub.prune(oneformer(), loader(), **QUICK)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"part": "neck"}, ModelError, "has no part 'neck': its parts are 'transform', 'backbone'"),
        ({"part": "rpn"}, ModelError, "is called with .* choose a part before it, such as the backbone"),
        ({"part": "roi_heads.box_head"}, ModelError, "a row for each image"),
        ({"part": "backbone", "task": "outputs"}, RecipeError, "measured by its outputs, so leave out task"),
        ({"part": "backbone", "deploy_int8": True}, RecipeError, "no deploy.int8"),
    ],
)
def test_parts_that_a_run_cannot_take(options, error, message):
    with pytest.raises(error, match=message):
        scap_hub.prune(detector(FasterRCNN), loader(), **{**QUICK, **options})


def test_a_part_whose_weights_others_use():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)
            self.other.weight = self.body[1].weight

        def forward(self, x):
            return self.other(self.body(x))

    with pytest.raises(ModelError, match="'other' uses weights of the part 'body' too"):
        scap_hub.prune(Tied(), loader(), part="body", **QUICK)


def test_several_sizes_and_a_training_of_a_part():
    """Two steps of a schedule, each trained towards the dense part's outputs."""
    options = {**QUICK, "finetune_epochs": 1, "schedule_steps": 2}
    del options["target"]
    family = scap_hub.prune_family(
        detector(RetinaNet), loader(), part="backbone", targets=["macs=0.8", "macs=0.5"], **options
    )
    sizes = [sum(w.numel() for w in member.model.parameters()) for member in family.members.values()]
    assert all(isinstance(member.model, RetinaNet) for member in family.members.values())
    assert sizes[0] > sizes[1]
    assert all(member.report.history for member in family.members.values())


def test_criteria_are_compared_on_a_part():
    options = {key: value for key, value in QUICK.items() if key not in ("target", "criterion")}
    splits = {"train": loader(), "validation": loader()}
    found = scap_hub.compare(
        detector(SSD), splits, part="backbone", criteria=["l1", "taylor"], targets=["macs=0.6"], seeds=2, **options
    )
    assert [cell for cell in found.cells if 0 < cell["validation"] < 1 and cell["macs"] <= 0.6] == found.cells
    assert len(found.cells) == 4


def test_a_part_of_a_model_with_a_name_is_rebuilt_and_taken_up(tmp_path):
    name, part = "test_resnet", "layer2"
    options = {**QUICK, "model_pretrained": False, "model_input_size": (3, 32, 32)}
    found = scap_hub.forecast(name, loader(), part=part, **options)
    assert found.groups and found.macs[0] > found.macs[1]
    result = scap_hub.prune(name, loader(), part=part, output_dir=tmp_path / "out", **options)
    again = scap_hub.load(tmp_path / "out")
    assert torch.equal(again(IMAGES), result.model(IMAGES))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["whole"]["part"] == part
    second = scap_hub.prune(tmp_path / "out", loader(), output_dir=tmp_path / "again", **{**options, "part": part})
    twice = scap_hub.load(tmp_path / "again")
    assert torch.equal(twice(IMAGES), second.model(IMAGES))
    assert second.report.whole.params[1] < result.report.whole.params[1]


class Ties(nn.Module):
    """Returns as many numbers as rounding makes larger than others that are equal: boxes of equal scores, in short."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))

    def forward(self, x):
        maps = self.body(x)
        return maps.flatten()[(maps.sum(1) > maps.flip(1).sum(1)).repeat(1, 16, 1, 1).flatten()]


def ties(monkeypatch):
    """With a plan, and the masked part rounded otherwise than the pruned one, as another BLAS would."""
    exact, net = oracle.masked_output, Ties()
    noise = torch.Generator().manual_seed(0)

    def rounded(*given):
        return [y * (1 + 2e-16 * torch.randn(y.shape, generator=noise, dtype=y.dtype)) for y in exact(*given)]

    monkeypatch.setattr(oracle, "masked_output", rounded)
    groups = scap_hub.channel_groups(net, IMAGES[:1], part="body")
    return net, scap_hub.PruningPlan.from_keep(groups, {"body.0": range(1, 16, 2)})


def test_a_choice_that_rounding_makes_is_compared_at_the_part(monkeypatch):
    net, plan = ties(monkeypatch)
    found = oracle.compare_whole(net, plan, (IMAGES[:1],), "body")
    assert 0 < found.difference < 1e-9
    assert not found.outputs


def test_a_wrong_plan_is_seen_where_a_choice_hides_it(monkeypatch):
    net, plan = ties(monkeypatch)
    small = oracle.apply_plan
    swapped = [1, 0, *range(2, 16)]

    def wrong(model, plan):
        pruned = small(model, plan)
        pruned.body[2].weight.data = pruned.body[2].weight.data[swapped]
        return pruned

    monkeypatch.setattr(oracle, "apply_plan", wrong)
    with pytest.raises(VerificationError, match="with its part 'body' pruned the whole model differs"):
        oracle.compare_whole(net, plan, (IMAGES[:1],), "body")
