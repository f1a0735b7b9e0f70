"""Trials of a pruned model without weights check each call once, and are few."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scap_hub import ChannelGroups, PruningPlan, channel_groups, select, verify
from scap_hub.channels import proof
from scap_hub.channels.oracle import randomize


class Heads(nn.Module):
    """Attention whose sizes are attributes, of which some never matter."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.heads, self.head_width, self.whole, self.label_width = 4, width // 4, width, width
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(1, -1, self.heads, self.head_width).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(1, -1, self.whole))


class Late(nn.Module):
    """Many layers before the ones that have to be tried, each of another class."""

    def __init__(self, kinds: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=4), *(nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU()) for _ in range(20))
        )
        self.heads = nn.Sequential(*(type(f"Heads{kind}", (Heads,), {})() for kind in range(kinds)))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).flatten(2).transpose(1, 2)
        return self.head((x + self.heads(x)).mean(1))


def proofs_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fills up with every run of a pruned model."""
    proofs: list[Any] = []
    run = proof.Proof.run
    monkeypatch.setattr(proof.Proof, "run", lambda self: (proofs.append(self), run(self))[1])
    return proofs


def pruned_exactly(model: nn.Module, groups: ChannelGroups, x: Tensor) -> PruningPlan:
    plan = select(groups, {group.name: torch.rand(group.size) for group in groups.prunable}, "ratio=0.5", round_to=1)
    assert verify(model, plan, x) < 1e-9
    return plan


def test_calls_before_a_failure_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: Counter[str] = Counter()
    check = proof.label

    def counting(found: Any, node: Any) -> Any:
        checked[node.name] += node.is_operator and node.name == "conv2d"
        return check(found, node)

    monkeypatch.setattr(proof, "label", counting)
    proofs = proofs_of(monkeypatch)
    model, x = randomize(Late()), torch.randn(1, 3, 32, 32)
    groups = channel_groups(model, x)
    assert checked["conv2d"] < 21 * len(proofs) / 2
    assert "heads.0" in pruned_exactly(model, groups, x).attributes


def test_classes_that_have_numbers_to_change_are_tried_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs, runs = proofs_of(monkeypatch), []
    for kinds in (1, 4):
        model, x = randomize(Late(kinds)), torch.randn(1, 3, 32, 32)
        groups = channel_groups(model, x)
        runs.append(len(proofs))
        plan = pruned_exactly(model, groups, x)
        assert {f"heads.{kind}" for kind in range(kinds)} <= {*plan.attributes, *plan.calls}
        proofs.clear()
    assert runs[1] < 1.5 * runs[0]
