"""Small nets with channel groups built by hand."""

import numpy as np
import torch
from torch import nn

from scap_hub.channels.groups import ChannelGroup, Tap


def tap(model, module, output=None, post=(), dim=1, rows=None):
    weight = f"{module}.weight" if module else "weight"
    rows = np.arange(len(model.get_parameter(weight))) if rows is None else np.asarray(rows)
    return Tap(module, weight, rows, module if output is None else output, tuple(post), dim)


def group(*taps, size=None, prunable=True):
    size = size or max(t.channel_of_row.max() for t in taps) + 1
    names = tuple(t.module for t in taps)
    reason = None if prunable else "test"
    return ChannelGroup(names[0], int(size), names, (), (), None, prunable, reason, taps, np.arange(size), None)


def plain(seed=0, width=(6, 8)):
    """Two convolutions with norms; groups "0" and "3"."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width[0], 3, padding=1),
        nn.BatchNorm2d(width[0]),
        nn.ReLU(inplace=True),
        nn.Conv2d(width[0], width[1], 3, stride=2, padding=1),
        nn.BatchNorm2d(width[1]),
        nn.ReLU(inplace=True),
    ).eval()
    return model, [group(tap(model, "0", "2")), group(tap(model, "3", "5"))]
