"""Each baseline against its plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.criteria import score
from scap_hub.errors import CalibrationError, ModelError, RecipeError
from tests.tapped_nets import group, tap

IMAGES = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def net():
    """Two layers whose channels are one group, so that scores are means over two layers, and a classifier."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = stem, body, nn.Linear(6, 5)

        def maps(self, x):
            x = self.stem(x)
            y = self.body(x)
            return x, y

        def forward(self, x):
            x, y = self.maps(x)
            return self.head((x + y).mean((2, 3)))

    model = Net().double().eval()
    for norm in (stem[1], body[1]):
        nn.init.normal_(norm.weight, 1, 0.5)
        nn.init.normal_(norm.bias)
    return model


def relative(*layers):
    return sum(values / values.mean() for values in layers).detach() / len(layers)


def formula(name, net):
    weights = [layer.weight.detach() for layer in (net.stem[0], net.body[0])]
    with torch.no_grad():
        maps = net.maps(IMAGES)
    if name in ("l1", "l2"):
        power = int(name[1])
        return relative(*((w.abs() ** power).sum((1, 2, 3)) ** (1 / power) for w in weights))
    if name == "bn_scale":
        return relative(net.stem[1].weight.abs(), net.body[1].weight.abs())
    if name == "fpgm":
        return relative(*(torch.stack([sum((a - b).norm() for b in w) for a in w]) for w in weights))
    if name == "activation":
        return relative(*(y.abs().mean((0, 2, 3)) for y in maps))
    if name == "hrank":
        ranks = [[torch.linalg.matrix_rank(y[n, k].float()) for k in range(6)] for y in maps for n in range(9)]
        return relative(*torch.tensor(ranks).double().unflatten(0, (2, 9)).mean(1))
    values = []
    for masked in (net.stem, net.body):
        mask = torch.ones(9, 6, 1, 1, dtype=torch.float64, requires_grad=True)
        handle = masked.register_forward_hook(lambda module, args, y, mask=mask: y * mask)
        logits = net(IMAGES)
        handle.remove()
        loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, mask)
        values.append(gradient.abs().mean(0).flatten())
    return relative(*values)


NAMES = ["l1", "l2", "bn_scale", "fpgm", "activation", "hrank", "taylor"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_plain_formula(name, net):
    (group,) = [group for group in channel_groups(net, IMAGES[:1]) if group.prunable]
    for batches in ([IMAGES], IMAGES.split(4)):
        torch.testing.assert_close(score(net, batches, name, groups=[group])["stem.0"], formula(name, net))


@pytest.mark.parametrize("name", [*NAMES, "scap"])
def test_every_normalisation(name, net):
    groups = channel_groups(net, IMAGES[:1])
    ranks = score(net, [IMAGES], name, groups=groups, normalisation="rank")["stem.0"]
    assert 0 < ranks.min() < ranks.max() < 1
    with pytest.raises(RecipeError, match="unknown normalisation 'ranks'"):
        score(net, [IMAGES], name, groups=groups, normalisation="ranks")


def test_taylor_uses_labels_where_there_are_any(net):
    groups = channel_groups(net, IMAGES[:1])
    own = net(IMAGES).argmax(1)
    other = (own + 1) % 5
    expected = score(net, [IMAGES], "taylor", groups=groups)["stem.0"]
    for batch in ((IMAGES, own), {"pixel_values": IMAGES, "labels": own}, (IMAGES,)):
        torch.testing.assert_close(score(net, [batch], "taylor", groups=groups)["stem.0"], expected)
    assert not torch.allclose(score(net, [(IMAGES, other)], "taylor", groups=groups)["stem.0"], expected)
    assert all(parameter.grad is None for parameter in net.parameters())


class Outputs(nn.Module):
    """Two outputs of very different size, no logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        maps = self.head(self.body(x).relu())
        return {"map": maps, "pair": (1000 * maps.mean((2, 3)), len(x))}


def test_taylor_of_any_outputs_is_that_of_their_norms():
    torch.manual_seed(0)
    net = Outputs().double()
    found = score(net, [IMAGES], "taylor", groups=channel_groups(net, IMAGES[:1]))["body"]
    mask = torch.ones(len(IMAGES), 6, 1, 1, dtype=torch.float64, requires_grad=True)
    handle = net.body.register_forward_hook(lambda module, args, y: y * mask)
    output = net(IMAGES)
    handle.remove()
    squares = [y.float().flatten(1).square().sum(1) for y in (output["map"], output["pair"][0])]
    loss = sum(own.sum() / own.mean().detach() for own in squares) / 2
    (gradient,) = torch.autograd.grad(loss, mask)
    torch.testing.assert_close(found, relative(gradient.abs().mean(0).flatten()), rtol=1e-4, atol=1e-6)


def test_frozen_models_have_gradients_too(net):
    groups = channel_groups(net, IMAGES[:1])
    expected = score(net, [IMAGES], "taylor", groups=groups)["stem.0"]
    with torch.no_grad():
        torch.testing.assert_close(
            score(net.requires_grad_(False), [IMAGES], "taylor", groups=groups)["stem.0"], expected
        )


def test_channels_without_a_norm_have_no_scale():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    groups = channel_groups(net, torch.randn(1, 3, 4, 4))
    assert list(score(net, [], "bn_scale", groups=groups)) == ["2"]
    with pytest.raises(ModelError, match="no channel passes a norm"):
        score(net, [], "bn_scale", groups=groups[:1])


@pytest.mark.parametrize("name", ["activation", "hrank", "taylor"])
def test_channels_without_spatial_extent(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 3, 2, 2)
    with torch.no_grad():
        net[1].bias[3] = -1e3
    scores = score(net, [x], name, groups=channel_groups(net, x[:1]))["1"]
    assert scores[3] == 0 and scores.isfinite().all() and (scores > 0).sum() > 4


@pytest.mark.parametrize("name", ["activation", "hrank", "taylor"])
def test_bad_images_are_refused(name):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    groups = [group(tap(model, "0", "1"))]
    with pytest.raises(CalibrationError, match="1 calibration image"):
        score(model, [torch.randn(1, 3, 8, 8)], name, groups=groups)
    with pytest.raises(CalibrationError, match="batch 1"):
        score(model, [torch.randn(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("nan"))], name, groups=groups)
