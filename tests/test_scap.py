"""The factorised SCAP against the materialised one, and its behaviour at the edges."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scap_hub.channels.groups import Tap
from scap_hub.criteria import Scap, score
from scap_hub.criteria.scap import autoencoder, sweep
from scap_hub.criteria.scap.field import normalise
from scap_hub.criteria.scap.spectra import spectrum
from scap_hub.criteria.scap.store import SpectraStore
from scap_hub.errors import CalibrationError, ModelError, RecipeError
from tests import scap_reference
from tests.tapped_nets import group, plain, tap

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=25, derandomize=True)


def assert_agrees(layer, x, y, dim=1, post=(torch.relu,), grid=None, **options):
    """One layer, scored alone, agrees with the reference; `y` are its channels, channels first."""
    one = tap(layer, "", dim=dim, post=post)
    scap = Scap(autoencoder="pca", **options)
    scores = scap.score(layer, [group(one)], [x[:2], x[2:]])
    x = x.movedim(-1, 1) if layer.weight.ndim == 2 else x
    while x.ndim < 4:
        x, y = x[..., None], y[..., None]
    torch.testing.assert_close(scores.fidelity[""], scap_reference.fidelity(x, y, **options), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        scores[""], scap_reference.importance(x, y, layer.weight, **options), rtol=1e-5, atol=1e-9
    )


@quick
@given(
    seed=st.integers(0, 99),
    channels=st.sampled_from([(1, 4, 1), (3, 5, 1), (4, 6, 2), (6, 6, 6), (4, 8, 4)]),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 3),
    images=st.integers(3, 9),
    latent=st.sampled_from([1, 3, 16]),
    bins=st.sampled_from([1, 3, 7]),
    balance=st.booleans(),
)
def test_convolutions_agree_with_the_reference(seed, channels, size, kernel, stride, images, latent, bins, balance):
    torch.manual_seed(seed)
    fan_in, fan_out, groups = channels
    layer = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups).double()
    x = torch.randn(images, fan_in, *size, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x).relu()
    assert_agrees(layer, x, y, latent=latent, bins=bins, balance=balance)


@quick
@given(seed=st.integers(0, 99), axes=st.lists(st.integers(1, 10), max_size=2), latent=st.sampled_from([2, 16]))
def test_linear_layers_agree_on_grids_tokens_and_vectors(seed, axes, latent):
    torch.manual_seed(seed)
    layer = nn.Linear(5, 7).double()
    x = torch.randn(6, *axes, 5, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x).relu().movedim(-1, 1)
    assert_agrees(layer, x, y, dim=-1, latent=latent)


def test_an_upsampled_output_agrees():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3).double()
    x = torch.randn(6, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        y = nn.functional.interpolate(layer(x), scale_factor=3)
    assert_agrees(layer, x, y, post=(lambda y: nn.functional.interpolate(y, scale_factor=3),))


@pytest.mark.parametrize("hidden", [0, 5])
def test_factorised_autoencoder_is_the_materialised_one_with_the_same_weights(hidden):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 9, 8, dtype=torch.float64), torch.randn(6, 12, 9, 8, dtype=torch.float64)
    field = normalise(spectrum(x, (9, 8), 5), spectrum(y, (9, 8), 5), balance=True)
    full = scap_reference.samples(x, y, bins=5, balance=True)
    r, size = 3, field.x.shape[1] + field.y.shape[2]
    given = autoencoder.Autoencoder(
        torch.randn(size, r).double(),
        torch.randn(size, r + hidden).double(),
        torch.randn(hidden, r).double(),
        torch.randn(hidden).double(),
    )
    # The basis that carries the field's coordinates to the materialised samples, and the weights with them.
    coordinates = (field @ torch.eye(size, dtype=torch.float64)).flatten(0, 1)
    basis = torch.linalg.lstsq(coordinates, full.flatten(0, 1)).solution.T
    torch.testing.assert_close(basis.T @ basis, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(coordinates @ basis.T, full.flatten(0, 1))

    code = full @ basis @ given.encoder
    h = torch.cat([code, torch.tanh(code @ given.weight.T + given.bias)], -1)
    restored = h @ (basis @ given.decoder).T
    torch.testing.assert_close(given.cosine(field), torch.cosine_similarity(full, restored, dim=-1), rtol=1e-9, atol=0)


def test_nonlinear_features_restore_more_than_pca():
    model, groups = plain(width=(16, 24))
    images = torch.randn(32, 3, 16, 16)
    fidelities = []
    for kind in ("pca", "residual"):
        fidelities.append(Scap(autoencoder=kind, latent=4).score(model, groups, [images]).fidelity)
    for layer in ("0", "3"):
        assert fidelities[1][layer].mean() > fidelities[0][layer].mean() + 1e-3


@pytest.mark.parametrize("kind", ["pca", "residual"])
def test_a_duplicate_is_more_redundant_than_an_independent_channel(kind):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight[1:6] = layer.weight[0] * torch.linspace(0.5, 2, 5)[:, None, None, None]
    scap = Scap(autoencoder=kind, latent=4, weight=1.0)
    scores = scap.score(layer, [group(tap(layer, "", post=(torch.relu,)))], [torch.randn(16, 3, 12, 12)])
    assert scores[""][:6].max() < scores[""][6:].min()
    assert scores.fidelity[""][:6].min() > scores.fidelity[""][6:].max()


def test_producers_of_a_group_are_fused_by_their_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, stride=2, padding=1)).double()
    pair = [k // 2 for k in range(12)]  # two rows a channel
    x = torch.randn(8, 3, 10, 10, dtype=torch.float64)
    both = group(tap(model, "0"), tap(model, "1", rows=pair))
    fused = score(model, [x], "scap", autoencoder="pca", groups=[both])["0"]
    with torch.no_grad():
        y = model[0](x)
        z = model[1](y)
    one = scap_reference.importance(x, y, model[0].weight)
    infidelity = (1 - scap_reference.fidelity(y, z)).view(6, 2).mean(1)
    l1 = model[1].weight.detach().abs().sum((1, 2, 3)).view(6, 2).mean(1)
    two = torch.from_numpy(scap_reference.rank(infidelity) + scap_reference.rank(l1)) / 2
    torch.testing.assert_close(fused, (one + two) / 2)


def test_rows_outside_the_group_do_not_count():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1).double()
    x = torch.randn(8, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)[:, 4:]
    half = group(tap(layer, "", rows=[-1] * 4 + [0, 1, 2, 3]))
    scores = Scap(autoencoder="pca").score(layer, [half], [x])
    torch.testing.assert_close(scores[""], scap_reference.importance(x, y, layer.weight[4:]))
    assert scores.fidelity[""].isnan().tolist() == [True] * 4 + [False] * 4


def test_patch_tokens_take_the_grid_of_their_convolution():
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)

        def forward(self, x):
            tokens = self.proj(x).flatten(2).transpose(1, 2)
            return self.norm(torch.cat([tokens.new_zeros(len(x), 1, 6), tokens], 1))

    model = Tokens().double()
    x = torch.randn(8, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)[:, 1:].movedim(-1, 1).unflatten(2, (4, 6))
    scores = score(model, [x], "scap", autoencoder="pca", groups=[group(tap(model, "proj", "norm", dim=-1))])
    torch.testing.assert_close(scores["proj"], scap_reference.importance(x, y, model.proj.weight))


def test_windows_folded_into_the_batch_become_an_axis():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 6)

        def forward(self, x):  # (N, 5, 8)
            return self.linear(x.transpose(1, 2).reshape(-1, 4, 5))

    torch.manual_seed(0)
    model = Windows().double()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).reshape(6, 2, 4, 6).movedim(-1, 1)
    scores = score(model, [x], "scap", autoencoder="pca", groups=[group(tap(model, "linear", dim=-1))])["linear"]
    torch.testing.assert_close(scores, scap_reference.importance(x.unflatten(2, (2, 4)), y, model.linear.weight))


def test_dead_channels_and_constant_inputs_have_defined_scores():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        layer.bias[2], layer.bias[4] = -1e3, 1e3  # never active; active and almost constant
        layer.weight[4] = 0
    one = [group(tap(layer, "", post=(torch.relu,)))]
    scap = Scap(weight=1.0, latent=2)
    scores = scap.score(layer, one, [torch.randn(8, 3, 9, 9)])
    assert scores.fidelity[""][[2, 4]].tolist() == [1, 1]
    assert scores[""][[2, 4]].max() < scores[""][[0, 1, 3, 5]].min()
    flat = scap.score(layer, one, [torch.ones(8, 3, 9, 9)])[""]
    assert flat.tolist() == [0.5] * 6


@pytest.mark.parametrize("kind", ["pca", "residual"])
def test_a_latent_beyond_the_rank_restores_everything(kind):
    torch.manual_seed(0)
    layer = nn.Linear(3, 6).double()
    scap = Scap(autoencoder=kind, latent=64, weight=1.0)
    scores = scap.score(layer, [group(tap(layer, "", dim=-1))], [torch.randn(8, 3).double()])
    assert scores[""].tolist() == [0.5] * 6
    torch.testing.assert_close(scores.fidelity[""], torch.ones(6).double())


@pytest.mark.parametrize("kind", ["pca", "residual"])
def test_scores_do_not_depend_on_batch_size_order_sweeps_or_run(kind, monkeypatch):
    model, groups = plain(width=(16, 24))
    images = torch.randn(24, 3, 16, 16)
    expected = score(model, [images], "scap", groups=groups, autoencoder=kind, latent=4)

    def assert_same(batches, groups=groups):
        scores = score(model, batches, "scap", groups=groups, autoencoder=kind, latent=4)
        for name, values in expected.items():
            torch.testing.assert_close(scores[name], values, rtol=0, atol=1e-6)

    assert_same([images])
    assert_same(images.split(5))
    assert_same([images[12:], images[:12]])
    assert_same([images], groups[::-1])
    monkeypatch.setattr(sweep, "DISK", 1)
    assert_same(iter(images.split(7)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_what_to_do():
    with pytest.raises(CalibrationError, match=r"No space left.*TMPDIR"):
        SpectraStore(Path("/dev/full")).write(0, torch.ones(2, 3, 4))


def test_an_input_that_is_the_output_before_it_is_kept_once(monkeypatch):
    model, groups = plain(width=(16, 24))
    images = torch.randn(24, 3, 16, 16)
    shared = []
    monkeypatch.setattr(
        SpectraStore, "share", lambda self, *how, own=SpectraStore.share: shared.append(how) or own(self, *how)
    )
    together = score(model, images.split(7), "scap", groups=groups)
    assert len(shared) == 4  # the second layer's input, in each batch
    for one in groups:
        torch.testing.assert_close(score(model, images.split(7), "scap", groups=[one])[one.name], together[one.name])
    assert len(shared) == 4


def test_spectra_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, groups = plain(width=(16, 24))
    score(model, [torch.randn(8, 3, 16, 16)], "scap", groups=groups)
    with pytest.raises(CalibrationError, match="NaN"):
        score(model, [torch.full((8, 3, 16, 16), torch.nan)], "scap", groups=groups)
    assert not list(tmp_path.iterdir())


def test_the_seed_of_the_features_matters_only_a_little():
    model, groups = plain(width=(16, 24))
    images = torch.randn(24, 3, 16, 16)
    fidelities = []
    for seed in (0, 1):
        fidelities.append(Scap(seed=seed, latent=4).score(model, groups, [images]).fidelity["3"])
    assert not torch.equal(*fidelities)
    assert torch.corrcoef(torch.stack(fidelities))[0, 1] > 0.8


def test_bfloat16_models_are_scored_in_float32():
    model, groups = plain()
    images = torch.randn(12, 3, 16, 16)
    scap = Scap(autoencoder="pca", latent=4)
    single = scap.score(model, groups, [images])
    half = scap.score(model.bfloat16(), groups, [images])
    for layer, values in single.fidelity.items():
        torch.testing.assert_close(half.fidelity[layer], values, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 6}, "bins = 6: give an odd number"),
        ({"latent": 0}, "latent = 0: give at least 1"),
        ({"weight": 1.5}, "weight = 1.5: give the share"),
        ({"autoencoder": "pcaa"}, "unknown autoencoder 'pcaa'; did you mean 'pca'"),
        ({"normalisation": "ranks"}, "unknown normalisation 'ranks'; did you mean 'rank'"),
        ({"images": 5}, "criterion 'scap': .*unexpected keyword argument 'images'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    model, groups = plain()
    with pytest.raises(RecipeError, match=message):
        score(model, [torch.randn(4, 3, 8, 8)], "scap", groups=groups, **options)


def test_a_grid_that_no_tokens_fit_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2), nn.LayerNorm(24))
    with pytest.raises(ModelError, match="5 tokens do not fit a grid"):
        odd = Tap("0", "0.weight", torch.arange(4).numpy(), "2", (lambda y: y[..., :5],), 1)
        score(model, [torch.randn(4, 3, 16, 24)], "scap", groups=[group(odd)])


def test_too_few_images_over_all_batches():
    model, groups = plain()
    with pytest.raises(CalibrationError, match="1 calibration image"):
        score(model, [torch.randn(1, 3, 8, 8)], "scap", groups=groups)
    with pytest.raises(CalibrationError, match="0 calibration image"):
        score(model, [], "scap", groups=groups)


SCRIPT = """
import sys, torch
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from tests.tapped_nets import plain
from scap_hub.criteria import Scap, score
from scap_hub.errors import CalibrationError
state = PartialState(cpu=True)
assert state.num_processes == 2
model, groups = plain(width=(16, 24))
images = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(0))
empty = ([images[:8], images[8:]], [])[state.process_index]
uneven = ([images[:8], images[8:15]], [images[15:]])[state.process_index]
saved = {}
for kind in ("pca", "residual"):
    for shard, name in ((uneven, "uneven"), (empty, "empty")):
        saved[kind, name] = dict(score(model, shard, "scap", groups=groups, autoencoder=kind, latent=4))
try:
    score(model, [images[:1]][state.process_index :], "scap", groups=groups)
except CalibrationError as error:
    saved["error"] = str(error)
torch.save(saved, f"{sys.argv[2]}/{state.process_index}.pt")
state.destroy_process_group()
"""


def test_two_processes_give_the_scores_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
    subprocess.run(
        [*command, tmp_path / "script.py", here, tmp_path], check=True, env=environment, timeout=120, cwd=here.parent
    )
    model, groups = plain(width=(16, 24))
    images = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for process in range(2):
        saved = torch.load(tmp_path / f"{process}.pt")
        assert saved.pop("error").startswith("1 calibration image")
        for (kind, _), scores in saved.items():
            expected = score(model, [images], "scap", groups=groups, autoencoder=kind, latent=4)
            for name, values in expected.items():
                torch.testing.assert_close(scores[name], values, rtol=0, atol=1e-6)
