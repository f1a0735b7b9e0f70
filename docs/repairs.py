"""The page of what repairs give, from benchmarks/results/repairs.json."""

import json
import statistics
from pathlib import Path

HEAD = """\
<!-- Written by docs/generate.py from benchmarks/results/repairs.json; do not edit. -->
# What repairs give

Each column cuts the same networks by the same plans, and each row repairs what is left, without any labels, from the
same 256 images. The figures are top-1 in percent on 3,000 images that nobody chose by, the mean over {what}.
Channels were chosen by two criteria, because a repair should not depend on who chose. `benchmarks/repairs.py` says how.

```bash
python benchmarks/repairs.py --out out/spectra --json benchmarks/results/repairs.json
```

- **GRAIL's kind** mixes, by a ridge regression on what a layer reads in the dense model, the channels that stay into
  those that leave, and merges that into the layer's weight. **AIMET's kind** solves each layer for its outputs in the
  dense model from what it reads in the pruned one, without a ridge. Both are ours, after their descriptions.
- **Ours** is `scap_hub.repair`: like the second, with a ridge that pulls towards the weights that are there, a bias
  that is free of it, and batch norms that take their statistics on the way. **Tuned** adds `scap_hub.tune`, 200 steps.

"""
TAIL = """
Where little is cut and the channels are chosen well, layers that are solved one after the other come out alike, with a
ridge or without. The ridge shows where the choice is worse, and tuning where much is cut. A repair that knows only the
dense model's layers needs new batch-norm statistics, and stays behind.

Tuning takes 200 steps by default, which is few where much is cut. On a MobileNetV2 (64 x 64 pixels, 256 images, three
draws of them) with a tenth of its MACs, 200 steps gave 74.8 % top-1 on test images and 400 steps 78.2 %; with half of
them 88.3 and 88.9 % (page [accuracy](accuracy.md), which has the command). With 1,024 images and 1,000 steps these are
82.8 and 90.25 %, so the recipe `no-training` has as many. The figures below, of one draw, come from scripts that are
not kept here.

Tried for tuning on the same network and dropped:

- What the repaired layers compute, compared beside the outputs: 72.1 % after 200 steps and 75.9 % after 400. With three
  tenths of the MACs 85.9 and 86.4 %, where outputs alone gave 85.3 and 85.9 %. Too little for one seed to tell.
- Mirrored images, and images cut out at random and resized: 75.3 % and 63.2 % after 400 steps at the rate 1e-3, where
  shifted and mixed ones gave 76.6 %. Mixing all images instead of half: 63.1 %.
- 1,024 images at that rate: 9.7 %; so high a rate is a matter of luck, which is why rates are tried first. With rates
  tried first, four times the images are worth two points (page [accuracy](accuracy.md)).
- Widths from the root of what the outputs lose, as if errors of groups added up in one direction: a tie.
"""


def repairs(results: Path) -> str:
    """The page."""
    cells = json.loads((results / "repairs.json").read_text())
    rows = [key for key in cells[0] if key not in ("net", "seed", "selector", "target")]
    columns = list(dict.fromkeys((cell["selector"], cell["target"]) for cell in cells))
    nets = sorted({(cell["net"], cell["seed"]) for cell in cells})
    lines = ["| repair | " + " | ".join(f"`{selector}`, {target}" for selector, target in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        means = (
            statistics.mean(cell[row] for cell in cells if (cell["selector"], cell["target"]) == column)
            for column in columns
        )
        lines.append(f"| {row} | " + " | ".join(f"{100 * mean:.1f}" for mean in means) + " |")
    head = HEAD.format(what=", ".join(f"{net} (seed {seed})" for net, seed in nets))
    return head + "\n".join(lines) + "\n" + TAIL
