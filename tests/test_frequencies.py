"""Filters that make errors of a layer count as the gradients of the model's outputs do."""

import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scap_hub import channel_groups, score
from scap_hub.criteria import ScapSet
from scap_hub.criteria.frequencies import filtered, power_spectrum
from scap_hub.criteria.scap.outputs import Outputs
from scap_hub.criteria.variance import inverse_variances


def low_pass(height: int, width: int) -> torch.Tensor:
    rows, columns = (torch.fft.fftfreq(size).abs() for size in (height, width))
    return (1 / (1e-2 + rows[:, None] ** 2 + columns**2)).double()


@settings(max_examples=40)
@given(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(3, 9), st.integers(3, 9), st.integers(0, 2**31 - 1))
def test_a_filtered_input_gives_the_filtered_output(stride, kernel, height, width, seed):
    """By another way: the output of a convolution without borders, filtered by the amplitude of its own grid."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(2, 3, kernel, stride, padding_mode="circular", padding=kernel // 2, bias=True).double()
    x = torch.randn(2, 2, stride * height, stride * width).double()
    y = layer(x)
    assert y.shape[2:] == (height, width)
    power = torch.rand(height, width).double() + 0.1
    power = power + power.flip(0, 1).roll((1, 1), (0, 1))  # as that of real maps
    smooth, constant = filtered(layer, x, power)
    amplitude = (power / power.mean()).sqrt()
    wanted = torch.fft.ifft2(torch.fft.fft2(y) * amplitude).real
    found = F.conv2d(F.pad(smooth, [kernel // 2] * 4, mode="circular"), layer.weight, stride=stride)
    torch.testing.assert_close(found + constant * layer.bias[:, None, None], wanted)


def test_a_white_spectrum_or_none_changes_nothing():
    layer, x = nn.Conv2d(2, 3, 3, 2, 1), torch.randn(2, 2, 9, 7)
    torch.testing.assert_close(filtered(layer, x, torch.full((5, 4), 3.0).double())[0], x)
    for power in (None, torch.zeros(5, 4), torch.ones(5)):
        assert filtered(layer, x, power) == (x, 1.0)
    last = nn.Linear(2, 3)
    torch.testing.assert_close(filtered(last, x.movedim(1, -1), torch.ones(9, 7).double())[0], x.movedim(1, -1))


def test_grids_that_do_not_match_are_interpolated():
    """The smooth amplitude of a grid of 8, on one of 10, is about that of a grid of 10."""
    layer, x = nn.Conv2d(1, 1, 3), torch.randn(1, 1, 10, 10).double()
    found, _ = filtered(layer, x, low_pass(8, 8))
    wanted, _ = filtered(layer, x, low_pass(10, 10))
    scale = (found * wanted).sum() / wanted.square().sum()
    assert (found - scale * wanted).norm() < 0.15 * found.norm()


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)])
def test_what_is_no_map_has_no_spectrum(layer):
    one = torch.randn(2, 5, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 1, 1)
    assert power_spectrum(layer, one) is None


class InPlace(nn.Module):
    """Writes over what its first layer computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 64, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(self.act(self.first(x)).flatten(1))


@pytest.mark.parametrize("together", [1, 5])
def test_gradients_are_those_before_a_value_is_written_over(together):
    """Finite differences know nothing of hooks: the power at all frequencies together is the gradient's energy."""
    torch.manual_seed(0)
    net, images = InPlace().double().eval(), torch.randn(12, 3, 8, 8).double()
    outputs = Outputs(net, [images], 7, 12, together)
    found = outputs.powers(["first", "head"])
    scale = inverse_variances([[net(images).detach()]])[0]
    assert set(found) == {"first"} and found["first"].shape == (8, 8)
    step, energy = 1e-6, 0.0
    for image in images.split(1):
        y = net.first(image).detach()
        jacobian = torch.stack(
            [
                (net.head((y + step * unit).relu().flatten(1)) - net.head(y.relu().flatten(1)))[0] / step
                for unit in torch.eye(y.numel()).double().reshape(-1, *y.shape)
            ]
        ).detach()  # (6 * 64, 2)
        drawn = torch.Generator().manual_seed(zlib.crc32(image.float().numpy().tobytes()))
        signs = torch.randint(2, (2,), generator=drawn) * 2 - 1
        energy += scale * float((jacobian @ signs.double()).square().sum())
    assert float(found["first"].sum()) == pytest.approx(energy, rel=1e-4)


def test_what_the_outputs_cannot_see_does_not_count():
    """Behind global pooling only the mean of a map counts, so channels that differ in fine texture alone are alike."""
    torch.manual_seed(0)

    class Textures(nn.Module):
        """Two channels of faint brightness and two of strong texture, which the pooling takes away."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 6, 1)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1  # a chequerboard, its mean is 0
            y = self.first(x)
            y = torch.cat([y[:, :2], 30 * board * y[:, 2:]], 1)
            return self.head(self.second(y).mean((2, 3)))

    net = Textures().eval()
    images = [torch.randn(8, 2, 1, 1).expand(8, 2, 8, 8) + torch.zeros(8, 2, 8, 8) for _ in range(4)]
    group = next(group for group in channel_groups(net, images[0]) if group.name == "first")
    seen = score(net, images, ScapSet(), groups=[group])["first"]
    assert seen[:2].min() > seen[2:].max()
    alike = score(net, images, ScapSet(frequency_weights=False), groups=[group])["first"]
    assert alike[:2].min() < alike[2:].max()
