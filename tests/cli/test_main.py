"""The program: its help, its version, its exit codes, and where it prints."""

from __future__ import annotations

import importlib.metadata
import re
import resource
import subprocess
import sys

import pytest

import dicer

COMMANDS = ("prune", "plan", "apply", "diff", "export", "info", "methods", "entropy", "eval", "bench", "run", "report")
CLOSED = "standard output is closed"


def test_version(run):
    assert run("--version") == f"dicer {importlib.metadata.version('dicer')}\n"


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help(run, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "100")
    printed = run(*words)
    assert "Usage: dicer" in printed
    assert max(map(len, printed.splitlines())) <= 100
    if len(words) < 2:
        assert all(re.search(rf"^\W*{command}\s+\w", printed, re.M) for command in COMMANDS)


def test_home_folder_that_no_shell_put_in(run, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("prune", model, "--output=~/out", "--method", "weight-l2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_colours")
@pytest.mark.parametrize("words", [["prune", "MODEL", "-o", "OUT", "--method", "weight-l2"], ["--help"]])
def test_process_of_its_own(model, tmp_path, words):
    names = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    command = [sys.executable, "-m", "dicer.cli", *(names.get(word, word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    if words[0] == "prune":
        assert done.stdout.splitlines()[-1].startswith("Load it: ")
        assert dicer.load(tmp_path / "out").config.intermediate_size == 30


@pytest.mark.parametrize(
    ("shell", "says"),
    [('exec "$@" >&-', CLOSED), ('exec "$@" > full', "cannot print: File too large. Send the output")],
)
def test_place_that_cannot_be_printed_to(tmp_path, shell, says):
    def no_file_may_grow_long():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # bytes

    words = ["sh", "-c", shell, "sh", sys.executable, "-B", "-m", "dicer.cli", "methods"]
    limits = None if says == CLOSED else no_file_may_grow_long
    done = subprocess.run(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=limits)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dicer: {says}")
    assert done.stderr.count("\n") == 1


def test_closed_stderr(model):
    words = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "dicer.cli", "info", str(model)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert "parameters" in done.stdout


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "no/x"), "no/x: Permission denied. Check the path"),
        (OSError(28, "No space left on device"), "No space left on device. Check"),
        (OSError("several\nlines"), "several lines. Check"),
    ],
)
def test_error_of_the_system(monkeypatch, refused, model, tmp_path, error, says):
    from dicer import pipeline

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "prune", fail)
    assert refused("prune", model, "-o", tmp_path / "out").startswith(f"dicer: {says}")


def test_bug_with_its_traceback(monkeypatch, command, model, tmp_path):
    from dicer import pipeline

    def bug(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pipeline, "prune", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command("prune", model, "-o", tmp_path / "out")
