"""Property-based: random compositions of channel operators, pruned at random, must equal the masked original."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.channels.oracle import randomize, verify
from tests.nets import random_plan


class Shuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Halves(nn.Module):
    """Splits into equal parts, works on one, and joins them the other way round."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        return torch.cat([right, self.conv(left)], dim=1)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


class Dense(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, 4, 1)
        self.merge = nn.Conv2d(width + 4, width, 1)

    def forward(self, x):
        return self.merge(torch.cat([x, self.conv(x)], dim=1))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class ChannelsLast(nn.Module):
    """The body of a ConvNeXt block."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = self.down(nn.functional.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Unfolds into patches, works on them, and folds them again."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(4 * width, 4 * width)

    def forward(self, x):
        patches = self.linear(nn.functional.unfold(x, 2, stride=2).transpose(1, 2))
        return nn.functional.fold(torch.relu(patches).transpose(1, 2), x.shape[2:], 2, stride=2)


BLOCKS = {
    "conv": lambda w: nn.Sequential(nn.Conv2d(w, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU()),
    "grouped": lambda w: nn.Conv2d(w, w, 3, padding=1, groups=2),
    "grouped4": lambda w: nn.Sequential(nn.Conv2d(w, w, 1, groups=4), nn.SiLU()),
    "depthwise": lambda w: nn.Conv2d(w, w, 3, padding=1, groups=w),
    "group_norm": lambda w: nn.GroupNorm(2, w),
    "shuffle": lambda w: Shuffle(),
    "halves": Halves,
    "residual": Residual,
    "dense": Dense,
    "gate": Gate,
    "channels_last": ChannelsLast,
    "pool": lambda w: nn.AvgPool2d(3, 1, 1),
    "windows": Windows,
}


class Net(nn.Module):
    def __init__(self, names, flatten):
        super().__init__()
        width = 16
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([BLOCKS[name](width) for name in names])
        self.flatten = flatten
        self.head = nn.Linear(width * 36 if flatten else width, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


@settings(max_examples=30, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5),
    flatten=st.booleans(),
    seed=st.integers(0, 2**16),
    ratio=st.sampled_from([None, 0.5]),
)
@example(names=["shuffle", "shuffle"], flatten=False, seed=3, ratio=None)
def test_random_networks_equal_their_masked_selves(names, flatten, seed, ratio):
    net = randomize(Net(names, flatten), seed).eval()
    x = torch.randn(2, 3, 6, 6)
    groups = channel_groups(net, x)
    plan = random_plan(groups, seed, ratio)
    assert plan.groups, "something of every such network can go"
    assert verify(net, plan, x) < 1e-9


@settings(max_examples=12, derandomize=True)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_groups_partition_the_channels_and_predict_macs(names, seed):
    from torch.utils.flop_counter import FlopCounterMode

    from scap_hub.surgery import apply_plan

    net = Net(names, flatten=False).eval()
    x = torch.randn(1, 3, 6, 6)
    groups = channel_groups(net, x)
    numbers = [number for group in groups for number in group.channels.tolist()]
    assert len(numbers) == len(set(numbers))
    plan = random_plan(groups, seed)
    partition = groups[0].whole.partition
    stays = torch.ones(partition.count, dtype=torch.bool).numpy()
    for group in groups:
        if group.name in plan.groups:
            stays[group.channels] = False
            stays[group.channels[plan.kept(group.name)]] = True
    small = apply_plan(net, plan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x)
    assert partition.macs(stays) * 2 == counter.get_total_flops()
    assert partition.params(stays) == sum(p.numel() for p in small.parameters())
