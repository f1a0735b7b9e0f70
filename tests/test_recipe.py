import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scap_hub.errors import RecipeError
from scap_hub.recipe import Recipe, TargetSettings, recipe_schema, shipped_recipes
from scap_hub.selection.target import KINDS, Target


def test_blocks_are_the_contracts():
    assert list(Recipe.model_fields) == [
        *("task", "model", "data", "criterion", "target", "protect", "repair"),
        *("schedule", "finetune", "evaluate", "deploy", "publish", "seed"),
    ]
    assert Recipe().target.macs == 0.5


def test_the_target_block_has_every_kind_of_target():
    assert set(KINDS) <= set(TargetSettings.model_fields)
    for kind in KINDS:
        assert TargetSettings.model_validate({kind: 0.25}).target == Target(kind, 0.25)
    assert Recipe().target.target == Target.of("macs=0.5")


def test_shipped_recipes_say_when_to_use_them():
    assert set(shipped_recipes()) == {
        *("convnext", "extreme-iterative", "half-macs", "hf-resnet", "mobile-latency", "no-training", "quick"),
        *("scap-paper-vgg16", "segmentation", "detection", "features"),
    }
    for path in shipped_recipes().values():
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# When: ") and lines[1].startswith("# ")
        # The editor's hint to the schema beside it.
        assert (path.parent / lines[2].removeprefix("# yaml-language-server: $schema=")).is_file()


def unrestricted_left_out(keys):
    """Without the entry that any option is allowed, which pydantic 2.10 leaves out."""
    return {key: value for key, value in keys.items() if (key, value) != ("additionalProperties", True)}


def test_schema_describes_every_key_and_accepts_the_shorthands():
    schema = recipe_schema()
    shipped = (shipped_recipes()["quick"].parent / "recipe.schema.json").read_text()
    one, two = (json.loads(text, object_hook=unrestricted_left_out) for text in (shipped, json.dumps(schema)))
    assert one == two
    for block in (schema, *schema["$defs"].values()):
        assert block["additionalProperties"] is False
        assert all("description" in key or "$ref" in key for key in block["properties"].values())
    assert schema["$defs"]["TargetSettings"]["type"] == ["object", "string"]


def test_paper_recipe_is_literal():
    recipe = Recipe.resolve("scap-paper-vgg16")
    assert (recipe.target.threshold, recipe.target.macs) == (0.6, None)
    assert (recipe.criterion.name, recipe.repair.least_squares) == ("scap", False)


