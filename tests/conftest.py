import os

# Two test processes with two OpenMP threads each on two cores are several times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import gc

import hypothesis
import pytest
import torch

import scap_hub  # noqa: F401  # with all that it imports


def pytest_collection_finish():
    """What libraries hold need not be looked through at the end of each training, which collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# How long an example takes says nothing here: machines are busy, and no test is timed.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


LONG = (
    *("test_zoo", "test_pruning", "test_doors", "test_resume", "test_cli", "test_family", "test_training"),
    *("test_ranks", "test_whole_detectors"),
)
"""Begun first, so that no process is left with one of these while the others have nothing to do."""


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
