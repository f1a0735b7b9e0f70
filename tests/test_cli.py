"""The command line, in this process where one is enough."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import torch

import scap_hub
from scap_hub import cli
from scap_hub.channels import oracle
from scap_hub.cli.groups import print_groups
from scap_hub.errors import UnverifiableError, VerificationError
from scap_hub.recipe import Recipe, recipe_schema, shipped_recipes
from scap_hub.run.bench import Speed

TINY = [
    *("prune", "test_resnet", "--data", "digits", "--target", "macs=0.6"),
    *("--set", "model_pretrained=false", "--set", "model_num_classes=10", "--set", "model_input_size=[3, 32, 32]"),
    *("--set", "criterion=l1", "--set", "evaluate_latency=false", "--set", "data_calibration_images=16"),
    *("--set", "repair_tune_steps=2"),
]


@pytest.fixture
def run(capsys, monkeypatch):
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(variable, "")  # restored afterwards
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["scap-hub", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


def test_prune_prints_a_table_with_words_and_saves(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(*TINY, "--epochs", 0, "--set", "evaluate_latency=true", "--out", tmp_path / "out")
    assert code == 0 and f"saved in {tmp_path / 'out'}" in out
    assert max(len(line) for line in out.splitlines() if "saved in" not in line) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["MACs", "parameters", "size", "top-1", "latency"]
    assert all(re.search(r"[a-zA-Z%]$", row[3]) for row in rows), "each change has a unit"
    words = " ".join(out.split())
    for told in ("MACs are multiply-accumulate operations for one image.", "top-1 (Top-1 accuracy) is measured on 360",
                 "Latency is the median time of one forward pass with 1 image on ", "Verified: before repair",
                 "of all importance was in the channels that went."):  # fmt: skip
        assert told in words
    assert scap_hub.load(tmp_path / "out")(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.fixture
def not_installed(monkeypatch):
    """As where the sources lie on Python's path and nothing was installed."""
    found = metadata.Distribution.from_name

    def from_name(name):
        if name.replace("-", "_") == "scap_hub":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", from_name)


def test_prune_prints_json_and_keeps_quiet(run, not_installed):
    code, out, error = run(*TINY, "--set", "finetune_epochs=0", "--json", "--quiet")
    report = json.loads(out)
    assert (code, error) == (0, "")
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    about = {"model": "test_resnet", "target": "macs=0.6", "data": "digits", "criterion": "l1", "folder": None}
    assert about.items() <= report.items() and report["versions"]["torch"] == torch.__version__.partition("+")[0]
    code, out, error = run(*TINY, "--set", "finetune_epochs=0", "--quiet")
    assert (code, out, error) == (0, "", "")


def test_flags_that_people_type_reach_the_recipe(run, tmp_path):
    out = tmp_path / "out"
    flags = ["--epochs", 0, "--lr", 0.02, "--batch-size", 16, "--precision", "bf16", "--seed", 3, "--device", "cpu"]
    code, _, error = run(*TINY, *flags, "--set", "seed=4", "--out", out, "--quiet")
    assert (code, error) == (0, "")
    recipe = Recipe.from_yaml(out / "recipe.yaml")
    assert (recipe.finetune.epochs, recipe.finetune.learning_rate, recipe.finetune.precision) == (0, 0.02, "bf16")
    assert (recipe.data.batch_size, recipe.seed) == (16, 3)


def test_a_family_takes_the_flags_that_prune_takes(run, tmp_path):
    out, tiny = tmp_path / "out", [word for word in TINY[1:] if word not in ("--target", "macs=0.6")]
    flags = ["--epochs", 0, "--lr", 0.02, "--batch-size", 16, "--precision", "bf16", "--seed", 3, "--device", "cpu"]
    more = ["--criterion", "random", "--task", "image-classification"]
    code, _, error = run("family", *tiny, "--targets", "macs=0.6", *flags, *more, "--out", out, "--quiet")
    assert (code, error) == (0, "")
    recipe = Recipe.from_yaml(out / "macs-0.6" / "recipe.yaml")
    assert (recipe.finetune.epochs, recipe.finetune.learning_rate, recipe.finetune.precision) == (0, 0.02, "bf16")
    assert (recipe.data.batch_size, recipe.seed, recipe.task) == (16, 3, "image-classification")
    prune, family = (
        set(re.findall(r"^  (?:-q, )?(--[a-z-]+)", run(verb, "--help")[1], re.M)) for verb in ("prune", "family")
    )
    assert "--dry-run" in family and prune - family == {"--target"}


