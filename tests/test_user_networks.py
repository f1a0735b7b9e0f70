"""Random networks as people write them: every plan that the library hands out is exact, or there is none.

`python -m tests.test_user_networks [SEEDS]` prints what happened by construct.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import scap_hub
from tests.independent import TOLERANCE, copied, difference, double, leaves, plans, reference
from tests.user_networks import BLOCKS, OUTPUTS, Network, network

FAULTS = (
    "silently wrong",  # the pruned model differs, and verify says that it does not
    "wrong",  # the pruned model differs or does not run, and verify says so
    "wrong in training",  # equal in eval mode, but not in training mode
    "raw error",  # an error that is not ours
    "wrongly accused",  # the pruned model is right, and verify says that it is not
)
"""What must not happen, the worst first."""
FINE = ("exact", "same shapes", "refused", "pinned")
"""What may: equal by the independent check; only shapes could be compared; one of our errors; nothing to prune."""


@dataclass(frozen=True)
class Outcome:
    """What became of one plan, or of a network that has none."""

    kind: str
    network: Network
    plan: str = ""
    detail: str = ""

    def __str__(self) -> str:
        n = self.network
        return f"{self.kind}: seed {n.seed}, {' + '.join(n.constructs)}, plan {self.plan!r}: {self.detail}\n{n.source}"


def outcomes(net: Network, singles: int = 2) -> Iterator[Outcome]:
    """Tries a network with several plans."""
    try:
        groups = scap_hub.channel_groups(net.module, net.inputs)
    except Exception as error:
        yield _error(error, net, "groups")
        return
    if not any(group.prunable for group in groups):
        yield Outcome("pinned", net)
        return
    for name, plan in plans(groups, net.seed, singles):
        if isinstance(plan, Exception):
            yield _error(plan, net, name)
        else:
            kind, detail = judged(net, plan)
            yield Outcome(kind, net, name, detail)


def judged(net: Network, plan: scap_hub.PruningPlan) -> tuple[str, str]:
    """Compares the pruned model with both references, in eval and in training mode, and with what verify says."""
    inputs = double(net.inputs)
    try:
        small = scap_hub.apply_plan(copied(net.module).double(), plan).eval()
    except Exception as error:
        return _error(error, net).kind, _text(error)
    modes = () if net.counts else ("readers", "all") if net.by_weights else ("all",)
    with torch.no_grad():
        try:
            ours = small(*inputs)
        except Exception as error:
            return "wrong", f"does not run: {_text(error)}"
        dense = copied(net.module).double().eval()(*inputs)
        if [x.shape for x in leaves(ours)] != [x.shape for x in leaves(dense)]:
            error = float("inf")
        else:
            error = max(
                (difference(ours, reference(net.module, plan, m, net.readers)(*inputs)) for m in modes), default=0
            )
    try:
        scap_hub.verify(copied(net.module), plan, net.inputs)
        accusation = None
    except scap_hub.ScapHubError as refusal:
        accusation = refusal
    except Exception as crash:
        return "raw error", f"verify, difference {error:.1e}: {_text(crash)}"
    if error > TOLERANCE:
        return "wrong" if accusation else "silently wrong", f"differs by {error:.1e}"
    if accusation is not None and modes:
        return "wrongly accused", _text(accusation)
    if accusation is not None:
        # The deviation of the one channel that is left is no number, which is rightly refused.
        kind = "wrong" if all(x.isfinite().all() for x in leaves(ours)) else "refused"
        return kind, f"verify alone says so: {accusation}"
    if fault := _training_fault(net, plan, small, bool(modes)):
        return "wrong in training", fault
    return ("exact", "") if modes else ("same shapes", "")


def _training_fault(net: Network, plan: scap_hub.PruningPlan, small: torch.nn.Module, compared: bool) -> str:
    """What goes wrong in training mode: one step that runs, and outputs equal to the reference's."""
    inputs = double(net.inputs)
    small.train()
    try:
        ours = small(*inputs)
        sum((x.square().mean() for x in leaves(ours)), torch.zeros(())).backward()
        torch.optim.SGD(small.parameters(), 1e-3).step()
    except Exception as error:
        return f"does not train: {_text(error)}"
    if compared:
        with torch.no_grad():
            theirs = reference(net.module, plan, "all", net.readers).train()(*inputs)
        if (error := difference(ours, theirs)) > TOLERANCE:
            return f"differs by {error:.1e}"
    return ""


def _error(error: Exception, net: Network, plan: str = "") -> Outcome:
    kind = "refused" if isinstance(error, scap_hub.ScapHubError) else "raw error"
    return Outcome(kind, net, plan, _text(error))


def _text(error: Exception) -> str:
    at = traceback.extract_tb(error.__traceback__)
    place = f" [{at[-1].filename.rpartition('/')[2]}:{at[-1].lineno}]" if at else ""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}{place}"


