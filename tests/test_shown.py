"""What objects show of themselves in a terminal and in a notebook, and what progress leaves behind."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types

import pytest
import torch

import scap_hub
from scap_hub import errors, progress
from scap_hub.cli.output import output
from scap_hub.run.stages import Stages
from tests.nets import Residual, tiny_net

RECIPE = {
    "target": "macs=0.4", "data": {"calibration_images": 32}, "criterion": {"name": "l1", "diagnostics": False},
    "finetune": {"epochs": 1}, "evaluate": {"latency": False}, "model": {"input_size": (1, 8, 8)},
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return scap_hub.prune(tiny_net(), "digits", RECIPE)


def test_reprs_are_short_and_have_html(result):
    groups = scap_hub.channel_groups(Residual(width=64), torch.zeros(1, 3, 32, 32))
    for shown in (result, result.report, result.plan, groups):
        assert 0 < len(repr(shown).splitlines()) < 20 and max(map(len, repr(shown).splitlines())) < 120
        assert shown._repr_html_().count("<tr>") >= 2
    assert "MACs" in repr(result) and "macs=0.4" in repr(result)
    assert repr(result.plan) == str(result.plan) and "2 groups keep" in repr(result.plan)


def test_long_lists_are_cut_and_markup_is_text():
    net = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(40)), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    groups = scap_hub.channel_groups(net, torch.zeros(1, 4, 1, 1))
    html = groups._repr_html_()
    assert html.count("<tr>") < 20 and re.search(r"\.\.\. and \d+ more", html)
    plan = scap_hub.PruningPlan.from_json(
        scap_hub.PruningPlan(keeps=("0",), groups={"<b>": {"size": 2, "keep": 0}}, tensors={}).to_json()
    )
    assert "<b>1" not in plan._repr_html_() and "&lt;b&gt;" in plan._repr_html_()


def test_a_report_draws_itself(result):
    pytest.importorskip("matplotlib")
    for kind in ("channels", "training", "targets", "classes"):
        figure = result.report.plot(kind)
        assert figure._repr_png_().startswith(b"\x89PNG") and figure.axes[0].has_data()
        (legend,) = figure.legends
        below = figure.axes[0].get_window_extent().y1
        assert legend.get_window_extent().y0 >= below, "it lies on nothing that is drawn"
        if kind == "training":
            assert all(tick == int(tick) for tick in figure.axes[0].get_xticks()), "epochs are whole"
            assert {"loss", "validation loss", "top-1"} == {text.get_text() for text in legend.get_texts()}
    with pytest.raises(errors.ScapHubError, match="did you mean 'training'"):
        result.report.plot("trainin")


@pytest.fixture
def notebook(monkeypatch):
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_a_stage_leaves_one_line_in_a_notebook(notebook, capsys):
    stages = Stages(0)
    with stages("scores"):
        for _ in progress.track(range(3), "outer"):
            assert list(progress.track(range(3), "inner")) == [0, 1, 2]
    left = screen(capsys.readouterr().err)
    assert len(left) == 1 and re.fullmatch(r"scores +0\.0 s", left[0])


def test_each_stage_of_a_run_leaves_one_line_in_a_notebook(notebook, capsys):
    scap_hub.prune(tiny_net(), "digits", RECIPE)
    left = screen(capsys.readouterr().err)
    named = [found[1] for line in left if (found := re.fullmatch(r"([a-z -]+?) +\d+\.\d s", line))]
    assert len(named) == len(set(named)) > 8, named
    others = [line for line in left if not re.fullmatch(r".* s", line)]
    assert all(line.startswith("epoch ") for line in others), others


def test_no_bars_without_a_terminal(capsys):
    with progress.announce("loading"):
        assert list(progress.track(range(3), "scores")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


COLUMNS = 80


def shown_in_a_terminal(*command, ctrl_c_at=None):
    """What a Python command writes to standard error where that is a terminal of 80 columns.

    Once it has written `ctrl_c_at`, somebody there presses Ctrl-C.
    """
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    running = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=end, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(2, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
        if ctrl_c_at is not None and ctrl_c_at.encode() in shown:
            os.write(terminal, b"\x03")
            ctrl_c_at = None
    running.communicate()
    return shown.decode()


@pytest.mark.parametrize("model", ["resnet10t", "no-such-model"])
def test_bars_leave_nothing_on_the_screen(model):
    shown = shown_in_a_terminal("-m", "scap_hub", "inspect", model, "--untrained", "--size", "32")
    left = screen(shown)
    assert "loading" in shown or model != "resnet10t", "there were bars"
    assert all(line.startswith("scap-hub: ") for line in left) and len(left) == (model != "resnet10t"), left


WARNING = """
import warnings, scap_hub
from scap_hub.cli.output import output
from scap_hub.progress import announce, tell
with output(quiet=False), announce("working"):
    warnings.warn_explicit("tuning did not help", UserWarning, scap_hub.__file__, 1)
    warnings.warn_explicit("old call", UserWarning, "other.py", 7)
    tell("epoch 1 of 20: " + "loss 1.6640, validation loss 1.9040, " * 3)
"""


def test_warnings_and_lines_that_stay_are_whole_lines_on_the_screen():
    shown = shown_in_a_terminal("-c", WARNING)
    left = screen(shown)
    assert "working ..." in shown
    assert left[:2] == ["warning: tuning did not help", "other.py:7: UserWarning: old call"]
    assert all(re.match(r"epoch|  [a-z0-9]", line) and len(line) <= 80 for line in left[2:]) and len(left) == 4
    assert " ".join(line.strip() for line in left[2:]).count("validation loss 1.9040,") == 3, "no word is broken"


INTERRUPTED = """
import time
from scap_hub.cli.output import output
from scap_hub.progress import announce, track
with output(quiet=False), announce("fine-tuning"):
    for _ in track(range(20), "epoch 1 of 3"):
        time.sleep(0.3)
"""


def test_ctrl_c_leaves_nothing_of_bars_on_the_screen():
    shown = shown_in_a_terminal("-c", INTERRUPTED, ctrl_c_at="1/20")
    left = screen(shown, COLUMNS)
    assert "^C" in shown and left[0].startswith("scap-hub: interrupted; ") and "fine-tuning" not in "".join(left), left


class Interrupting(io.StringIO):
    """A terminal where Ctrl-C is pressed after one of the writes to it."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def isatty(self):
        return True

    def write(self, text):
        super().write(text)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", range(1, 12))
def test_ctrl_c_at_any_moment_of_drawing_leaves_nothing_of_bars(after, monkeypatch):
    terminal = Interrupting(after)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit), output(quiet=False), progress.announce("fine-tuning"):
        for _ in progress.track(range(20), "epoch 1 of 3", mininterval=0):
            pass
    assert [line[:23] for line in screen(terminal.getvalue())] == ["scap-hub: interrupted; "]


def screen(text, columns=None):
    """The lines that are not blank once a terminal, of that width, has shown a text."""
    lines, row, column = [[]], 0, 0
    for found in re.finditer(r"\x1b\[A|\x1b\[\d*[A-Za-z]|\r|\n|.", text):
        match found[0]:
            case "\r":
                column = 0
            case "\n":
                row, column = row + 1, 0
            case "\x1b[A":
                row -= 1
            case sign if not sign.startswith("\x1b"):
                if column == columns:
                    row, column = row + 1, 0
                lines += [[] for _ in range(row + 1 - len(lines))]
                lines[row] += [" "] * (column + 1 - len(lines[row]))
                lines[row][column] = sign
                column += 1
    return [line for line in ("".join(line).rstrip() for line in lines) if line]
