"""Pruned models that are pruned again: what the first round knew is kept, and what both removed is one plan."""

import copy
import json
import shutil
import warnings

import pytest
import timm
import torch
import transformers
from torch import nn

import scap_hub
from scap_hub.errors import CheckpointError, ModelError, PlanError, ScapHubError
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.plan import PruningPlan
from scap_hub.zoo import load_model
from tests.test_adapters import tiny_resnet
from tests.test_cli import run  # noqa: F401 - a fixture
from tests.test_pruning import QUICK, images

MEAN, STD, SIZE, LABELS = (0.1, 0.2, 0.3), (0.5, 0.4, 0.6), (3, 40, 40), ["ant", "bee", "cat"]
IMAGES = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))


def from_timm(folder):
    cfg = {"mean": MEAN, "std": STD, "input_size": SIZE, "crop_pct": 0.6, "interpolation": "bilinear"}
    return timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=cfg | {"label_names": LABELS})


def from_transformers(folder):
    tiny_resnet(id2label=dict(enumerate(LABELS)), num_labels=3).save_pretrained(folder)
    transformers.MobileNetV2ImageProcessor(
        size={"shortest_edge": 50}, crop_size={"height": 40, "width": 40}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return str(folder)


def random_plan(module, share, seed, size=SIZE):
    groups = scap_hub.channel_groups(module, torch.zeros(1, *size))
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in groups.prunable}
    return scap_hub.select(groups, scores, f"ratio={share}", round_to=1)


def answer(model, images=IMAGES):
    with torch.no_grad():
        found = model.eval()(images)
    return getattr(found, "logits", found)


@pytest.fixture(scope="module", params=[from_timm, from_transformers])
def first(request, tmp_path_factory):
    """(dense description, folder of the first round, its model)"""
    root = tmp_path_factory.mktemp("first")
    loaded = load_model(request.param(root / "dense"))
    assert (loaded.preprocessing.mean, loaded.preprocessing.input_size, loaded.labels) == (MEAN, SIZE, LABELS)
    plan = random_plan(loaded.module, 0.6, 0)
    small = scap_hub.apply_plan(loaded.module, plan)
    return loaded, save_checkpoint(root / "pruned", small, loaded, plan), small


def given(how, folder):
    return {
        "a folder": lambda: str(folder),
        "a module": lambda: scap_hub.load(folder),
        "a copy": lambda: copy.deepcopy(scap_hub.load(folder)),
    }[how]()


