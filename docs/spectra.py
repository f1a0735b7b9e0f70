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

## Tried and dropped

- Errors weighted by the outputs' gradients place by place: a tie with no weights.
- Frequency weights in the repair too: half a point in six cells, before any tuning, which gains ten times as much.
- Errors weighted by these gradients' energy on each output channel of the layer: a tie.
- A relative tolerance for ties in the ranks of `scap`: fidelities differ by a few hundredths, so it changed the ranks
  that noise makes into others.
- `sequential` elimination on the input that the pruned groups before leave: worse in 13 of 16 cells than one shot.
- Sixteen random vectors for the gradients of the outputs: no better than four.
- A second least-squares repair after the first: within a point, where tuning gains two to eight.
"""


def spectra(results: Path) -> str:
    """The page."""
    cells = json.loads((results / "spectra.json").read_text())
    targets = [key for key in cells[0] if "=" in key]
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    of_row = {row: {(cell["net"], cell["seed"]) for cell in cells if cell["row"] == row} for row in rows}
    shared = set.intersection(*of_row.values())
    table = ["| row | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for row in rows:
        mine = [cell for cell in cells if cell["row"] == row and (cell["net"], cell["seed"]) in shared]
        figures = (f"{100 * statistics.mean(cell[target] for cell in mine):.1f}" for target in targets)
        table.append(f"| {row} | " + " | ".join(figures) + " |")
    pairs = [_pair(cells, row, targets) for row in rows if row != "scap-set"]
    frequencies = statistics.mean(_gaps(cells, "scap-set, frequencies alike", ["macs=0.15"]))
    head = HEAD.format(what=", ".join(f"{net} (seed {seed})" for net, seed in sorted(shared)))
    return head + "\n".join(table) + "\n" + TAIL.format(pairs="\n".join(pairs), frequencies=f"{frequencies:+.1f}")


def _gaps(cells: list[dict[str, Any]], row: str, targets: list[str]) -> list[float]:
    """By how many points `scap-set` is above another row, cell by cell."""
    by_key = {(cell["net"], cell["seed"], cell["row"]): cell for cell in cells}
    return [
        100 * (by_key[cell["net"], cell["seed"], "scap-set"][target] - cell[target])
        for cell in cells
        if cell["row"] == row and (cell["net"], cell["seed"], "scap-set") in by_key
        for target in targets
    ]


def _pair(cells: list[dict[str, Any]], row: str, targets: list[str]) -> str:
    """`scap-set` beside another row."""
    gaps = _gaps(cells, row, targets)
    better = sum(gap > 0 for gap in gaps)
    mean = statistics.mean(gaps)
    return f"- {row}: `scap-set` is better in {better} of {len(gaps)} cells, {mean:+.1f} points on average"
