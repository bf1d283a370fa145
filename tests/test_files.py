"""Files that are whole or not there, and where one may be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dicer.errors import OutputError
from dicer.files import (
    as_output_error,
    check_writable,
    finite,
    folder_beside,
    is_there,
    remove_unfinished,
    remove_whole,
    undisturbed,
    unfinished,
    write_whole,
)


def _tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C interrupts, as at a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("content", ["text é\n", b"\xff\x00"])
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("there", ["nothing", "file", "link", "loop", "no folder"])
def test_whole_file(tmp_path, content, sync, there):
    path = tmp_path / ("deep/er" if there == "no folder" else "") / "file"
    (tmp_path / "victim").write_text("old")
    if there == "file":
        path.write_text("old")
    elif there in ("link", "loop"):
        path.symlink_to("victim" if there == "link" else "file")
    write_whole(path, content, sync=sync)
    assert not path.is_symlink()
    written = content.encode() if isinstance(content, str) else content
    assert _tree(tmp_path) == {str(path.relative_to(tmp_path)): written, "victim": b"old"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_from_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_longest_name(tmp_path):
    write_whole(tmp_path / ("x" * 255), "new")
    assert (tmp_path / ("x" * 255)).read_text() == "new"


@pytest.mark.parametrize(("name", "sync"), [("pathlib.Path.replace", False), ("os.fsync", True)])
def test_failure_leaves_what_was_there(tmp_path, monkeypatch, name, sync):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(name, _full)
    says = r"^cannot write the thing: No space left on device\.$"
    with pytest.raises(OutputError, match=says), as_output_error("the thing"):
        write_whole(tmp_path / "file", "new", sync=sync)
    assert _tree(tmp_path) == {"file": b"old"}


def test_names_in_the_making_are_new_and_closed_to_others(tmp_path):
    with folder_beside(tmp_path / "file") as first, folder_beside(tmp_path / "file") as second:
        assert first != second
        assert {first.parent, second.parent} == {tmp_path}
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
        assert unfinished(tmp_path) == {first, second}
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from dicer.files import write_whole
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = die
write_whole(pathlib.Path(sys.argv[1]), "new")
"""


def test_kill_before_the_rename(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / ".dicer-lock").touch()
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"
    assert len(unfinished(tmp_path)) == 1
    remove_unfinished(tmp_path)
    assert _tree(tmp_path) == {"file": b"old", ".dicer-lock": b""}


def _fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize("place", ["new", "deep/er/new", "file", "fifo", "link", "far"])
def test_writable_place(tmp_path, place):
    (tmp_path / "file").touch()
    _fifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "far").symlink_to("not/yet")
    led = {"link": "file", "far": "not/yet"}.get(place, place)
    assert check_writable(tmp_path / place, [tmp_path, tmp_path / "other", "gpt2", None, ""]) == tmp_path / led


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (".", "is the folder that you are in"),
        ("..", "is the folder that you are in, or holds it"),
        ("/", "is the folder that you are in, or holds it"),
        ("loop", "leads to itself"),
        ("loop/new", "leads to itself"),
        ("file/new", "file is a file"),
        ("x" * 300, "File name too long"),
        ("read/in", "is or holds read/in, which this run reads"),
        ("read", "is or holds read/in, which this run reads"),
        ("link", "is or holds read/in, which this run reads"),
    ],
)
def test_refused_place(tmp_path, monkeypatch, place, says):
    (tmp_path / "here" / "read").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("file", "read/in"):
        Path(name).touch()
    Path("loop").symlink_to("loop")
    Path("link").symlink_to("read")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=says):
        check_writable(Path(place), ["read/in"])
    assert sorted(tmp_path.rglob("*")) == before


def test_place_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the tests may run as root
    with pytest.raises(OutputError, match=f"no permission to write in {tmp_path}"):
        check_writable(tmp_path / "deep" / "new")


def _raised_within(steps):
    with undisturbed():
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            steps.append("inner")
        steps.append("outer")


def test_signal_in_a_block_that_is_done_whole():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        _raised_within(steps)
    assert steps == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_folder_that_goes_whole(tmp_path, monkeypatch):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove_whole(tmp_path / "none")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # in the middle: nothing of it has its name any more
            remove_whole(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_is_there(tmp_path):
    assert is_there(tmp_path)
    assert not is_there(tmp_path / "nothing")
    assert not is_there("x" * 300)


def test_finite_numbers():
    value = {"a": [1.5, float("inf"), (float("-inf"),)], "b": {"c": float("nan")}, "d": None, "e": 10**30}
    text = json.dumps(finite(value), allow_nan=False)
    assert json.loads(text) == {"a": [1.5, "inf", ["-inf"]], "b": {"c": "nan"}, "d": None, "e": 10**30}
