"""Reads thousands of broken plans, recipes, configs, folders and cards; `make fuzz`.

    python tools/fuzz.py --cases 10000 --seed 0

Each must end in an error of ours, in one line, or in a correct result. Meanwhile the process may use so much memory and
no more, and an audit hook sees whether anything is run, imported, reached over a network, or opened outside the folder
in question. The same seed makes the same cases; a fault is printed with its number, and `--only NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import yaml
from torch import nn

from scap_hub.channels import channel_groups
from scap_hub.channels.verified import apply_plan
from scap_hub.errors import ScapHubError
from scap_hub.hub.card import Measured, merged_card, model_card
from scap_hub.hub.checkpoint import load, save_checkpoint
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.zoo import load_model

MEMORY = 2 * 2**30
"""Bytes of address space that the cases may take beyond what the libraries have when they begin."""
SHARES = {"recipe": 35, "plan": 30, "card": 15, "config": 15, "folder": 5}
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "0", "0-7", "3,1", "0-700000000", "1e999", "*", "me/it--evil.Model", "../../etc/passwd", "\ud800", "\x00",
    "a" * 9999,
    "__class__", "forward", "stride", "cpu", "<!-- scap_hub: begin", "```", [], {}, [[]], {"a": 1}, [1] * 5000,
    "!!python/name:x",
]  # fmt: skip
SNIPPETS = [
    b"[" * 2000, b"{" * 2000, b"&a ", b"*a", b"---\n", b"```\n", b"<!-- scap_hub: end -->\n", b"\x00", b"\xff",
    b"9" * 5000,
    b"NaN", b".inf", b"!!int ", b"!!python/object:os.x ", b": ", b"- ", b"\n", b'"', b"1e999", b"\xf0\x9f\x92\xa9",
    b"<<: ",
]  # fmt: skip


class Net(nn.Module):
    """A residual block with a gate, where a width of 1 would go unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.gate = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.wide, self.back, self.head = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x * self.gate(x).sigmoid() + self.back(self.wide(x).relu())).mean((2, 3)))


class Watch:
    """An audit hook that notes what a case may not do; silent while nothing is watched."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        self.installed = (sys.prefix, sys.base_prefix, str(Path(torch.__file__).parents[1]), "/proc/meminfo")
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        kind = event.partition(".")[0]
        if event == "open":
            place = str(arguments[0])
            if not place.startswith((self.folder, *self.installed)) and not place.isdigit():
                self.seen.append(f"opens {place}")
        elif event == "import":
            if arguments[0].partition(".")[0] not in sys.modules:
                self.seen.append(f"imports {arguments[0]}")
        elif kind == "exec":
            where = getattr(arguments[0], "co_filename", "")
            if not where.startswith(self.installed) and where != "<string>" and not where.startswith("<frozen"):
                self.seen.append(f"executes {where}")
        elif kind in ("socket", "subprocess", "ctypes") or event in ("os.system", "os.exec", "os.posix_spawn"):
            self.seen.append(f"{event} {str(arguments)[:80]}")


def mutated(document: Any, draw: random.Random) -> Any:
    """A document with a few places changed, dropped, moved or repeated."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
        if not places:
            return draw.choice(STRANGE)
        holder, key = draw.choice(places)
        how = draw.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1:
            other, name = draw.choice(places)
            holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name])
        elif how == 2 and type(holder[key]) in (int, float):
            holder[key] = draw.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000, 1))
        elif how == 3 and isinstance(holder, dict):
            holder[str(draw.choice(STRANGE))[:50]] = holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return document