def tried(seeds: range, singles: int = 2) -> list[Outcome]:
    """Random mixtures of constructs."""
    return [outcome for seed in seeds for outcome in outcomes(network(seed), singles)]


def table(found: list[Outcome]) -> str:
    """How often what happened, by construct, the constructs with the worst faults first."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in found:
        for construct in outcome.network.constructs:
            rows[construct][outcome.kind] += 1
    kinds = (*FAULTS, *FINE)
    order = sorted(rows, key=lambda name: [-rows[name][kind] for kind in FAULTS])
    head = f"{'construct':26}" + "".join(f"{kind:>18}" for kind in kinds)
    return "\n".join([head, *(f"{name:26}" + "".join(f"{rows[name][k] or '':>18}" for k in kinds) for name in order)])


def summary(found: list[Outcome]) -> str:
    """One line: plans and how many of them are wrong."""
    counts = Counter(outcome.kind for outcome in found)
    return f"{sum(bool(o.plan) for o in found)} plans: " + ", ".join(f"{counts[k]} {k}" for k in (*FAULTS, *FINE))


def faulty(found: list[Outcome]) -> str:
    """Nothing, or a text with the table and the first networks of every fault."""
    bad = [outcome for outcome in found if outcome.kind in FAULTS]
    first = {(outcome.kind, outcome.network.constructs): outcome for outcome in reversed(bad)}
    return "\n\n".join([summary(found), table(found), *map(str, list(first.values())[:10])]) if bad else ""


def test_the_same_seed_writes_the_same_network():
    assert network(7).source == network(7).source
    assert len({network(seed).source for seed in range(20)}) == 20
    first, second = network(7), network(7)
    assert difference(first.module(*first.inputs), second.module(*second.inputs)) == 0


@pytest.mark.parametrize("construct", sorted(BLOCKS))
def test_every_construct_runs_and_trains_before_it_is_pruned(construct):
    net = network(0, construct)
    for mode in (net.module.eval(), net.module.train()):
        sum(x.square().mean() for x in leaves(mode(*net.inputs))).backward()


def test_the_independent_check_sees_a_wrong_index():
    net = network(0, "conv_bn_act")
    groups = scap_hub.channel_groups(net.module, net.inputs)
    plan = next(plan for kind, plan in plans(groups, 0) if kind == "uneven")
    assert judged(net, plan) == ("exact", "")
    document = plan.model_dump()
    name, cut = next((n, c) for n, c in document["tensors"].items() if n.startswith("conv") and 1 in c["keep"])
    kept = plan.indices(cut["keep"][1])
    other = next(index for index in range(cut["shape"][1]) if index not in kept)
    document["keeps"] = (*document["keeps"], ",".join(map(str, sorted([other, *kept[1:]]))))
    cut["keep"][1] = len(document["keeps"]) - 1
    kind, _ = judged(net, scap_hub.PruningPlan.model_validate(document))
    assert kind == "wrong", f"{name} reads channel {other} in the place of {kept[0]}"


# Wide sweeps: several seconds a network, because each of its plans is compared in float64 and trained for a step.


@pytest.mark.slow
def test_hundreds_of_plans_of_random_networks_are_exact():
    assert not (text := faulty(tried(range(100)))), text


@pytest.mark.slow
@pytest.mark.parametrize("construct", sorted(BLOCKS))
def test_every_construct_alone_is_exact(construct):
    found = [outcome for seed in range(6) for outcome in outcomes(network(seed, construct))]
    assert not (text := faulty(found)), text


@pytest.mark.slow
@pytest.mark.parametrize("output", sorted(OUTPUTS))
def test_every_form_of_output_is_exact(output):
    found = [outcome for seed in range(4) for outcome in outcomes(network(seed, "residual", output))]
    assert not (text := faulty(found)), text


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 2000, 100))
def test_thousands_of_plans_of_random_networks_are_exact(first):
    assert not (text := faulty(tried(range(first, first + 100), singles=4))), text


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    mixed = tried(range(count))
    alone = [o for name in BLOCKS for seed in range(count // 20) for o in outcomes(network(seed, name))]
    alone += [o for name in OUTPUTS for seed in range(4) for o in outcomes(network(seed, "residual", name))]
    print("mixtures:", summary(mixed), "\none construct alone:", summary(alone), table(alone), sep="\n")
    for outcome in {(o.kind, o.network.constructs, o.detail[:40]): o for o in alone if o.kind in FAULTS}.values():
        print(f"{outcome.kind:16} {outcome.network.seed:3} {' + '.join(outcome.network.constructs)}, "
              f"{outcome.plan}: {outcome.detail}")  # fmt: skip
