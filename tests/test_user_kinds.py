"""Small networks of kinds that people write, each of which once ended in a wrong refusal, a bare error or a pin."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

import scap_hub
from tests.small_cases import Body, free, image, pruned_exactly, some_plan

KEPT = (torch.arange(16) % 3 > 0).view(1, 16, 1, 1)


class Scaled(nn.Module):
    """Knows its width; its own tensors do not have it."""

    def __init__(self):
        super().__init__()
        self.channels, self.temperature = 16, nn.Parameter(torch.ones(2))

    def forward(self, x):
        return (x.view(-1, self.channels, 64) * self.temperature[0]).view(-1, self.channels, 8, 8)


class Ternary(torch.autograd.Function):
    """A weight that is computed by a function with a gradient of its own."""

    @staticmethod
    def forward(ctx, weight):
        return weight.sign() * 0.5

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def shared_linear(net, y):
    inner = F.linear(y.permute(0, 2, 3, 1), net.tied.weight).relu()
    return y + F.linear(inner, net.tied.weight.t()).permute(0, 3, 1, 2)


def other_names(net, y):
    z = torch.multiply(torch.subtract(y, torch.absolute(net.conv(y))), torch.true_divide(y, 2))
    return torch.max(z, torch.atan(y)).clip(-3, 3)


def gates_by_class(net, y):
    picked = F.one_hot(net.gate(y).mean((2, 3)).argmax(1), 16).to(y.dtype)
    return y + (net.rows * picked.unsqueeze(1)).sum(2)[..., None, None]


FREE = {
    "a bias that is not used": (shared_linear, {"tied": nn.Linear(16, 10)}, ("all",)),
    "a weight from a function of one's own": (
        lambda net, y: F.conv2d(y, Ternary.apply(net.conv.weight), padding=1),
        {"conv": nn.Conv2d(16, 16, 3, padding=1)},
        ("all",),
    ),
    "a width beside tensors that stay": (lambda net, y: net.scaled(y), {"scaled": Scaled()}, None),
    "the weights of another layer": (
        lambda net, y: functional_call(net.shape, dict(net.conv.named_parameters()), (y,)),
        {"shape": nn.Conv2d(16, 16, 1), "conv": nn.Conv2d(16, 16, 1)},
        None,
    ),
    "a mask of booleans": (lambda net, y: torch.where(net.kept, y, -y) + y * (~net.kept), {"kept": KEPT}, None),
    "two groups of the model's own matrix": (
        lambda net, y: torch.cat([part.tanh() for part in F.conv2d(y, net.matrix).split([4, 12], 1)], 1),
        {"matrix": nn.Parameter(torch.randn(16, 16, 1, 1))},
        ("all",),
    ),
    "other names of operators": (other_names, {"conv": nn.Conv2d(16, 16, 1)}, None),
}


@pytest.mark.parametrize("name", FREE)
def test_what_can_be_pruned_is(name):
    change, layers, checks = FREE[name]
    net = Body(lambda net, x: net.head(net.b(change(net, net.a(x).relu()))), **layers)
    groups = pruned_exactly(net, image(), checks=checks or ("readers", "all"))
    assert {"a", "b"} <= free(groups)


HELD = {
    "numbers of another size": (lambda net, y: y.view(torch.complex128).real.repeat_interleave(2, -1), {}, "size"),
    "channels chosen by a mask": (
        lambda net, y: net.narrow(y[:, net.kept]),
        {"kept": KEPT.flatten(), "narrow": nn.Conv2d(10, 16, 1)},
        "index",
    ),
    "channels counted from the end": (
        lambda net, y: y[:, net.order],
        {"order": torch.tensor([-1, *range(1, 15), 0])},
        "index",
    ),
    "channel numbers with another use": (
        lambda net, y: y[:, net.order][:, :, net.order[:8] % 8],
        {"order": torch.arange(15, -1, -1)},
        "another use",
    ),
    "rows chosen by class": (
        gates_by_class,
        {"gate": nn.Conv2d(16, 16, 1), "rows": nn.Parameter(torch.randn(1, 16, 16))},
        "",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_what_cannot_be_pruned_holds_nothing_else(name):
    change, layers, reason = HELD[name]
    net = Body(lambda net, x: net.head(net.b(change(net, net.a(x).relu()))), **layers).double()
    groups = pruned_exactly(net, image().double(), checks=("all",))
    assert "b" in free(groups)
    assert any(reason in (group.pinned_because or "") for group in groups)


def test_a_number_of_a_width_holds_only_what_it_counts():
    """All of it is one `forward`; what else that computes can go."""

    def forward(net, x):
        y, z = net.a(x).relu(), net.c(x)
        return net.head(net.b(y / y.shape[1]) * net.d(z))

    layers = {"c": nn.Conv2d(3, 10, 3, padding=1), "d": nn.Conv2d(10, 12, 1)}
    groups = pruned_exactly(Body(forward, **layers), image(), checks=("all",))
    assert free(groups) == {"b", "c", "d"}
    reasons = {group.name: group.pinned_because for group in groups}
    assert reasons["a"] == "is counted by a number fixed in '', or changes what it computes"


def test_channels_that_only_leave_together_are_no_single_channel():
    groups = pruned_exactly(Body(lambda net, x: net.head(net.b((y := net.a(x)) + y.roll(1, 1)))), image())
    reasons = {group.name: group.pinned_because for group in groups}
    assert reasons["a"] == "has 16 channels that could only leave together"


def test_what_cannot_be_recorded_is_an_error_of_ours():
    net = Body(lambda net, x: vmap(lambda one: net.h(net.b(net.a(one)).mean((1, 2))))(x))
    with pytest.raises(scap_hub.ScapHubError, match="cannot capture Body"):
        scap_hub.channel_groups(net, (image(),))


def flips_halves(net, x):
    y = net.a(x).relu()
    images, _, height, width = y.shape
    y = y.view(images, 2, 8, height * width).flip(1).reshape(images, 16, height, width)
    return net.head(net.b(y))


def test_a_pruned_model_is_traced_with_its_new_numbers():
    net = Body(flips_halves)
    groups = pruned_exactly(net, image())
    small = scap_hub.apply_plan(net, some_plan(groups)).eval()
    traced = torch.jit.trace(small, (image(),), check_trace=False)
    more = torch.randn(3, 3, 8, 8)
    assert torch.equal(traced(more), small(more))


def test_repair_leaves_a_layer_alone_whose_outputs_a_hook_changes():
    net = Body()
    net.b.register_forward_hook(lambda layer, inputs, output: 2 * output)
    groups = pruned_exactly(net, image())
    plan = some_plan(groups)
    small = scap_hub.apply_plan(net, plan).eval()
    hooked, head = small.b.weight.clone(), small.h.weight.clone()
    scap_hub.repair(net, small, plan, [image()])
    assert torch.equal(small.b.weight, hooked) and not torch.equal(small.h.weight, head)


class Two(nn.Module):
    """Two layers in one module, equally wide."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return F.linear(F.linear(x, self.up).relu(), self.down).relu()


def test_channels_inside_a_module_are_not_watched_at_its_ends():
    net = Body(lambda net, x: net.head(net.b(net.two(net.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))), two=Two())
    groups = pruned_exactly(net, image(), readers={"two.up": 1, "two.down": 1})
    assert {"a", "two", "b"} <= free(groups)
    watched = {tap.weight for group in groups for tap in group.taps}
    assert watched >= {"a.weight", "b.weight"} and not watched & {"two.up", "two.down"}


def test_a_model_with_a_matrix_of_its_own_is_pruned_to_the_end():
    change, layers, _ = FREE["two groups of the model's own matrix"]
    net = Body(lambda net, x: net.head(net.b(change(net, net.a(x).relu()))), **layers)
    pairs = torch.utils.data.TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,)))
    data = torch.utils.data.DataLoader(pairs, batch_size=8)
    settings = {"dataset": data, "target": "macs=0.6", "model_input_size": [3, 8, 8], "finetune_epochs": 0}
    result = scap_hub.prune(net, criterion="l1", **settings)
    assert result.report.after.macs < 0.65 * result.report.before.macs