def test_version(run, not_installed):
    code, out, _ = run("--version")
    assert code == 0 and f"scap_hub {scap_hub.__version__}, torch {torch.__version__.partition('+')[0]}" in out


def test_two_processes_print_once_and_save_once(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "scap_hub", *TINY, "--set", "finetune_epochs=1", "--out", str(tmp_path / "out"), "--json"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout[ran.stdout.index("{") :]  # torch 2.9 has lines of its own before, "[Gloo] Rank 0 is connected"
    assert len(json.loads(printed)["history"]) == 2
    assert (tmp_path / "out" / "model.safetensors").is_file() and len(list(tmp_path.iterdir())) == 1


def test_compare(run, tmp_path):
    arguments = [
        "compare",
        "test_resnet",
        "--data",
        "digits",
        "--targets",
        "macs=0.6",
        "--criteria",
        "l1,random",
        "--seeds",
        1,
    ]
    for setting in (
        "model_pretrained=false",
        "model_num_classes=10",
        "model_input_size=[3, 32, 32]",
        "finetune_epochs=0",
        "repair_tune_steps=2",
    ):
        arguments += ["--set", setting]
    code, out, error = run(*arguments, "--out", tmp_path / "out.json", "--json")
    found = json.loads(out)
    assert (code, error) == (0, "") and [row["criterion"] for row in found["cells"]] == ["l1", "random"]
    code, out, _ = run(*arguments, "--out", tmp_path / "out.json")
    assert code == 0 and "mean rank" in out and "dense" in out
    assert "top-1 on the test images, more is better." in out and "1 is best." in " ".join(out.split())
    code, _, error = run(*arguments[:-2], "--criteria", "l3")
    assert code == 2 and "unknown criterion 'l3'" in error


OWN_CRITERION = """
from __future__ import annotations
from dataclasses import dataclass
import scap_hub

@dataclass(kw_only=True)
class Backwards(scap_hub.Criterion):
    name = "backwards-of-a-file"
    power: float = 1.0

    def score(self, model, groups, batches):
        import torch
        return {group.name: torch.arange(group.size).double() ** self.power for group in groups}

class Unnamed(scap_hub.Criterion):
    pass
"""


def test_a_criterion_of_a_file(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN_CRITERION)
    out = ("--set", "finetune_epochs=0", "--out", tmp_path / "out", "--json", "--quiet")
    own = ("--criterion", f"{file}:Backwards", "--set", "criterion_options={power: 2.0}")
    where = TINY.index("criterion=l1")
    arguments = TINY[: where - 1] + TINY[where + 1 :]
    code, printed, error = run(*arguments, *own, *out)
    assert (code, error) == (0, "")
    groups = json.loads(printed)["groups"].values()
    assert all(group["scores"] == [float(channel) ** 2 for channel in range(group["size"])] for group in groups)
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").criterion.name == f"{file}:Backwards"
    code, printed, _ = run(
        "compare", *arguments[1:4], "--targets", "macs=0.6", "--criteria", f"l1,{file}:Backwards", "--seeds", 1,
        *arguments[6:], "--set", "finetune_epochs=0", "--json",
    )  # fmt: skip
    assert code == 0, printed
    assert [cell["criterion"] for cell in json.loads(printed)["cells"]] == ["l1", f"{file}:Backwards"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/mine.py:Backward", "did you mean 'Backwards'?"),
        ("{}/mine.py:Unnamed", "mine.py:Unnamed'"),
        ("{}/nowhere.py:Mine", "nowhere.py:Mine': there is no file"),
        ("{}/broken.py:Mine", "name 'undefined' is not defined"),
        ("l3", "unknown criterion 'l3'"),
    ],
)
def test_a_criterion_that_is_not_there(run, tmp_path, name, message):
    (tmp_path / "mine.py").write_text(OWN_CRITERION.replace("of-a-file", f"of-{tmp_path.name}"))
    (tmp_path / "broken.py").write_text("undefined")
    code, _, error = run("prune", "test_resnet", "--criterion", name.format(tmp_path))
    assert code == 2 and message in error and "Traceback" not in error


def test_bench(run, tmp_path, monkeypatch):
    monkeypatch.setattr("scap_hub.run.bench.speeds", lambda models, size, batches, dtypes, modes, timer: [
        Speed(name, batch, "fp32", "eager", 2.0, 500.0 * batch, 1.0) for name in models for batch in batches
    ])  # fmt: skip
    code, out, error = run("bench", "test_resnet", "--against", "test_vit", "--batch", "1,4", "--size", 64, "--json")
    rows = json.loads(out)["rows"]
    assert (code, error) == (0, "") and [(row["model"], row["batch"]) for row in rows] == [
        ("test_vit", 1), ("test_vit", 4), ("test_resnet", 1), ("test_resnet", 4),
    ]  # fmt: skip
    code, out, _ = run("bench", "test_resnet")
    assert code == 0 and "speed-up" in out and "2.00" in out


