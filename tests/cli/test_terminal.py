"""What the commands share: bars, tables that no terminal cuts, files of results."""

from __future__ import annotations

import json
import os
import re
import socket
import sys

import pytest
from rich.console import Console

from dicer.ask.methods import ALLOCATIONS, PRESETS
from dicer.cli import terminal
from dicer.decide.grouping import GROUPINGS
from dicer.decide.merging import MERGES
from dicer.errors import OutputError
from dicer.measure.criteria import CRITERIA


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 80 columns."""
    monkeypatch.setattr(terminal, "console", lambda: Console(width=80, highlight=False, emoji=False))


@pytest.mark.usefixtures("narrow")
def test_names_on_a_narrow_terminal(run):
    printed = run("methods")
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for name in (*PRESETS, *CRITERIA, *GROUPINGS, *MERGES, *ALLOCATIONS):
        assert f"│ {name} " in printed


@pytest.mark.usefixtures("narrow")
def test_numbers_on_a_narrow_terminal(run, model):
    flags = ("--tokens", 2, "--batch-sizes", "1,2", "--prompt-length", 4, "--rounds", 1)
    printed = run("bench", model, *flags)
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    assert [row for row in rows if row[0] == "batch"] == [["batch", "1"], ["batch", "2"]]
    assert all(re.fullmatch(r"[\d,.]+ \([\d,.]+ to [\d,.]+\)", value) for name, value in rows if "tokens/s" in name)


@pytest.mark.parametrize(("after", "shown"), [(10.0, False), (-1.0, True)])
def test_bar_of_a_stage_that_takes_long(monkeypatch, capsys, after, shown):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich believe in a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "_SHOW_AFTER", after)
    with terminal.Bar() as progress:
        for done in range(3):
            progress("calibration", done + 1, 3)
        progress("write", 1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert [stage in err for stage in ("calibration", "write")] == [shown, shown]
    assert bool(err) == shown


def test_bar_of_a_stage_that_comes_again(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.Bar() as progress:
        for time, done in ((0, 0), (1, 3), (60, 0), (61, 1)):
            now[0] = time
            progress("calibration", done, 3)
    assert capsys.readouterr() == ("", "")
    with terminal.Bar() as progress:
        for time, done in ((0, 0), (3, 1)):
            now[0] = time
            progress("calibration", done, 3)
    assert "calibration" in capsys.readouterr().err


@pytest.mark.parametrize("on_terminal", [False, True])
def test_bars_of_downloads(monkeypatch, on_terminal):
    from huggingface_hub import utils

    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
    try:
        terminal.quiet_transformers()
        assert utils.are_progress_bars_disabled() != on_terminal
    finally:
        utils.disable_progress_bars()


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_fifo, "is no regular file"),
        (_socket, "is no regular file"),
        (lambda path: path.symlink_to(path), "leads to itself"),
        (lambda path: path.write_text("mine"), "is no result of this command"),
        (lambda path: path.write_bytes(b"\xff"), "is no result of this command"),
        (lambda path: path.write_text("[]"), "is no result of this command"),
        (lambda path: path.write_text("[" * 10**5), "is no result of this command"),
        (lambda path: path.write_text('{"model": "mine", "evaluation": {}}'), "is no result of this command"),
    ],
)
def test_what_is_no_result_is_never_replaced(monkeypatch, tmp_path, make, says):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    file = tmp_path / "result.json"
    make(file)
    before = file.lstat()
    with pytest.raises(OutputError, match=says):
        terminal.check_file(file, overwrite=True, keys=["model", "evaluation", "tasks"])
    assert (file.lstat(), [*tmp_path.iterdir()]) == (before, [file])


def test_large_file_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "large.json"
    file.write_text('{"a": 1}')
    terminal.check_file(file, overwrite=True, keys=["a"])
    monkeypatch.setattr(terminal, "_LARGEST_RESULT", 7)
    with pytest.raises(OutputError, match="is no result"):
        terminal.check_file(file, overwrite=True, keys=["a"])


def test_result_on_a_full_disk(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    terminal.write_result(file, {"a": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal.Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        terminal.write_result(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_result_with_an_infinite_number(tmp_path):
    terminal.write_result(tmp_path / "result.json", {"value": float("inf")})
    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert float(found["value"]) == float("inf")
