"""Private names of other libraries do what we rely on; a failure names the installed version."""

import ast
import contextlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

try:
    from scap_hub import private
except ImportError as error:
    raise ImportError(f"torch {version('torch')} lacks a private name of scap_hub/private.py: {error}") from error

PACKAGE = Path(private.__file__).parent
OWN_RULES = {"private.py", "modeling_scap.py"}
"""The file for private names, and the one that may import nothing of ours."""
NOT_YET: set[str] = set()
"""Folders that still use private names directly."""
LIBRARIES = {"torch", "nn", "timm", "transformers", "accelerate", "datasets", "typer"}
ATTRIBUTES = {"_schema", "_version", "_model_mapping", "_custom_objects", "_resolve_features"}
"""Of objects, as private.py wraps them."""


@contextlib.contextmanager
def relying_on(library, name):
    """Turns whatever goes wrong into one message that says which release broke which name."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        pytest.fail(f"{library} {version(library)} broke private.{name}: {type(error).__name__}: {error}")


def test_pre_dispatch_mode_sees_operators_whole():
    class Seen(private.PreDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **kwargs or {})

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).to("meta").eval()
    images = torch.empty(1, 3, 8, 8, device="meta")
    with relying_on("torch", "PreDispatchMode, private.enable_python_dispatcher"):
        with torch.no_grad(), private.enable_python_dispatcher(), Seen() as seen:
            net(images)
        names = [name.split(".")[1] for name in seen.names]
        assert names == ["conv2d", "batch_norm", "flatten", "linear"]


def test_composite_operators_are_told_from_others():
    aten = torch.ops.aten
    with relying_on("torch", "is_composite"):
        assert private.is_composite(aten.fft_rfft2.default)
        assert not private.is_composite(aten._fft_r2c.default)
        assert torch.equal(aten.fliplr.default.decompose(torch.arange(4).view(2, 2)), torch.tensor([[1, 0], [3, 2]]))


def test_fake_tensors_run_a_model_without_computing():
    with relying_on("torch", "FakeTensorMode"), private.FakeTensorMode(allow_non_fake_inputs=True):
        made = nn.Conv2d(3, 4, 3)(torch.empty(1, 3, 100_000, 100_000))  # 120 GB if it were real
        assert made.shape == (1, 4, 99_998, 99_998)


@pytest.mark.parametrize(
    ("name", "members", "strangers"),
    [
        ("ConvNd", [nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)], [nn.Linear(1, 1)]),
        ("BatchNorm", [nn.BatchNorm1d(1), nn.SyncBatchNorm(1)], [nn.InstanceNorm2d(1), nn.LayerNorm(1)]),
        ("NormBase", [nn.BatchNorm2d(1), nn.InstanceNorm2d(1)], [nn.LayerNorm(1), nn.GroupNorm(1, 1)]),
        ("DropoutNd", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()], [nn.Identity()]),
    ],
)
def test_bases_of_layers_hold_these_and_no_others(name, members, strangers):
    with relying_on("torch", name):
        base = getattr(private, name)
        assert all(isinstance(layer, base) for layer in members)
        assert not any(isinstance(layer, base) for layer in strangers)


def test_hooks_on_all_modules_run_around_each_one_and_after_a_failure():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 4))  # the second one does not fit
    calls = []
    with relying_on("torch", "register_module_forward_hook"):
        before = private.register_module_forward_pre_hook(lambda module, _: calls.append(("before", module)))
        after = private.register_module_forward_hook(
            lambda module, *_: calls.append(("after", module)), always_call=True
        )
        try:
            with contextlib.suppress(RuntimeError):
                net(torch.ones(1, 2))
        finally:
            before.remove()
            after.remove()
        first, second = net
        order = [("before", net), ("before", first), ("after", first)]
        assert calls[:3] == order and ("before", second) in calls and ("after", second) in calls
        assert ("after", net) in calls
        net[0](torch.ones(1, 2))
        assert len(calls) == 6


def test_trees_go_through_containers_and_the_outputs_of_transformers():
    from transformers.modeling_outputs import ImageClassifierOutput

    one, two = torch.ones(1), torch.ones(2)
    output = ImageClassifierOutput(logits=one, hidden_states=(two, two))
    with relying_on("torch", "tree_leaves, private.tree_map"):
        assert [id(leaf) for leaf in private.tree_leaves(output)] == [id(one), id(two), id(two)]
        doubled = private.tree_map(lambda leaf: 2 * leaf, {"a": [one, (two,)], "b": output})
        assert doubled["a"][1][0].tolist() == [2, 2] and doubled["b"].logits.tolist() == [2]
        assert private.tree_leaves([3, None, "x"]) == [3, None, "x"]
    with relying_on("torch", "tree_json"):
        told = private.tree_json({"images": output})
        assert '"transformers.modeling_outputs.ImageClassifierOutput"' in told
        assert json.loads(private.tree_json(one))[1]["children_spec"] == []


def test_what_is_unobserved_no_mode_of_functions_sees():
    seen = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return function(*args, **kwargs or {})

    x = torch.zeros(4)
    with Counting():
        private.unobserved(lambda: x.reshape(2, 2))()
        assert not seen
        x.reshape(2, 2)
    assert seen == ["reshape"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_aliases_are_told_from_copies(device):
    tensor = torch.empty(4, device=device)
    with relying_on("torch", "is_alias_of"):
        assert private.is_alias_of(tensor, tensor[1:]) and private.is_alias_of(tensor.view(2, 2), tensor)
        assert not private.is_alias_of(tensor, tensor.clone())


def test_schemas_hold_defaults_and_what_is_written_to():
    with relying_on("torch", "schema"):
        arguments = {argument.name: argument for argument in private.schema(torch.ops.aten.add_.Tensor).arguments}
        assert arguments["alpha"].default_value == 1 and arguments["self"].alias_info.is_write
        returned = private.schema(torch.ops.aten.view.default).returns
        assert len(returned) == 1 and returned[0].alias_info is not None
        assert private.schema(torch.ops.aten.relu.default).returns[0].alias_info is None
        assert torch.ops.aten.relu.default in {torch.ops.aten.relu.default}  # operators are keys of our tables


def test_autocast_regions_do_nothing_inside_and_cast_again_outside():
    def product():
        with torch.autocast("cpu", torch.bfloat16):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with relying_on("torch", "no_autocast"):
        with private.no_autocast():
            assert product() == torch.float32
        assert product() == torch.bfloat16


def test_writes_are_counted_also_through_views():
    tensor = torch.zeros(3)
    with relying_on("torch", "write_count"):
        before = private.write_count(tensor)
        tensor.add(1)
        assert private.write_count(tensor) == before
        tensor[1:].add_(1)
        assert private.write_count(tensor) > before


def test_a_stream_without_a_schema_finds_its_column_types():
    datasets = pytest.importorskip("datasets")
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"label": 1}]))
    assert rows.features is None
    with relying_on("datasets", "column_types"):
        assert private.column_types(rows)["label"].dtype == "int64"
        assert private.column_types(datasets.Dataset.from_dict({"label": [1]}))["label"].dtype == "int64"


def test_usage_errors_of_all_kinds_have_the_base_and_a_message():
    import typer

    from scap_hub.cli.app import UsageError

    app = typer.Typer()
    app.command()(lambda count: None)
    for arguments in (["1", "2"], ["--no-such-option"], []):
        try:
            app(args=arguments, standalone_mode=False)
        except UsageError as error:
            assert UsageError.__name__ == "UsageError" and error.format_message()
        else:
            pytest.fail(f"typer {version('typer')} broke cli.UsageError: no error for {arguments}")


def test_nothing_else_uses_private_names():
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in OWN_RULES]
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {ast.unparse(node)}"
        for path in paths
        if not NOT_YET & set(path.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(path.read_text()))
        if is_private(node)
    ]
    assert not found, "go through scap_hub/private.py instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from torch._subclasses import fake_tensor", True),
        ("from torch.utils import _pytree as pytree", True),
        ("import torch._dynamo", True),
        ("nn.modules.conv._ConvNd", True),
        ("tensor._version", True),
        ("from scap_hub.text import _near", False),
        ("from __future__ import annotations", False),
        ("torch.ops.aten._local_scalar_dense", False),
        ("self._held", False),
        ("torch.cat(self._held).cpu", False),
    ],
)
def test_what_counts_as_a_private_name(statement, expected):
    assert any(map(is_private, ast.walk(ast.parse(statement)))) is expected


def is_private(node):
    """Whether a node of a syntax tree names something private of another library."""
    if isinstance(node, ast.ImportFrom):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        names = [] if names[0] == "scap_hub" else names
    elif isinstance(node, ast.Import):
        names = [part for alias in node.names for part in alias.name.split(".")]
    elif isinstance(node, ast.Attribute):
        names = ast.unparse(node).split(".")
        operator = names[:2] == ["torch", "ops"]  # ATen's underscores are part of its public names
        plain = names[0] in LIBRARIES and "(" not in ast.unparse(node)  # what a call returns is another object
        names = names if plain and not operator else ATTRIBUTES & {node.attr}
    else:
        return False
    return any(name.startswith("_") and not name.startswith("__") for name in names)


def test_auto_classes_name_what_they_build():
    transformers = pytest.importorskip("transformers")
    with relying_on("transformers", "models_of"):
        assert private.models_of(transformers.AutoBackbone, transformers.ResNetConfig) == ("ResNetBackbone",)
        assert private.models_of(transformers.AutoModelForDepthEstimation, transformers.ResNetConfig) == ()