@settings(deadline=None)  # the machine may be busy
@given(
    budget=st.sampled_from(["macs", "params", "ratio", "threshold"]),
    fraction=st.floats(0.01, 1),
    epochs=st.integers(0, 100),
    protect=st.lists(st.text("abc.*?[]", min_size=1), max_size=3),
    patience=st.none() | st.integers(1, 9),
)
def test_yaml_round_trip(tmp_path_factory, budget, fraction, epochs, protect, patience):
    recipe = Recipe.resolve(
        target={budget: fraction}, finetune_epochs=epochs, protect=protect, finetune_patience=patience
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe


def test_a_threshold_is_for_the_importances_of_scap():
    assert Recipe.resolve().criterion.name == "scap-set"
    assert Recipe.resolve(target="threshold=0.6").criterion.name == "scap"
    assert Recipe.resolve({"criterion": {"diagnostics": False}}, target="threshold=0.6").criterion.name == "scap"
    assert Recipe.resolve("quick").criterion.name == "scap-set"
    assert Recipe.resolve(target="threshold=0.6", criterion="l1").criterion.name == "l1"


def test_overrides_win_over_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("target: params=0.3\nfinetune: {epochs: 9, distillation: {temperature: 4}}\nseed: 3\n")
    recipe = Recipe.resolve(
        path,
        target="macs=0.25",
        criterion="l1",
        round_to=4,
        finetune={"optimizer": "sgd", "distillation": {"weight": 0.9}},
        finetune_learning_rate=0.1,
        data_dataset="digits",
    )
    assert (recipe.target.macs, recipe.target.params, recipe.target.round_to) == (0.25, None, 4)
    assert (recipe.criterion.name, recipe.criterion.options) == ("l1", {})
    assert (recipe.finetune.epochs, recipe.finetune.optimizer, recipe.finetune.learning_rate) == (9, "sgd", 0.1)
    assert (recipe.data.dataset, recipe.seed) == ("digits", 3)
    assert Recipe.resolve(recipe) is not None and Recipe.resolve(recipe, seed=4).seed == 4


def test_overriding_one_key_of_distillation_keeps_the_other():
    base = {"finetune": {"distillation": {"temperature": 4.0}}}
    assert Recipe.resolve(base, finetune_distillation={"weight": 0.9}).finetune.distillation.temperature == 4.0
    assert Recipe.resolve(base, finetune={"distillation": {"weight": 0.9}}).finetune.distillation.temperature == 4.0
    assert Recipe.resolve(base, finetune_distillation_weight=0.9).finetune.distillation.temperature == 4.0


@pytest.mark.parametrize(
    ("target", "kind", "value"),
    [
        ("ratio=0.5", "ratio", 0.5),
        ("threshold=0.6", "threshold", 0.6),
        ("latency=0.6", "latency", 0.6),
        ({"layer1.0.conv1": 0.5}, "ratio", {"layer1.0.conv1": 0.5}),
        ({"params": 0.3, "floor": 0.1}, "params", 0.3),
    ],
)
def test_forms_of_target(target, kind, value):
    resolved = Recipe.resolve("half-macs", target=target).target
    assert getattr(resolved, kind) == value
    assert resolved.macs is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"finetune_epoch": 3}, "unknown option 'finetune_epoch'; did you mean 'finetune_epochs'?"),
        ({"epochs": 3}, "did you mean 'finetune_epochs'?"),
        ({"finetune": {"lerning_rate": 1}}, "did you mean 'finetune.learning_rate'?"),
        ({"recipe": {"targt": "macs=0.5"}}, "unknown key 'targt'; did you mean 'target'?"),
        ({"recipe": {"round_to": 8}}, "did you mean 'target.round_to'?"),
        ({"target": "speed=0.5"}, "target 'speed=0.5' is not understood; write one of macs=0.5, "),
        ({"target": "macs=half"}, "target 'macs=half' is not understood"),
        ({"target": {"macs": 0.5, "params": 0.5}}, "macs and params contradict each other"),
        ({"target": {"latency": 0.5, "threshold": 0.6}}, "threshold and latency contradict each other"),
        ({"target_scope": "cost"}, "got 'cost'; did you mean 'cost-aware'?"),
        ({"target": 0.5}, "target 0.5 is not understood; macs=0.5 keeps that share"),
        ({"schedule_steps": True}, "schedule.steps: a number is wanted, not true"),
        ({"target_macs": 1.5}, "target.macs: Input should be less than or equal to 1, got 1.5"),
        ({"recipe": "half-mac"}, "no recipe 'half-mac': neither a file nor one of convnext, "),
        ({"recipe": "half-mac"}, "; did you mean 'half-macs'?"),
        (
            {"finetune_optimizer": "adam"},
            "finetune.optimizer: Input should be 'adamw' or 'sgd', got 'adam'; did you mean",
        ),
        (
            {"target": "threshold=0.6", "schedule_steps": 2},
            "options: target.threshold=0.6 and schedule.steps=2 contradict",
        ),
        ({"repair_tune": 5}, "repair.tune: Input should be a block of keys, such as repair.tune.steps, got 5"),
        (
            {"model_input_size": "3,64,64"},
            "model.input_size: Input should be a valid tuple, got '3,64,64'; write [3,64,64]",
        ),
        ({"target": {"ratio": {"a": "b"}}}, "target.ratio: Input should be a valid number, got {'a': 'b'}"),
        ({"data_batch_size": "9" * 50 + "x" * 900}, f"got '{'9' * 49}...{'x' * 24}'"),
        ({"target": "9" * 400}, f"target '{'9' * 49}...{'9' * 24}' is not understood"),
        ({"recipe": 3}, "a recipe is a name, a path, a dict or a Recipe, not int"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest_valid_one(arguments, message):
    with pytest.raises(RecipeError) as error:
        Recipe.resolve(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nfinetune:\n  epochs: 3\n  learning_rat: 0.1\n", "line 4: unknown key 'finetune.learning_rat'; did"),
        ("finetune:\n  # as many as fit\n  epochs: many\n", "line 3: finetune.epochs: Input should be a valid integer"),
        ("target:\n  macs: 0.5\n  ratio: 0.5\n", "line 1: target: macs and ratio contradict each other"),
        ("- finetune\n", "the document: Input should be a valid dictionary"),
        ("finetune: {epochs: 3\n", "is not YAML: while parsing a flow mapping"),
        ("seed: 1\nfinetune:\n  epochs: 3\n  epochs: 4\n", "line 4: 'epochs' stands twice; keep one of them"),
        ("seed: 1\nseed: 1\n", "line 2: 'seed' stands twice"),
        ("finetune:\n  epochs: true\n", "line 2: finetune.epochs: a number is wanted, not true"),
        ("target: {ratio: {stem: yes}}\n", "line 1: target.ratio"),
        ("seed: 1\ntarget: speed=2\n", "line 2: target: target 'speed=2' is not understood; write one of macs=0.5"),
        ("target: 0.5\n", "line 1: target: target 0.5 is not understood; macs=0.5 keeps"),
        ("x: !!python/object/apply:os.getcwd []\n", "is not YAML: could not determine a constructor"),
    ],
)
def test_mistakes_in_a_file_name_the_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named():
    with pytest.raises(RecipeError, match=r"recipe 'nowhere\.yaml' cannot be read"):
        Recipe.from_yaml(Path("nowhere.yaml"))


def test_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert Recipe.from_yaml(path) == Recipe()
    assert yaml.safe_load(Recipe().to_yaml())["target"]["macs"] == 0.5
