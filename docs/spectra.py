"""The page of what the spectra give, from benchmarks/results/spectra.json."""

import json
import statistics
from pathlib import Path
from typing import Any

HEAD = """\
<!-- Written by docs/generate.py from benchmarks/results/spectra.json; do not edit. -->
# What the spectra give

Each row of the table prunes the same networks once, at the same budgets, and repairs them by least squares; nothing is
trained or tuned afterwards. The figures are top-1 in percent on 3,000 images that nobody chose by, the mean over
{what}. With a budget in MACs a criterion chooses the widths too; with `ratio` all rows keep the same share of every
group. Fashion-MNIST, shifted and cluttered, at 16 pixels; `benchmarks/spectra.py` says how.

```bash
python benchmarks/spectra.py --out out/spectra --json benchmarks/results/spectra.json
python benchmarks/spectra.py --out out/spectra --json benchmarks/results/spectra.json --seeds 3 \\
  --nets mobile,resnet,vgg --rows 'scap-set;scap-set, frequencies alike;random'
```

Rows in quotes are controls that are not in the package: the ranks of the fidelity inverted, or drawn at random.
"Frequencies alike" is `frequency_weights: false`.

"""
TAIL = """
Beside `scap-set`, over all cells that both have, further seeds included:

{pairs}

What follows from it:

- **The published fidelity ranks channels no better than chance.** Alone, it is below random ranks in its place. With
  the norm beside it, as published, it is about as good as random ranks beside the norm.
- **Sets of channels matter most**: rows that look at sets are within a point of each other where all keep the same
  widths, and four points and more above those that judge channels one by one. The widths that follow from the outputs'
  gradients add to that what `scap-set` is above `obs` in the columns of MACs.
- **Spectral codes in `scap-set` are a tie**, so it does without them unless you set `blend`.
- **Frequencies weighted by the outputs' gradients help where much goes and the widths are the criterion's own**:
  {frequencies} points at macs=0.15, over all networks and seeds. In the other columns they are a tie. It is the only
  form tried so far in which spectra earn something, it needs no autoencoder, and `scap-set` has it by default.

## With few images

The same from {few} calibration images: from so few, second moments are uncertain. Means over {few_what}.

{few_table}

```bash
python benchmarks/spectra.py --images {few} --out out/spectra --json benchmarks/results/spectra.json --seeds 3 \\
  --rows 'scap-set, frequencies alike;scap-set;scap-set, frequencies alike, ridge 0.1'
```

Beside the first of them, over all cells that both have:

{few_pairs}

From so few images everything that makes the second moments smoother helps by about a point: spectral codes, weights by
frequency, and a ridge ten times as large, which costs nothing. So the spectra do nothing there that a larger ridge
does not.

## Tried and dropped

- Fidelity given the channels that stay, as elimination on spectral codes alone (`blend: 1`): a tie with patches at
  equal widths on three networks (+0.3 points in 6 cells). The autoencoder is not what makes them good: without it, with
  all of the low-pass spectrum as the code, they are a tie (-0.2 points in 12 cells), and so they are with random
  directions in the place of its principal ones (-0.3).
- The same channel by channel: an autoencoder of the channels that stay, and the one that it restores worst comes next.
  It was below random order on both networks tried (by 2.6 points).
- Fidelity freed of energy, the residual of its ranks on the ranks of the channels' variance: no better than its
  inverse on two networks, and 3 points below the variance alone.
- The dimension of a group's spectra as its width (the eigenvalues of their second moment in the place of equal shares,
  in the order of `obs`): +0.9 and -1.1 points on two networks. On the first, the spectra's means alone gave +1.2.
- Errors weighted by the outputs' gradients place by place: a tie with no weights.
- Frequency weights in the repair too: half a point in six cells, before any tuning, which gains ten times as much.
- Errors weighted by these gradients' energy on each output channel of the layer: a tie.
- A relative tolerance for ties in the ranks of `scap`: fidelities differ by a few hundredths, so it changed the ranks
  that noise makes into others.
- `sequential` elimination on the input that the pruned groups before leave: worse in 13 of 16 cells than one shot.
- Sixteen random vectors for the gradients of the outputs: no better than four.
- A second least-squares repair after the first: within a point, where tuning gains two to eight.
- Codes for networks that are tuned afterwards (400 steps), which could make use of what no linear repair can: 71.6 %
  without, 71.1 and 70.9 % with `blend` 0.5 and 1, and 71.3 % by `obs` (mean of six cells on three networks).
"""


IMAGES, FEW = 256, 16  # to calibrate with
ALIKE = "scap-set, frequencies alike"


def spectra(results: Path) -> str:
    """The page."""
    found = json.loads((results / "spectra.json").read_text())
    cells, few = ([cell for cell in found if cell["images"] == images] for images in (IMAGES, FEW))
    what, table = _table(cells)
    few_what, few_table = _table(few)
    frequencies = statistics.mean(_gaps(cells, "scap-set", ALIKE, ["macs=0.15"]))
    tail = TAIL.format(
        pairs="\n".join(
            f"- {row}: `scap-set` is {_beside(cells, 'scap-set', row)}" for row in _rows(cells) if row != "scap-set"
        ),
        frequencies=f"{frequencies:+.1f}",
        few=FEW,
        few_what=few_what,
        few_table=few_table,
        few_pairs="\n".join(f"- {row}: {_beside(few, row, ALIKE)}" for row in _rows(few) if row != ALIKE),
    )
    return HEAD.format(what=what) + table + "\n" + tail


def _rows(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["row"] for cell in cells))


def _targets(cells: list[dict[str, Any]]) -> list[str]:
    return [key for key in cells[0] if "=" in key]


def _table(cells: list[dict[str, Any]]) -> tuple[str, str]:
    """The networks for which every row was measured, and each row's mean over them."""
    rows, targets = _rows(cells), _targets(cells)
    of_row = [{(cell["net"], cell["seed"]) for cell in cells if cell["row"] == row} for row in rows]
    shared = set.intersection(*of_row)
    table = ["| row | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for row in rows:
        mine = [cell for cell in cells if cell["row"] == row and (cell["net"], cell["seed"]) in shared]
        figures = (f"{100 * statistics.mean(cell[target] for cell in mine):.1f}" for target in targets)
        table.append(f"| {row} | " + " | ".join(figures) + " |")
    return ", ".join(f"{net} (seed {seed})" for net, seed in sorted(shared)), "\n".join(table)


def _gaps(cells: list[dict[str, Any]], row: str, other: str, targets: list[str]) -> list[float]:
    """By how many points a row is above another one, cell by cell."""
    by_key = {(cell["net"], cell["seed"], cell["row"]): cell for cell in cells}
    return [
        100 * (by_key[cell["net"], cell["seed"], row][target] - cell[target])
        for cell in cells
        if cell["row"] == other and (cell["net"], cell["seed"], row) in by_key
        for target in targets
    ]


def _beside(cells: list[dict[str, Any]], row: str, other: str) -> str:
    """How a row does beside another one."""
    gaps = _gaps(cells, row, other, _targets(cells))
    better = sum(gap > 0 for gap in gaps)
    return f"better in {better} of {len(gaps)} cells, {statistics.mean(gaps):+.1f} points on average"