def test_inspect(run):
    code, out, _ = run("inspect", "test_resnet", "--untrained", "--json")
    groups = json.loads(out)
    assert code == 0 and sum(group["macs"] for group in groups) == pytest.approx(1, abs=0.02)
    assert groups[-1]["pinned_because"] == "is an output of the model"
    assert "layer1.0.conv1" in run("inspect", "test_resnet", "--untrained")[1]
    assert run("inspect", "test_resnet", "--untrained", "--quiet")[:2] == (0, "")


def test_verify(run, tmp_path):
    code, out, _ = run("verify", "test_resnet", "--json")
    assert code == 0 and len(json.loads(out)) == 4 and all(error < 1e-9 for error in json.loads(out).values())
    model = scap_hub.zoo.load_model("test_resnet", pretrained=False)
    groups = scap_hub.channel_groups(model.module, torch.zeros(1, *model.preprocessing.input_size))
    plan = scap_hub.PruningPlan.from_keep(groups, {"layer1.0.conv1": range(8)})
    (tmp_path / "plan.json").write_text(plan.to_json())
    code, out, _ = run("verify", "test_resnet", "--plan", tmp_path / "plan.json")
    assert code == 0 and "plan.json: pruned equals masked" in out


def test_verify_draws_the_same_plans_for_the_same_seed(run):
    drawn = [
        run("verify", "test_resnet", "--json", "--seed", seed, "--plans", 3, "--size", 64)[1] for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] and len(json.loads(drawn[0])) == 3
    assert set(json.loads(drawn[0]).values()) != set(json.loads(drawn[2]).values())


def test_verify_writes_a_failing_plan_and_the_command_that_shows_it_again(run, tmp_path, monkeypatch):
    verify, tried = oracle.verify, []

    def second_is_wrong(model, plan, inputs):
        tried.append((plan, inputs, [parameter.sum().item() for parameter in model.parameters()]))
        if len(tried) != 1:
            raise VerificationError("the outputs differ")
        return verify(model, plan, inputs)

    monkeypatch.setattr(oracle, "verify", second_is_wrong)
    file = tmp_path / "wrong plan.json"
    code, _, error = run("verify", "test_resnet", "--seed", 3, "--size", 64, "--out", file)
    assert code == 1 and "scap-hub: the outputs differ" in error, "our fault, not the user's"
    assert scap_hub.PruningPlan.from_json(file.read_text()) == tried[1][0]
    command = shlex.split(error.strip().rpartition("To repeat it: ")[2])
    assert command == ["scap-hub", "verify", "test_resnet", "--plan", str(file), "--seed", "3", "--size", "64"]
    written = file.read_bytes()
    assert run(*command[1:])[0] == 1 and file.read_bytes() == written
    (first, second), third = tried[:2], tried[2]
    assert first[0] != second[0] == third[0] and torch.equal(second[1], third[1]) and second[2] == third[2]

    monkeypatch.chdir(tmp_path)
    assert run("verify", "test_resnet", "--size", 64)[0] == 1 and (tmp_path / "failing-plan.json").is_file()


def test_verify_tells_a_model_that_cannot_be_compared_from_a_wrong_plan(run, tmp_path, monkeypatch):
    def cannot(*_):
        raise UnverifiableError("the dense model is random")

    monkeypatch.setattr(oracle, "verify", cannot)
    monkeypatch.chdir(tmp_path)
    code, _, error = run("verify", "test_resnet", "--size", 64)
    assert code == 2 and "the dense model is random" in error and not list(tmp_path.iterdir())


def test_recipes(run, tmp_path):
    assert json.loads(run("recipe", "list", "--json")[1]).keys() == shipped_recipes().keys()
    assert "no-training" in run("recipe", "list")[1]
    code, out, _ = run("recipe", "show", "half-macs", "--set", "finetune_epochs=20")
    (tmp_path / "mine.yaml").write_text(out)
    assert code == 0 and Recipe.from_yaml(tmp_path / "mine.yaml") == Recipe.resolve("half-macs", finetune_epochs=20)
    assert json.loads(run("recipe", "show", tmp_path / "mine.yaml", "--json")[1])["finetune"]["epochs"] == 20
    assert run("recipe", "show", "quick", "--quiet")[:2] == (0, "")
    assert json.loads(run("recipe", "schema")[1]) == recipe_schema()


