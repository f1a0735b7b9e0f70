"""Latency and throughput side by side, on a clock of its own."""

import pytest
import torch
from torch import nn

import scap_hub
from scap_hub.errors import ModelError, RecipeError
from scap_hub.run.bench import speeds
from tests.nets import Residual
from tests.test_pruning import QUICK, images


def clock(calls):
    """A millisecond for a thousand parameters, for each image."""
    return [sum(p.numel() for p in module.parameters()) / 1e3 * len(x) for module, x in calls]


def pruned(folder, model, **options):
    return scap_hub.prune(
        model, images(), QUICK, model_input_size=(3, 64, 64), finetune_epochs=0, output_dir=folder, **options
    )


def test_a_pruned_folder_stands_beside_its_dense_model(tmp_path):
    dense = scap_hub.zoo.load_model("test_resnet", pretrained=False, num_classes=5).module
    result = pruned(tmp_path / "out", dense)
    rows = scap_hub.bench(tmp_path / "out", batch_sizes=(1, 4), dtypes=("fp32", "bf16"), timer=clock)
    assert [(row.batch, row.dtype) for row in rows[::2]] == [(1, "fp32"), (4, "fp32"), (1, "bf16"), (4, "bf16")]
    assert all(row.mode == "eager" for row in rows)
    first, second = rows[2:4]
    assert first.model == "dense" and first.speedup == 1 and second.model == str(tmp_path / "out")
    assert second.speedup == pytest.approx(result.report.before.params / result.report.after.params)
    assert second.images_per_second == pytest.approx(4000 / second.ms)


def test_a_dense_model_alone_and_against_another():
    alone = scap_hub.bench("test_resnet", batch_sizes=[2], timer=clock)
    assert len(alone) == 1 and alone[0].speedup == 1
    both = scap_hub.bench(Residual(width=4), Residual(width=8), size=(3, 16, 16), batch_sizes=[1], timer=clock)
    assert [row.model for row in both] == ["against", "model"] and both[1].speedup > 1


def test_a_pruned_module_of_nobody_has_no_dense_model_to_find(tmp_path):
    pruned(tmp_path / "out", Residual(width=16))
    with pytest.raises(ModelError, match="pass the dense one"):
        scap_hub.bench(tmp_path / "out", timer=clock)


def test_compiled_models_are_measured_beside_eager_ones(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: compiled.append(net) or net)
    rows = speeds(
        {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 2, 3)}, (3, 8, 8), [1], ["fp32"], ["eager", "compile"], clock
    )
    assert [row.mode for row in rows] == ["eager", "eager", "compile", "compile"] and len(compiled) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtypes": ["fp8"]}, RecipeError, "dtype 'fp8': give dtypes out of fp32, fp16, bf16"),
        ({"batch_sizes": [0]}, RecipeError, r"batch sizes \[0\]: .* 1 or more"),
        ({"model": "resnet81"}, ModelError, "did you mean"),
        ({"against": "resnet81"}, ModelError, "did you mean"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        scap_hub.bench(**{"model": "test_resnet", "timer": clock, **arguments})