@pytest.mark.parametrize("how", ["a folder", "a module", pytest.param("a copy", marks=pytest.mark.slow)])
def test_a_second_round_keeps_what_the_first_knew(first, how, tmp_path):
    dense, folder, small = first
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = scap_hub.prune(
            given(how, folder), images(size=40, classes=3), QUICK, target="macs=0.9", repair_tune_steps=0
        )
    loaded = result.loaded
    assert torch.equal(answer(loaded.module), answer(small))
    for field in ("preprocessing", "labels", "num_classes", "name", "image_processor", "base_model"):
        assert getattr(loaded, field) == getattr(dense, field), field
    assert loaded.zoo is dense.zoo and loaded.config["num_classes" if "num_classes" in loaded.config else "id2label"]

    out = result.save_pretrained(tmp_path / "second")
    expected = answer(result.model)
    assert torch.equal(answer(load(out)), expected)
    assert torch.equal(answer(load_model(out).module), expected)
    if loaded.zoo.name == "timm":
        assert torch.equal(answer(timm.create_model(f"local-dir:{out}", pretrained=True)), expected)
    auto = transformers.AutoModelForImageClassification.from_pretrained(out)
    assert torch.equal(answer(auto), expected)
    assert [auto.config.id2label[index] for index in range(3)] == LABELS
    # The plan on disk is one for the dense model.
    plan = PruningPlan.from_json((out / "pruning_plan.json").read_bytes())
    again = scap_hub.apply_plan(dense.module, plan)
    shapes = {name: tensor.shape for name, tensor in result.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    third = load_model(out)
    assert (third.preprocessing, third.labels, third.earlier) == (dense.preprocessing, dense.labels, plan)
    assert "pruned before" in (out / "README.md").read_text()


def test_what_a_run_gives_back_can_be_pruned_again(first, tmp_path):
    dense = first[0]
    once = scap_hub.prune(dense.module, images(size=40, classes=3), QUICK, target="macs=0.8", model_input_size=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        twice = scap_hub.prune(once.model, images(size=40, classes=3), QUICK, target="macs=0.8", repair_tune_steps=0)
    assert (twice.loaded.earlier, twice.loaded.preprocessing) == (once.plan, once.loaded.preprocessing)
    out = twice.save_pretrained(tmp_path / "twice")
    assert torch.equal(answer(load(out)), answer(twice.model))
    plan = PruningPlan.from_json((out / "pruning_plan.json").read_bytes())
    assert plan == once.plan.then(twice.plan)
    shapes = {name: tensor.shape for name, tensor in twice.model.state_dict().items()}
    again = scap_hub.apply_plan(dense.module, plan)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


def test_what_pruning_says_of_a_loaded_module_is_true(first, tmp_path):
    dense, folder, _ = first
    module = scap_hub.load(folder)
    # By hand, step by step, it is another model than the folder's: preprocessing and labels stay.
    other = scap_hub.apply_plan(module, random_plan(module, 0.5, 1))
    with pytest.warns(UserWarning, match="not rebuilt by name"):
        loaded = load_model(other)
    assert (loaded.preprocessing, loaded.labels, loaded.earlier) == (dense.preprocessing, LABELS, None)
    with pytest.raises(ModelError, match="3 classes, not 5"):
        load_model(folder, num_classes=5)
    with pytest.raises(ModelError, match="3 channels"):
        load_model(folder, input_size=(1, 40, 40))
    for source in (folder, module):
        sized = load_model(source, input_size=(3, 48, 48))
        assert sized.preprocessing.input_size == (3, 48, 48) and sized.preprocessing.mean == MEAN
        plan = random_plan(sized.module, 0.7, 2)
        out = save_checkpoint(tmp_path / type(source).__name__, scap_hub.apply_plan(sized.module, plan), sized, plan)
        assert load_model(out).preprocessing == sized.preprocessing
    assert not torch.equal(answer(load_model(folder, pretrained=False).module), answer(module))


@pytest.mark.parametrize("entry", [{"input_size": 5}, {"input_size": "abc"}, {"mean": None}, {"std": ["a", 1, 1]}])
def test_preprocessing_that_cannot_be_is_refused(first, entry, tmp_path):
    folder = shutil.copytree(first[1], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["scap"]["preprocessing"].update(entry)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'preprocessing' in config"):
        load(folder)


def test_a_pruned_model_that_timm_loaded_keeps_its_preprocessing(tmp_path):
    loaded = load_model(from_timm(None))
    plan = random_plan(loaded.module, 0.6, 0)
    out = save_checkpoint(tmp_path / "out", scap_hub.apply_plan(loaded.module, plan), loaded, plan)
    module = timm.create_model(f"local-dir:{out}", pretrained=True)
    with pytest.warns(UserWarning, match="scap_hub.load"):
        again = load_model(module)
    assert (again.preprocessing, again.labels) == (loaded.preprocessing, LABELS)
    assert not again.zoo.rebuilds


class Literal(nn.Module):
    """A size that stands in the code, and grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4)
        self.last = nn.Conv2d(32, 12, 1)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x):
        x = self.last(self.grouped(self.stem(x).relu()).relu()).relu()
        return self.head(x.view(-1, 192))


def test_a_module_of_one_s_own_goes_two_rounds(tmp_path):
    size, net = (3, 8, 8), Literal().eval()
    inputs = torch.randn(2, *size)
    loaded = load_model(net, input_size=size, labels=list("abcde"))
    one = random_plan(net, 0.6, 0, size)
    out = save_checkpoint(tmp_path / "one", scap_hub.apply_plan(net, one), loaded, one)
    module = scap_hub.load(out, model=net)
    again = load_model(module)
    assert (again.preprocessing, again.labels) == (loaded.preprocessing, list("abcde"))
    two = random_plan(module, 0.6, 1, size)
    small = scap_hub.apply_plan(module, two)
    second = save_checkpoint(tmp_path / "two", small, again, two)
    assert torch.equal(answer(load(second, model=net), inputs), answer(small, inputs))
    with pytest.raises(ModelError, match=r"already pruned, .*model=dense"):
        load_model(second)
    # A new head is no longer what the folder rebuilds.
    module.head = nn.Linear(module.head.in_features, 4)
    with pytest.warns(UserWarning, match="'head.weight'"):
        changed = load_model(module)
    assert (changed.earlier, changed.labels, changed.num_classes) == (None, None, 4)


class Borrowed(nn.Module):
    """One layer's maps are reshaped by the width of another's, as in the attention of SegFormer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1)
        self.last, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.first(x).relu()
        batch, channels, _, _ = x.shape
        return self.head(self.last(self.second(x).reshape(batch, channels, -1).mean(2)))


def test_a_width_that_the_first_round_put_right_follows_the_second():
    """Also where the number that arrives is right by itself in the second round."""
    size, net = (3, 8, 8), Borrowed().eval()
    inputs = torch.randn(2, *size)
    for widths in ((5, 5), (5, 4), (6, 4), (8, 6)):
        first = scap_hub.channel_groups(net, inputs).cut({"first": range(8), "second": range(6)})
        small = scap_hub.apply_plan(net, first)
        keep = {name: range(width) for name, width in zip(("first", "second"), widths, strict=True)}
        later = scap_hub.channel_groups(small, inputs).cut(keep)
        smaller = scap_hub.apply_plan(small, later)
        assert scap_hub.verify(small, later, inputs) < 1e-9
        assert torch.equal(answer(scap_hub.apply_plan(net, first.then(later)), inputs), answer(smaller, inputs))


@pytest.mark.parametrize("name", ["test_vit", "test_byobnet", "test_convnext", "test_efficientnet", "grouped"])
def test_one_plan_does_what_two_do(name):
    size = (3, 8, 8) if name == "grouped" else (3, 96, 96)
    inputs = torch.randn(1, *size)
    dense = Literal().eval() if name == "grouped" else timm.create_model(name).eval()
    first = random_plan(dense, 0.7, 0, size)
    small = scap_hub.apply_plan(dense, first)
    later = random_plan(small, 0.6, 1, size)
    both = PruningPlan.from_json(first.then(later).to_json())
    assert torch.equal(
        answer(scap_hub.apply_plan(dense, both), inputs), answer(scap_hub.apply_plan(small, later), inputs)
    )
    if later.groups:
        with pytest.raises(PlanError, match="next plan was made for"):
            later.then(first)


def test_the_command_line_takes_a_pruned_folder(first, run, tmp_path):  # noqa: F811
    _, folder, small = first
    code, out, error = run("inspect", folder, "--json")
    assert code == 0, error
    width = scap_hub.channel_groups(small, torch.zeros(1, *SIZE))
    assert {row["name"]: row["size"] for row in json.loads(out)} == {group.name: group.size for group in width}
    code, out, error = run("verify", folder, "--plans", 1, "--json", "--out", tmp_path / "failing.json")
    assert code == 0 and max(json.loads(out).values()) < 1e-6, error
    code, out, error = run("bench", folder, "--batch", 1, "--json")
    assert code == 0, error
    assert scap_hub.channel_groups(str(folder)).by_name.keys() == width.by_name.keys()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((folder / "config.json").read_text())
    code, _, error = run("inspect", tmp_path / "broken")
    assert code == 2 and "already pruned" in error
    with pytest.raises(ScapHubError):
        load_model(tmp_path / "broken")