def test_a_dry_run_tells_what_the_run_does_and_writes_nothing(run, tmp_path):
    code, out, _ = run(*TINY, "--epochs", "3", "--out", tmp_path / "out", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and not list(tmp_path.iterdir())
    assert told["groups"] == 11 and list(told["pinned"].values()) == [1] and told["target"] == "macs=0.6"
    assert 0.5 < told["macs"][1] / told["macs"][0] < 0.6 and told["params"][1] < told["params"][0]
    assert told["seconds"]["fine-tuning"] > told["seconds"]["measuring"] > 0 and told["memory"] > 4 * 373_658 * 4
    assert "11 prunable, with 672 channels" in run(*TINY, "--dry-run")[1]


def test_a_dry_run_of_a_family_tells_each_size_and_what_all_of_them_take(run, tmp_path):
    tiny = [word for word in TINY[1:] if word not in ("--target", "macs=0.6")]
    arguments = ["family", *tiny, "--targets", "macs=0.8,macs=0.6", "--epochs", 3, "--out", tmp_path / "out"]
    code, out, _ = run(*arguments, "--siblings", "test_resnet", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and not list(tmp_path.iterdir())
    assert list(told["sizes"]) == ["macs-0.8", "macs-0.6"]
    shares = [size["macs"][1] / size["macs"][0] for size in told["sizes"].values()]
    assert 0.7 < shares[0] < 0.8 and 0.5 < shares[1] < 0.6
    one, whole = told["sizes"]["macs-0.6"]["seconds"], told["seconds"]
    assert whole["fine-tuning"] == pytest.approx(2 * one["fine-tuning"])
    assert whole["measuring"] == pytest.approx(1.5 * one["measuring"])
    assert whole["training and measuring test_resnet"] > 0
    lines = run(*arguments, "--dry-run")[1].splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("target")] == ["target macs=0.8", "target macs=0.6"]
    code, _, error = run(*arguments, "--teacher", "larger", "--dry-run")
    assert code == 2 and "take dense or next-larger" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "resnet81", "--data", "digits"], "unknown model 'resnet81': did you mean 'resnet"),
        (["prune", "test_resnet", "--target", "speed=2"], "target 'speed=2' is not understood; write one of macs=0.5"),
        (
            ["inspect", "pyproject.toml"],
            "'pyproject.toml' is a file: a saved model is given as its folder, and a file of",
        ),
        (["inspect", "no/model"], "cannot reach the Hub for 'no/model', there is no such folder, and it is not in the"),
        (["prune", "test_resnet", "--target", "0.5"], "'0.5' is not understood; macs=0.5 keeps that share of"),
        (["prune", "test_resnet", "--set", "epochs=2"], "unknown option 'epochs'; did you mean 'finetune_epochs'?"),
        (["family", "test_resnet", "--set", "targets=[macs=0.5]"], "unknown option 'targets'"),
        (["family", "test_resnet", "--targets", "macs=2"], "target macs is 2"),
        (["prune", "test_resnet", "--set", "epochs"], "--set 'epochs': write KEY=VALUE"),
        (["prune", "test_resnet", "--set", "seed={"], "--set 'seed={': '{' is not a YAML value"),
        (["prune", "test_resnet", "--recipe", "half-mac"], "did you mean 'half-macs'?"),
        (["prune", "test_resnet", "--nonsense"], "--nonsense"),
        (["prune", "test_resnet", "--device", "gpu9"], "--device 'gpu9' cannot be used here"),
        (["prune", "test_resnet", "--data", "digits", "--epochs", "-1"], "finetune.epochs: Input should be greater"),
        (["bench", "test_resnet", "--batch", "many"], "batch sizes [0]"),
        (["bench", "test_resnet", "--dtype", "fp8"], "give dtypes out of fp32"),
        (["inspect"], "see `scap-hub inspect --help`"),
        (["inspect", "resnet81", "--untrained"], "unknown model 'resnet81'"),
        (["verify", "test_resnet", "--plan", "nowhere.json"], "'nowhere.json' does not exist"),
        (["push", "nowhere", "me/net"], "nowhere"),
        (["export", "./nowhere"], "nowhere"),
        (["recipe"], "see `scap-hub recipe --help`"),
        (["recipe", "show", "quik"], "did you mean 'quick'?"),
        (["nonsense"], "see `scap-hub --help`"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, arguments, message, tmp_path):
    out = ["--out", tmp_path / "out"] if arguments[0] == "prune" else []
    code, _, error = run(*arguments, *out)
    last = error.splitlines()[-1].rpartition("\r")[2].strip()
    assert code == 2 and last.startswith("scap-hub: ") and message in last
    assert "Traceback" not in error and not list(tmp_path.iterdir())


