"""report.html, from a real run on the digits, in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

import scap_hub
from scap_hub import errors
from scap_hub.page import render, write_page
from tests.browser import Page, browser
from tests.nets import tiny_net

DIGITS = Path(scap_hub.__file__).parent / "data" / "digits"
EVIL = "<script>alert(1)</script>"
RECIPE = {
    "target": "macs=0.4",
    "data": {"calibration_images": 64},
    "criterion": {"diagnostics": False},
    "finetune": {"epochs": 2},
    "evaluate": {"latency": True},
    "model": {"input_size": (1, 8, 8)},
}
QUICKLY = {"finetune_epochs": 0, "repair_tune_steps": 0, "evaluate_latency": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, one of whose classes has markup for a name."""
    folder = tmp_path_factory.mktemp("run")
    names = [EVIL if i == 3 else f"digit {i}" for i in range(10)]
    digits = datasets.DatasetDict({
        split: datasets.Dataset.from_parquet(str(DIGITS / f"{split}.parquet"), cache_dir=str(folder / "cache"))
        .cast_column("label", datasets.ClassLabel(names=names))
        for split in ("train", "test")
    })  # fmt: skip
    net = tiny_net()
    result = scap_hub.prune(net, digits, RECIPE, output_dir=folder / "out", restart=True)
    return result, folder / "out"


@pytest.fixture(scope="module")
def chromium():
    with browser() as launched:
        yield launched