def _places(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def broken(content: bytes, draw: random.Random) -> bytes:
    """Bytes with a part cut out, repeated, changed or put in."""
    for _ in range(draw.choice((1, 1, 3))):
        one, two = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        content = draw.choice((
            content[:one] + content[two:], content[:one], content[:two] + content[one:],
            content[:one] + draw.randbytes(4) + content[one + 4 :],
            content[:one] + draw.choice(SNIPPETS) + content[one:],
        ))  # fmt: skip
    return content


class Cases:
    """What is broken, and what is done with it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.net = Net().eval()
        self.images = torch.randn(2, 3, 4, 4)
        groups = channel_groups(self.net, (self.images,))
        keep = {group.name: list(range(0, group.size, 2)) for group in groups.prunable}
        self.plan_text = PruningPlan.from_keep(groups, keep).to_json()
        self.recipe_text = Recipe.resolve("half-macs").to_yaml()
        self.folders = [self._saved("timm", "test_resnet"), self._saved("transformers", _tiny_resnet())]
        self.files = {folder: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in self.folders}
        self.loaded = load_model(self.net, input_size=(3, 4, 4))
        self.card_text = model_card(self.loaded, PruningPlan.from_json(self.plan_text), Measured(), self.recipe_text)

    def _saved(self, name: str, model: Any) -> Path:
        loaded = load_model(model, pretrained=False, input_size=(3, 32, 32))
        groups = channel_groups(loaded.module, torch.zeros(1, 3, 32, 32))
        plan = PruningPlan.from_keep(groups, {group.name: range(group.size // 2) for group in groups.prunable})
        return save_checkpoint(self.root / name, apply_plan(loaded.module, plan, verify=False), loaded, plan)

    def plan(self, draw: random.Random) -> None:
        """A plan from text; one that is read is applied, verified, and run."""
        document = json.dumps(mutated(json.loads(self.plan_text), draw)).encode()
        plan = PruningPlan.from_json(broken(document, draw) if draw.random() < 0.3 else document)
        with torch.no_grad():
            assert apply_plan(self.net, plan, True, (self.images,))(self.images).shape == (2, 3)

    def recipe(self, draw: random.Random) -> None:
        """A recipe from a file; one that is read is written and read again."""
        path, text = self.root / "recipe.yaml", self.recipe_text.encode()
        if draw.random() < 0.5:
            text = yaml.safe_dump(mutated(yaml.safe_load(text), draw)).encode("utf-8", "surrogatepass")
        path.write_bytes(broken(text, draw) if draw.random() < 0.7 else text)
        recipe = Recipe.from_yaml(path)
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert Recipe.from_yaml(path) == recipe

    def config(self, draw: random.Random) -> None:
        """A folder whose config or plan is another; what loads has finite weights, and is no larger."""
        name = draw.choice(("config.json", "config.json", "pruning_plan.json"))
        self._load(draw, name, lambda text: json.dumps(mutated(json.loads(text), draw)).encode())

    def folder(self, draw: random.Random) -> None:
        """A folder with a file that is damaged."""
        name = draw.choice(("config.json", "pruning_plan.json", "model.safetensors", "model.safetensors"))
        self._load(draw, name, lambda content: broken(content, draw))

    def _load(self, draw: random.Random, name: str, change: Callable[[bytes], bytes]) -> None:
        source = draw.choice(self.folders)
        folder = self.root / "case"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for own, content in self.files[source].items():
            (folder / own).write_bytes(change(content) if own == name else content)
        model = load(folder)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert sum(own.nbytes for own in model.parameters()) <= len(self.files[source]["model.safetensors"])

    def card(self, draw: random.Random) -> None:
        """A card of others that ours is merged into, and a card of ours with strange names; twice gives the same."""
        theirs = broken(self.card_text.encode(), draw).decode("utf-8", "replace")
        once = merged_card(theirs, self.card_text)
        assert merged_card(once, self.card_text) == once, "a second push changes the card"


def _tiny_resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.num_labels = 3
    return transformers.ResNetForImageClassification(config)


def main() -> int:
    """Runs the cases; returns 1 if one of them is a fault."""
    parser = argparse.ArgumentParser(description="Reads broken plans, recipes, configs, folders and cards.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat the case of this number, with its traceback")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    timm.list_models()
    with tempfile.TemporaryDirectory() as place:
        cases, watch = Cases(Path(place)), Watch()
        for folder in cases.folders:
            load(folder)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        ended: Counter[tuple[str, str]] = Counter()
        faults = 0
        for number in range(options.cases) if options.only is None else [options.only]:
            fault = run(cases, watch, options.seed, number, ended, options.only is not None)
            faults += fault is not None
            if fault:
                print(f"case {number}: {fault}", flush=True)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for (kind, how), count in sorted(ended.items()):
        print(f"{kind:7} {how:20} {count}")
    print(f"{sum(ended.values())} cases in {time.monotonic() - start:.0f} s, memory grew by at most {grown:.0f} MiB, "
          f"{faults} faults")  # fmt: skip
    return int(faults > 0)


def run(
    cases: Cases, watch: Watch, seed: int, number: int, ended: Counter[tuple[str, str]], verbose: bool
) -> str | None:
    """Runs one case; returns what is wrong, None if nothing is."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
    watch.seen, watch.folder, fault, how = [], str(cases.root), None, "correct"
    try:
        getattr(cases, kind)(draw)
    except ScapHubError as error:
        how = type(error).__name__
        if "\n" in str(error) or not 10 < len(str(error)) < 2000:
            fault = f"{kind}: message of {len(str(error))} characters: {str(error)[:300]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = f"{kind}: {type(error).__name__}: {str(error)[:300]}"
        if verbose:
            watch.folder = None
            traceback.print_exc()
    finally:
        watch.folder = None
    ended[kind, "fault" if fault or watch.seen else how] += 1
    return fault or (f"{kind}: {watch.seen[0]}" if watch.seen else None)


if __name__ == "__main__":
    sys.exit(main())
