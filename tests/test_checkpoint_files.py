"""Weights from a file of the user's own: which files are read, what is refused, and that a run is of that file."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import scap_hub
from scap_hub.errors import CheckpointError, ModelError
from scap_hub.zoo import load_model
from tests.test_cli import run  # noqa: F401, a fixture
from tests.test_pruning import QUICK, images

ARGUMENTS = dict(dataset=images(channels=3, size=32), recipe=QUICK, criterion="l1", finetune_epochs=0)
SMALL = dict(model_num_classes=5, model_input_size=(3, 32, 32))


def trained(seed=3, classes=5):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=classes)


def file_of(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


WRAPPED = {
    "own.safetensors": lambda state: state,
    "plain.pth": lambda state: state,
    "trainer.pt": lambda state: {"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": state},
    "script.bin": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled.pth": lambda state: {"model_state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_weights_in_a_file_are_the_models(name, tmp_path):
    net = trained()
    path = file_of(tmp_path / name, WRAPPED[name](net.state_dict()))
    loaded = load_model("test_resnet", num_classes=5, checkpoint=path)
    probe = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.module(probe), net.eval()(probe))


def test_a_run_prunes_the_files_weights_and_is_of_that_file(tmp_path, monkeypatch):
    first = file_of(tmp_path / "first.pth", trained().state_dict())
    result = scap_hub.prune("test_resnet", **ARGUMENTS, **SMALL, checkpoint=first)
    assert torch.equal(result.loaded.module.conv1[0].weight, trained().conv1[0].weight)
    assert result.recipe.model.checkpoint == str(first) and result.report.tuned is None
    by_hand = scap_hub.prune(trained(), **ARGUMENTS, model_input_size=(3, 32, 32))
    assert result.plan == by_hand.plan
    same = scap_hub.prune(trained(seed=9), **ARGUMENTS, model_input_size=(3, 32, 32), checkpoint=first)
    assert same.plan == by_hand.plan

    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.pruning.select_step", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            scap_hub.prune("test_resnet", **ARGUMENTS, **SMALL, checkpoint=first, output_dir=tmp_path / "out")
    file_of(first, trained(seed=4).state_dict())
    with pytest.raises(CheckpointError, match="the model's weights differ"):
        scap_hub.prune("test_resnet", **ARGUMENTS, **SMALL, checkpoint=first, output_dir=tmp_path / "out")


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_all_but_the_head_of_a_checkpoint_is_kept_for_data_of_other_classes(tmp_path):
    state = trained(classes=1000).state_dict()
    path = file_of(tmp_path / "thousand.pth", state)
    result = scap_hub.prune(
        "test_resnet", "digits", QUICK, criterion="l1", checkpoint=path, model_input_size=(3, 32, 32),
        finetune_epochs=0, finetune_dense_epochs=1, finetune_learning_rate=1e-12,
    )  # fmt: skip
    dense = result.loaded.module.state_dict()
    assert dense["fc.weight"].shape[0] == 10 and result.report.tuned.new_classes == 10
    assert torch.allclose(dense["conv1.0.weight"], state["conv1.0.weight"])


def test_a_pruned_model_takes_weights_that_were_trained_further(tmp_path):
    scap_hub.prune("test_resnet", **ARGUMENTS, **SMALL, model_pretrained=False, output_dir=tmp_path / "out")
    further = scap_hub.load(tmp_path / "out")
    with torch.no_grad():
        further.fc.bias += 1
    path = file_of(tmp_path / "further.pth", further.state_dict())
    again = scap_hub.load(tmp_path / "out", checkpoint=path)
    assert torch.equal(again.fc.bias, further.fc.bias)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_that_does_not_fit_is_refused_by_name_and_runs_nothing(tmp_path):
    state = trained().state_dict()
    lacking = {name: tensor for name, tensor in state.items() if "conv1" not in name}
    broken = {**state, "fc.bias": torch.full((5,), float("nan"))}
    cases = [
        (file_of(tmp_path / "a.pth", lacking), r"'conv1\.0\.weight' is missing, .* and \d+ more"),
        (file_of(tmp_path / "b.pth", {**state, "extra": torch.ones(1)}), "'extra' is unknown to the model"),
        (
            file_of(tmp_path / "c.pth", trained(classes=7).state_dict()),
            r"'fc.weight' is \(7, .*if it has 7 classes, set",
        ),
        (file_of(tmp_path / "d.pth", broken), "NaN or Inf in 'fc.bias'"),
        (file_of(tmp_path / "e.pth", trained()), "cannot be read as weights alone"),
        (file_of(tmp_path / "f.pth", {"epoch": 3}), "holds no state dict"),
        (tmp_path / "absent.pth", "is no file; a folder or a Hub id is given as the model itself"),
    ]
    (tmp_path / "g.safetensors").write_bytes(b"not this")
    (tmp_path / "h.pth").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    cases += [(tmp_path / name, "cannot be read as weights alone") for name in ("g.safetensors", "h.pth")]
    for path, message in cases:
        with pytest.raises(ModelError, match=message) as error:
            load_model("test_resnet", num_classes=5, checkpoint=path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_commands_take_a_checkpoint(run, tmp_path):  # noqa: F811
    fits = file_of(tmp_path / "fits.pth", timm.create_model("test_resnet").state_dict())
    other = file_of(tmp_path / "other.pth", trained().state_dict())
    for command in (["inspect"], ["verify", "--plans", "1"], ["bench", "--batch", "1"]):
        code, out, _ = run(command[0], "test_resnet", *command[1:], "--size", "32", "--checkpoint", fits)
        assert code == 0 and out
        code, _, err = run(command[0], "test_resnet", *command[1:], "--size", "32", "--checkpoint", other)
        assert code == 2 and "set model.num_classes to that" in err
