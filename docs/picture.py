"""Draws docs/assets/digits.svg: what SCAP sees in one layer, and what pruning leaves of each group, from a real run."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

import scap_hub
from scap_hub.criteria.rivals.magnitude import filter_norm
from scap_hub.run.demo import INPUT_SIZE, train_dense

LAYER = "layer2.0.conv1"
KEPT, REMOVED = "#4051b5", "#d1495b"


def main() -> None:
    dense = train_dense()
    result = scap_hub.prune(dense, "digits", "quick", criterion="scap", model_input_size=INPUT_SIZE)
    data = scap_hub.training.data.load_data("digits", result.loaded.preprocessing, result.recipe.data)
    groups = scap_hub.channel_groups(dense, next(iter(data.calibration))[0][:1])
    group = next(group for group in groups if group.name == LAYER)
    scores = scap_hub.score(dense, data.calibration, "scap", groups=[group])
    fidelity, magnitude = scores.fidelity[LAYER].numpy(), filter_norm(dense, group.taps[0], 1).numpy()
    stays = [channel in set(result.report.groups[LAYER].kept) for channel in range(group.size)]

    mpl.rcParams.update({"svg.hashsalt": "scap", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kept, colour, label in ((True, KEPT, "stays"), (False, REMOVED, "goes")):
        chosen = [stay == kept for stay in stays]
        left.scatter(fidelity[chosen], magnitude[chosen], s=18, color=colour, label=label)
    left.set(xlabel="fidelity of the reconstruction", ylabel="L1 norm of the weights", title=f"channels of {LAYER}")
    left.legend(frameon=False)
    names = list(result.report.groups)
    right.barh(names, [result.report.groups[name].size for name in names], color=REMOVED, alpha=0.35, label="dense")
    right.barh(names, [len(result.report.groups[name].kept) for name in names], color=KEPT, label="stays")
    right.invert_yaxis()
    right.set(xlabel="channels", title="half the MACs, by channel group")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "assets" / "digits.svg", metadata={"Date": None})
    for row in result.report.rows():
        print(*row, sep=" | ")


if __name__ == "__main__":
    main()