def test_the_page_is_one_small_file_that_can_be_made_again(run, tmp_path):
    _, folder = run
    text = (folder / "report.html").read_text()
    assert len(text.encode()) < 200_000
    assert not re.search(r"(src|href)=\"(?!data:|#)", text), "nothing is loaded from anywhere"
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "report.html").unlink()
    command = [sys.executable, "-m", "scap_hub", "report", str(copy), "--json"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert told == {"file": str(copy / "report.html"), "lacks": None}
    assert (copy / "report.html").read_text() == text


def test_other_targets_are_what_select_gives(run):
    result, _ = run
    details, recipe = result.report.details, result.recipe.target
    groups = scap_hub.channel_groups(result.loaded.module, torch.zeros(1, 1, 8, 8))
    scores = {name: torch.tensor(group.scores, dtype=torch.float64) for name, group in result.report.groups.items()}
    total = sum(float(own.sum()) for own in scores.values())
    assert [choice.target for choice in details.choices][:2] == ["macs=1.0", "macs=0.95"] and len(details.choices) > 8
    for choice in details.choices[1:]:
        plan = scap_hub.select(groups, scores, choice.target, recipe.round_to, floor=recipe.floor, scope="cost-aware")
        keep = {name: plan.kept(name) for name in plan.groups}
        assert choice.widths == [len(keep.get(name, range(size))) for name, size in details.groups.items()]
        stays = groups.staying(keep)
        assert (choice.macs, choice.params) == (groups.macs(stays), groups.params(stays))
        kept = sum(float(own[keep[name]].sum() if name in keep else own.sum()) for name, own in scores.items())
        assert choice.loss == pytest.approx(1 - kept / total, abs=1e-12)
    own = next(choice for choice in details.choices if choice.target == "macs=0.4")
    assert (own.macs, own.params) == (result.report.after.macs, result.report.after.params)


def test_layers_classes_and_answers_are_those_of_the_models(run):
    result, _ = run
    details, report = result.report.details, result.report
    assert [layer.path for layer in details.layers] == ["0", "4", "10"]
    assert sum(layer.macs_before for layer in details.layers) == report.before.macs
    assert sum(layer.macs_after for layer in details.layers) == report.after.macs
    small = [result.model.get_submodule(layer.path).weight.shape[0] for layer in details.layers]
    assert [layer.after for layer in details.layers] == small
    assert all(layer.ms_before > 0 and layer.ms_after > 0 for layer in details.layers)
    right, images = map(sum, zip(*report.after.by_class.values(), strict=True))
    assert images == report.after.images == 360 and right / images == report.after.top1
    assert details.answers.images == 64 and len(details.answers.shown) <= details.answers.changed
    portrait = details.portraits[0]
    assert portrait.goes.row not in report.groups[portrait.layer].kept
    assert portrait.stays.row in report.groups[portrait.layer].kept
    assert max(map(max, portrait.goes.spectrum)) <= 100 and len(portrait.input) == 4


def test_mistakes_are_those_of_the_models(run, chromium):
    result, folder = run
    assert result.loaded.labels[3] == EVIL
    rows = datasets.Dataset.from_parquet(str(DIGITS / "test.parquet"), cache_dir=str(folder.parent / "cache"))
    pixels = torch.stack([pil_to_tensor(row["image"]).float() for row in rows]) / 255
    preprocessing = result.loaded.preprocessing
    mean, std = (torch.tensor(part)[:, None, None] for part in (preprocessing.mean, preprocessing.std))
    truth = torch.tensor(rows["label"])
    matrices = []
    for measures, model in ((result.report.before, result.loaded.module), (result.report.after, result.model)):
        with torch.no_grad():
            answers = model((pixels - mean) / std).argmax(1)
        expected = torch.zeros(10, 10, dtype=torch.int64).index_put_((truth, answers), torch.tensor(1), accumulate=True)
        found = torch.diag(torch.tensor([right for right, _ in measures.by_class.values()]))
        for row, own in measures.mistakes.items():
            for column, count in own.items():
                found[row, column] = count
        assert torch.equal(found, expected)
        matrices.append(expected)
    page = Page(chromium, folder / "report.html", 1440).page
    tables = page.locator(".confusion table")
    assert tables.count() == 2
    for table, expected in zip(tables.all(), matrices, strict=True):
        cells = [int(text or 0) for text in table.locator("tbody td").all_inner_texts()]
        assert cells == expected.flatten().tolist()
    dense, pruned = (matrix - torch.diag(matrix.diag()) for matrix in matrices)
    assert page.locator("td.worse").count() == int((pruned > dense).sum())


def test_mistakes_of_many_classes_are_bounded_to_the_same_pairs_of_both_models(monkeypatch):
    def mistakes():
        report = scap_hub.prune(tiny_net(), "digits", RECIPE, **QUICKLY).report
        return [
            {(truth, answer): count for truth, own in found.mistakes.items() for answer, count in own.items()}
            for found in (report.before, report.after)
        ]

    whole = mistakes()
    monkeypatch.setattr("scap_hub.run.by_class.PAIRS", 5)
    bounded = mistakes()
    kept = bounded[0].keys() | bounded[1].keys()
    assert len(kept) == 5 < len(whole[0].keys() | whole[1].keys())
    assert bounded == [{pair: count for pair, count in found.items() if pair in kept} for found in whole]
    changes = {pair: abs(whole[1].get(pair, 0) - whole[0].get(pair, 0)) for pair in whole[0].keys() | whole[1].keys()}
    assert min(changes[pair] for pair in kept) >= max(change for pair, change in changes.items() if pair not in kept)


def test_thousands_of_classes_are_bounded_to_those_that_changed_most(monkeypatch, run, tmp_path):
    whole = run[0].report
    monkeypatch.setattr("scap_hub.run.by_class.CLASSES", 4)
    monkeypatch.setattr("scap_hub.run.by_class.PAIRS", 2)
    net = run[0].loaded.module
    result = scap_hub.prune(net, "digits", RECIPE, **QUICKLY, output_dir=tmp_path / "o")
    before, after = result.report.before, result.report.after
    assert before.by_class.keys() == after.by_class.keys() and len(after.by_class) == 4
    assert all(before.by_class[number] == whole.before.by_class[number] for number in before.by_class)
    told = result.report.classes
    assert told.classes == 10 and before.images == after.images == 360
    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.run.by_class.CLASSES", 10)
        every = scap_hub.prune(net, "digits", RECIPE, **QUICKLY).report
    rows = [(now - right, images) for (right, images), (now, _) in
            zip(every.before.by_class.values(), every.after.by_class.values(), strict=True)]  # fmt: skip
    assert (told.lost, told.won) == (sum(row[0] < 0 for row in rows), sum(row[0] > 0 for row in rows))
    changes = [abs(change) / images for change, images in rows]
    assert min(changes[i] for i in after.by_class) >= max(changes[i] for i in range(10) if i not in after.by_class)
    page = (tmp_path / "o" / "report.html").read_text()
    assert f"Of 10 classes {told.lost} lost accuracy and {told.won} gained some. Shown are those" in page
    assert "measured on 360 images" in " ".join(repr(result).split())


@pytest.mark.parametrize("width", [375, 1440])
def test_the_page_in_a_browser(run, chromium, width):
    result, folder = run
    opened = Page(chromium, folder / "report.html", width, color_scheme="light")
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it fits the screen"
    choices = result.report.details.choices
    assert opened.text("#chosen") == "macs=0.4" and opened.text("#own") == "as in this run"

    page.focus("#target")
    page.keyboard.press("End")  # by keyboard, to the smallest
    last = choices[-1]
    assert opened.text("#chosen") == last.target and opened.text("#own") == ""
    for name in ("macs", "params", "loss"):
        assert float(page.get_attribute(f"#{name}", "data-value")) == getattr(last, name)
    assert page.get_attribute("#target", "aria-valuetext") == last.target
    page.locator("summary", has_text="Widths by group").click()
    assert [int(text) for text in page.locator("td.width").all_inner_texts()] == last.widths
    assert f'target="{last.target}"' in opened.text("#command")
    page.keyboard.press("Tab")

    light = opened.style("body", "backgroundColor")
    page.click("#theme")
    assert opened.style("body", "backgroundColor") != light
    page.click("#theme")
    assert opened.style("body", "backgroundColor") == light

    table = page.locator("section", has_text="Which classes paid")
    assert EVIL in table.inner_text(), "markup in a name is text"
    assert (
        page.locator("img:not([alt])").count() == 0
        and page.locator("svg:not([aria-label]):not([aria-hidden])").count() == 0
    )
    assert opened.faults == []


def test_the_page_follows_the_dark_scheme_and_prints(run, chromium):
    _, folder = run
    opened = Page(chromium, folder / "report.html", 1440, color_scheme="dark")
    dark = opened.style("body", "backgroundColor")
    opened.page.emulate_media(media="print")
    assert opened.style("body", "backgroundColor") == "rgb(255, 255, 255)" != dark
    assert opened.page.locator("button:visible, input:visible, select:visible").count() == 0
    assert "Move the slider" not in opened.text("section[aria-labelledby=other]")
    opened.page.set_viewport_size({"width": 703, "height": 1000})  # A4 between its margins
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 703, "nothing is cut off"
    cut = (
        "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth + 1 || box.getBoundingClientRect().right > 704)"
    )
    assert (
        opened.page.locator("main *:not(svg *):not(.hidden):visible").evaluate_all(
            f"{cut[:-1]}).map(box => box.outerHTML)"
        )
        == []
    )
    assert opened.style("tbody tr", "breakInside") == opened.style(".confusion", "breakInside") == "avoid"
    assert all(shown.is_visible() for shown in opened.page.locator(".portrait").all())


@pytest.mark.parametrize("width", [375, 1440])
def test_the_table_of_a_family_fits_the_screen(run, chromium, tmp_path, width):
    _, folder = run
    sizes = [
        {"name": name, "macs": macs, "params": 2 * macs, "top1": 0.9, "others": {"mean IoU": 0.8}, "latency_ms": 1.5}
        for name, macs in (("a_network_with_a_long_name.of_the_zoo", 4_000_000), ("macs-0.5", 2_000_000))
    ]
    family = {"metric": "top-1", "dense": sizes[0], "members": sizes[1:], "siblings": []}
    path = tmp_path / "report.html"
    path.write_text(render(json.loads((folder / "report.json").read_text()), family=family))
    opened = Page(chromium, path, width)
    table = opened.page.locator(".family")
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth"), "nobody has to scroll sideways"
    row = table.locator("tbody tr").last
    seen = row.evaluate(
        "row => [...row.cells].map(cell => getComputedStyle(cell, '::before').content.replaceAll('\"', '')"
        ".replace('none', '') + '|' + cell.innerText)"
    )
    values = [("", "macs-0.5"), ("MACs", "2 M"), ("parameters", "4 M"), ("top-1", "90.00 %"), ("mean IoU", "80.00 %"),
              ("latency", "1.50 ms")]  # fmt: skip
    assert seen == [f"{label if width == 375 else ''}|{value}" for label, value in values]
    boxes = [cell.bounding_box() for cell in row.locator("td").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    assert opened.faults == []


def test_a_comparison_in_the_folder_is_shown(run, tmp_path):
    _, folder = run
    copy = shutil.copytree(folder, tmp_path / "copy")
    cells = [
        {"target": "macs=0.5", "criterion": name, "seed": 0, "validation": value, "test": value, "repaired": value}
        for name, value in (("scap", 0.91), ("l1", 0.86))
    ]
    dense = {"macs": 1, "params": 1, "validation": 0.95, "test": 0.95}
    scap_hub.Comparison({"model": "net"}, dense, cells).save(copy / "comparison.json")
    text = write_page(copy)[0].read_text()
    assert "Criteria beside each other" in text and "91.00 ± 0.00" in text


def test_an_old_folder_says_what_it_lacks(run, tmp_path):
    _, folder = run
    copy = shutil.copytree(folder, tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    old = {key: value for key, value in report.items() if key not in ("details", "about")}
    old["before"].pop("by_class")
    (copy / "report.json").write_text(json.dumps(old))
    path, lacks = write_page(copy)
    assert "other targets" in lacks and lacks in path.read_text()


@pytest.mark.parametrize("content", [None, "[]", "{", "{}", '{"before": 3, "after": {}}', '{"before": NaN}'])
def test_a_folder_without_a_sound_report_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(errors.CheckpointError, match=r"report\.json|not as scap_hub writes"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_nobodys_images_are_published_unasked(run, tmp_path):
    from scap_hub.page import to_publish

    _, folder = run
    copy = shutil.copytree(folder, tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    shown = [{"before": 3, "after": 5, "sure_before": 0.9, "sure_after": 0.6, "jpeg": "/9j/thumb"}]
    report["details"]["answers"] = {"images": 64, "changed": 1, "shown": shown}
    (copy / "report.json").write_text(json.dumps(report))
    write_page(copy)
    assert "/9j/thumb" in (copy / "report.html").read_text()
    assert all(b"/9j/thumb" not in content for content in to_publish(copy).values()) and len(to_publish(copy)) == 2
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("thumbnails: false", "thumbnails: true"))
    assert to_publish(copy) == {}


NEAREST = """svg => {
  const points = [...svg.querySelectorAll("circle")].map(circle => circle.getBoundingClientRect());
  return [...svg.querySelectorAll("text.name")].map(text => {
    const b = text.getBoundingClientRect();  // letters are lower than the line
    const far = points.map(p => {
      const [x, y] = [p.x + p.width / 2, p.y + p.height / 2];
      return Math.hypot(Math.max(b.left - x, 0, x - b.right), Math.max(b.top + 4 - y, 0, y - b.bottom + 4));
    });
    return far.indexOf(Math.min(...far));
  });
}"""


def test_the_names_in_a_familys_charts_are_nearest_to_their_points(chromium, tmp_path):
    """Of a family with a sibling right below the point of one of its sizes."""
    figures = (("net", 2.29, 0.9972, 1.82), ("macs-0.75", 1.68, 0.9944, 1.738), ("macs-0.5", 1.098, 0.9917, 1.854),
               ("macs-0.25", 0.571, 0.9722, 1.213), ("smaller_net", 1.25, 0.9889, 1.79))  # fmt: skip
    dense, *members, sibling = (
        {"name": name, "target": name.replace("-", "="), "macs": 1e6 * macs, "params": 10**5, "top1": top1,
         "latency_ms": ms, "others": {}} for name, macs, top1, ms in figures
    )  # fmt: skip
    family = {"metric": "top-1", "dense": dense, "members": members, "siblings": [sibling]}
    measures = {"macs": 10**6, "params": 10**5, "bytes": 10**6, "top1": 0.9}
    report = {"before": measures, "after": measures, "about": {"target": "macs=0.5"}}
    (tmp_path / "page.html").write_text(render(report, family=family))
    page = Page(chromium, tmp_path / "page.html", 1440).page
    charts = page.locator("section:has(#family) svg").all()
    assert [chart.evaluate(NEAREST) for chart in charts] == [[0, 1, 2, 3, 4]] * 2
    assert page.locator("tr[aria-current] th").inner_text() == "macs-0.5 this one"


def test_a_large_network_has_a_small_page():
    """The shape of ResNet-50: 54 layers, 26,560 channels, 1000 classes."""
    generator = torch.Generator().manual_seed(0)
    sizes = {f"layer{i // 13}.{i % 13}.conv{i % 3}": 64 * 2 ** (i // 13) for i in range(53)}
    groups = {
        name: {"size": size, "kept": list(range(0, size, 2)), "scores": torch.rand(size, generator=generator).tolist()}
        for name, size in sizes.items()
    }
    layers = [
        {"path": name, "kind": "Conv2d 3x3", "groups": [name], "before": size, "after": size // 2,
         "macs_before": 10**8, "macs_after": 10**7, "ms_before": 0.5, "ms_after": 0.2}
        for name, size in sizes.items()
    ]  # fmt: skip
    choices = [
        {
            "target": f"macs={1 - i / 20:g}",
            "widths": list(sizes.values()),
            "macs": 10**9 - i,
            "params": 10**7,
            "loss": i / 20,
        }
        for i in range(19)
    ]
    channel = {"row": 1, "fidelity": 0.5, "spectrum": [[50] * 7] * 7, "restored": [[50] * 7] * 7}
    portraits = [
        {"layer": name, "images": 32, "input": [[9] * 7] * 7, "goes": channel, "stays": channel,
         "fidelity_gone": [0.5] * 40, "fidelity_kept": [0.25] * 40}
        for name in list(sizes)[:12]
    ]  # fmt: skip
    thumb = {"before": 1, "after": 2, "sure_before": 0.9, "sure_after": 0.8, "jpeg": "A" * 3000}
    counts = {str(number): [40, 50] for number in range(1000)}
    measures = {"macs": 10**9, "params": 10**7, "bytes": 10**8, "top1": 0.8, "by_class": counts}
    details = {
        "layers": layers, "groups": sizes, "choices": choices, "steps": 1, "portraits": portraits,
        "answers": {"images": 64, "changed": 30, "shown": [thumb] * 12}, "classes": dict.fromkeys(counts, "name"),
    }  # fmt: skip
    mistakes = [{"7": {str(7 + j): j + more for j in range(1, 10)}} for more in (0, 1)]
    before, after = ({**measures, "mistakes": own | {"999": {"0": 50}}} for own in mistakes)
    after["mistakes"]["500"] = {"501": 40}
    report = {"before": before, "after": after, "groups": groups, "details": details, "history": []}
    page = render(report)
    assert len(page.encode()) < 500_000
    numbers = r'<td class="number">(\d+)</td><td class="number">(\d+)</td>'
    shown = re.findall(rf'<th scope="row">name</th><td>name</td>{numbers}', page)
    assert shown[0] == ("0", "40") and ("50", "50") not in shown and len(shown) == 10, "those that changed most"


def test_all_metrics_of_the_task_have_a_tile():
    measures = {"macs": 10**9, "params": 10**7, "bytes": 10**8, "top1": 0.5, "others": {"mAP50": 0.75}}
    pruned = {**measures, "top1": 0.25, "others": {"mAP50": 0.5}}
    page = render({"before": measures, "after": pruned, "metric": {"name": "mAP", "key": "map"}})
    tiles = re.findall(r'<span class="what">(mAP\w*)</span><strong>([^<]*)</strong><span class="more">([^<]*)<', page)
    assert tiles == [
        ("mAP", "-25.00 points", "50.00 % to 25.00 %"), ("mAP50", "-25.00 points", "75.00 % to 50.00 %"),
    ]  # fmt: skip
