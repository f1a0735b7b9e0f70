"""A criterion of one's own: the spread of each filter's weights."""

from dataclasses import dataclass

import scap_hub
from scap_hub.criteria import RowCriterion


@dataclass(kw_only=True)
class Spread(RowCriterion):
    """Standard deviation of the weights of the filter that computes the channel."""

    name = "spread"  # defining the class registers this name

    def rows(self, model, taps, batches):
        """For each tap, the place where a layer is watched, a value for each of the layer's output channels."""
        return [model.get_parameter(tap.weight).detach().flatten(1).std(1) for tap in taps]


if __name__ == "__main__":
    from scap_hub.run.demo import INPUT_SIZE, train_dense

    print(
        scap_hub.prune(train_dense(), "digits", "quick", criterion="spread", model_input_size=INPUT_SIZE).report.rows()
    )
