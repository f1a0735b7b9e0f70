"""What repairs give: ours beside those of GRAIL's and AIMET's kind, for the same pruned networks, without any labels.

    python benchmarks/repairs.py --out out/spectra --json benchmarks/results/repairs.json

Networks, data and budgets are those of benchmarks/spectra.py. Channels are chosen by `scap-set` and by `l1`, because a
repair should not depend on who chose. Calibration images are the same 256 for all rows. The peers are ours after their
descriptions:

- GRAIL's kind: the second moment of the channels that a layer reads in the dense model says, by ridge regression, how
  those that stay give those that leave; this mixing is merged into the layer's weight. One layer knows nothing of what
  the others have got wrong.
- AIMET's kind (He et al., 2017, arXiv 1707.06168): a layer's outputs in the dense model by its inputs in the pruned
  one, plain linear regression without a ridge.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from spectra import NETS, accuracy, splits, trained
from torch import Tensor, nn

from scap_hub import PruningPlan, apply_plan, channel_groups, repair, score, select, tune
from scap_hub.compensation import recalibrate
from scap_hub.criteria.obs.inputs import read_inputs
from scap_hub.progress import set_quiet

TARGETS = ("macs=0.3", "macs=0.15")
SELECTORS = ("scap-set", "l1")
Repair = Callable[[nn.Module, nn.Module, PruningPlan, Sequence[Tensor]], object]


def grail(
    dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Tensor], ridge: float = 1e-3
) -> None:
    """W' = W G_{:k} (G_kk + λ)⁻¹ for every layer that lost some of the channels k that it reads."""
    paths = [
        path
        for path, layer in dense.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and 1 in getattr(plan.tensors.get(f"{path}.weight"), "keep", {})
    ]
    grams: dict[str, Tensor] = {}

    def read(path: str, layer: Any, x: Tensor, images: int) -> None:
        rows = (x if isinstance(layer, nn.Linear) else x.movedim(1, -1)).flatten(0, -2).double()
        grams[path] = grams.get(path, 0) + rows.T @ rows

    read_inputs(dense, paths, batches, read)
    for path, gram in grams.items():
        layer, cut = dense.get_submodule(path), plan.tensors[f"{path}.weight"]
        kept, rows = plan.indices(cut.keep[1]), plan.indices(cut.keep[0]) if 0 in cut.keep else slice(None)
        inner = gram[kept][:, kept]
        inner = inner + ridge * inner.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
        mixing = torch.linalg.solve(inner, gram[kept]).T  # (C, kept)
        weight = torch.einsum("oc...,ck->ok...", layer.weight.detach().double()[rows], mixing)  # type: ignore[index]
        with torch.no_grad():
            small.get_submodule(path).weight.copy_(weight)  # type: ignore[operator]


def _grail(dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Tensor]) -> None:
    grail(dense, small, plan, batches)
    recalibrate(small, batches)


def _aimet(dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Tensor]) -> None:
    repair(dense, small, plan, batches, ridge=0, batch_norm=False)
    recalibrate(small, batches)


def _tuned(dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Tensor]) -> None:
    repair(dense, small, plan, batches)
    tune(dense, small, batches)


def _tuned_alone(dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Tensor]) -> None:
    recalibrate(small, batches)
    tune(dense, small, batches)


ROWS: dict[str, Repair] = {
    "nothing": lambda dense, small, plan, batches: None,
    "batch-norm statistics": lambda dense, small, plan, batches: recalibrate(small, batches),
    "GRAIL's kind": grail,
    "GRAIL's kind, batch-norm statistics": _grail,
    "AIMET's kind": lambda dense, small, plan, batches: repair(dense, small, plan, batches, ridge=0, batch_norm=False),
    "AIMET's kind, batch-norm statistics": _aimet,
    "ours, without batch-norm statistics": lambda dense, small, plan, batches: repair(
        dense, small, plan, batches, batch_norm=False
    ),
    "ours": repair,
    "tuned, without least squares": _tuned_alone,
    "ours, tuned": _tuned,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained networks")
    parser.add_argument("--json", type=Path, help="where to write the results; what it holds is not measured again")
    options = parser.parse_args()
    set_quiet(True)
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    train, validation, calibration = splits()
    batches = list(calibration.split(64))
    for name in options.nets.split(","):
        for seed in range(options.seeds):
            if any((cell["net"], cell["seed"]) == (name, seed) for cell in done):
                continue
            dense = trained(name, seed, train, options.out)
            groups = channel_groups(dense, calibration[:1]).prunable
            for selector in SELECTORS:
                scores = score(dense, batches, selector, groups=groups)
                for target in TARGETS:
                    plan = select(groups, scores, target, round_to=1)
                    pruned = apply_plan(dense, plan)
                    cell: dict[str, Any] = {"net": name, "seed": seed, "selector": selector, "target": target}
                    for row, mend in ROWS.items():
                        small = copy.deepcopy(pruned)
                        mend(dense, small, plan, batches)
                        cell[row] = accuracy(small, validation)
                    done.append(cell)
                    print(name, seed, selector, target, *(f"{cell[row]:.2%}" for row in ROWS), flush=True)
            if options.json:
                options.json.write_text(json.dumps(done, indent=1) + "\n")
    print(f"\n{'mean':38}", *(f"{selector + ' ' + target:>18}" for selector in SELECTORS for target in TARGETS))
    for row in ROWS:
        means = [
            statistics.mean(cell[row] for cell in done if (cell["selector"], cell["target"]) == (selector, target))
            for selector in SELECTORS
            for target in TARGETS
        ]
        print(f"{row:38}", *(f"{mean:18.2%}" for mean in means))


if __name__ == "__main__":
    main()
