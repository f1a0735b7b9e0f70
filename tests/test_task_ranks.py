"""Tasks on two processes: figures are those of one, and training leaves both with the same weights."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from scap_hub.tasks import DepthEstimation, ImageFeatureExtraction, Outputs, SemanticSegmentation
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune
from tests.launched import on_two_ranks
from tests.scenes import SIZE, masked, segmenter


def figures():
    """What five batches of four images say, which two processes cannot share out evenly."""
    torch.manual_seed(0)
    x = torch.randn(20, 3, 8, 8)
    one, other = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(3, 4, 3, padding=1)
    classes, depths = torch.randint(0, 4, (20, 8, 8)), torch.rand(20, 8, 8) + 0.1
    labels = torch.arange(20) % 3
    found = {}
    for task, targets, model in (
        (SemanticSegmentation(), classes, one),
        (DepthEstimation(), depths, torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Softplus())),
        (ImageFeatureExtraction(), labels, one),
        (Outputs(), labels, one),
    ):
        loader = DataLoader(TensorDataset(x, targets), batch_size=4)
        found[task.name] = evaluate(model, loader, task=task, teacher=other)
    return found


def trained():
    """A segmenter's weights after a little training, and its history."""
    model = segmenter()
    history = finetune(model, masked(40), epochs=1, learning_rate=1e-3, input_size=SIZE)
    return model.state_dict(), history[-1]["mean_iou"]


JOB = """
import sys, torch
from scap_hub.training.distributed import accelerator
from tests.test_task_ranks import figures, trained
assert accelerator().num_processes == 2
weights, mean_iou = trained()
found = {"figures": figures(), "weights": weights, "mean_iou": mean_iou}
torch.save(found, f"{sys.argv[1]}/{accelerator().process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_train_alike(tmp_path):
    first, second = on_two_ranks(JOB, tmp_path)
    alone = figures()
    for task, wanted in alone.items():
        for key, value in wanted.items():
            for rank in (first, second):
                assert abs(rank["figures"][task][key] - value) < 1e-5, (task, key)
    assert first["mean_iou"] == second["mean_iou"] and 0 < first["mean_iou"] <= 1
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