def test_interrupting_says_how_to_go_on(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("scap_hub.run.pruning.prune", interrupt)
    monkeypatch.setattr(scap_hub, "prune", interrupt, raising=False)
    code, _, error = run(*TINY)
    assert code == 130 and error.startswith("scap-hub: interrupted; with the same --out")


VERBS = [
    *(["prune"], ["compare"], ["inspect"], ["verify"], ["bench"], ["push"], ["export"], ["demo"]),
    *(["family"], ["report"]),
    *(["recipe", "list"], ["recipe", "show"], ["recipe", "schema"]),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_an_example(run, verb):
    code, out, _ = run(*verb, "--help")
    assert code == 0 and f"Example: scap-hub {' '.join(verb)}" in out


@pytest.mark.parametrize("group", [[], ["recipe"]], ids=["", "recipe"])
def test_help_cuts_no_sentence(run, group):
    shown = run(*group, "--help")[1]
    commands = shown.rpartition("Commands:")[2]
    assert "..." not in commands and commands.count(".") >= (3 if group else 11)


def test_help_tells_the_exit_codes(run):
    assert run("--help")[1] == run()[1] and "Exit code 0" in run()[1]


def test_inspect_fits_into_80_columns_and_cuts_no_name(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    groups = json.loads(run("inspect", "test_vit", "--untrained", "--json")[1])
    for columns in (80, 50):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = run("inspect", "test_vit", "--untrained")[1]
        assert max(map(len, shown.splitlines())) <= columns
        joined = re.sub(r"\s+", "", shown)
        assert all(group["name"] in joined and str(group["size"]) in joined for group in groups)
        assert "whole:itisanoutputofthemodel" in joined
    dearest = [line.split()[0] for line in run("inspect", "test_vit", "--untrained", "--sort", "macs")[1].splitlines()]
    assert dearest[1] == max(groups, key=lambda group: group["macs"])["name"]
    wide = run("inspect", "test_vit", "--untrained", "--wide")[1]
    assert all(producer in wide for group in groups for producer in group["producers"])


def test_a_name_that_does_not_fit_goes_on_in_the_next_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = "model.encoder.layers.0.attention.attention.projection_of_the_query_and_the_key.weights"
    rows = [{"name": name, "size": 64, "macs": share, "pinned_because": None, "constraint": [], "prunable": True}
            for share in (0.4, 0.6)]  # fmt: skip
    print_groups(rows, blocks=True)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert "    model.encoder.layers.0.\n".strip() in shown, "it is cut behind a dot"
    assert name in re.sub(r"\s+", "", shown)


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "█"), ("cp1252", "#"), ("ascii", "#")])
def test_bars_are_of_signs_that_the_output_has(monkeypatch, encoding, sign):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    rows = [{"name": name, "size": 64, "macs": share, "pinned_because": None, "constraint": [], "prunable": True}
            for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.0))]  # fmt: skip
    print_groups(rows, blocks=False)
    sys.stdout.flush()
    assert [line.count(sign) for line in written.getvalue().decode(encoding).splitlines()[1:4]] == [10, 5, 0]


def test_a_fault_of_ours_is_json_too(run, monkeypatch, capsys):
    def fault(*_):
        raise RuntimeError("not foreseen")

    monkeypatch.setattr("scap_hub.cli.models.groups_of", fault)
    monkeypatch.setattr(sys, "argv", ["scap-hub", "inspect", "test_resnet", "--json"])
    with pytest.raises(RuntimeError):
        cli.main()
    assert json.loads(capsys.readouterr().out) == {"error": "RuntimeError: not foreseen", "exit_code": 1}


def test_errors_are_json_where_json_is_asked_for(run):
    code, out, error = run("inspect", "resnet81", "--untrained", "--json")
    assert code == 2 and json.loads(out) == {"error": error.removeprefix("scap-hub: ").strip(), "exit_code": 2}


def test_every_command_can_print_json_and_be_quiet():
    import typer

    from scap_hub.cli.app import app

    def leaves(command):
        children = getattr(command, "commands", None)
        return [leaf for child in children.values() for leaf in leaves(child)] if children else [command]

    for command in leaves(typer.main.get_command(app)):
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet"} <= options, command.name
