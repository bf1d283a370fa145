"""A kill at any moment leaves no output or a whole one, and the next run ends right."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import dicer
from dicer.ask.recipe import Recipe
from dicer.errors import OutputError
from dicer.write import sink

POINTS, LAST = 4, 18

# Imports once, then forks a child for each kill. An event is whatever Python does to a file below the output's parent;
# the child kills itself just before the one that it was told. Where: a few events from first to last, each of the last
# ones (the renames are there), and, as point -1, the middle of a weight file. "new" is an empty folder before the
# run, "over" holds an older checkpoint that --overwrite replaces, "apart" too; there names cannot be exchanged.
RUNNER = """
import json, os, pathlib, shutil, signal, sys

parent, model, spread, last = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
import torch
torch.set_num_threads(1)
import dicer, dicer.holds, dicer.write.sink
from transformers import AutoModelForCausalLM
from dicer.ask.recipe import Recipe

WATCHED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "shutil.copyfile")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watch(folder, last):
    seen = [0]

    def hook(event, args):
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in WATCHED
        # rmtree names files relative to an open folder
        if not writes or (os.path.isabs(args[0]) and not str(args[0]).startswith(str(folder))):
            return
        if seen[0] == last:
            die()
        seen[0] += 1

    sys.addaudithook(hook)
    return seen


def half_a_file(path, infos, read):
    pathlib.Path(path).write_bytes(b"half")
    die()


def run(kind, point):
    folder = parent / f"{kind}-{point}"
    shutil.copytree(parent / kind, folder)
    child = os.fork()
    if child == 0:
        if point == -1:
            dicer.write.sink.write_file = half_a_file
        if kind == "apart":
            dicer.holds.exchange = lambda *_: False
        seen = watch(folder, point)
        dicer.prune(
            model, Recipe(method="weight-l2", layers="1-2"), output=folder / "out", overwrite=kind != "new"
        )
        (parent / "count").write_text(str(seen[0]))
        os._exit(0)
    return [folder.name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


killed = []
for kind in ("new", "over", "apart"):
    assert run(kind, None)[1] == 0
    total = int((parent / "count").read_text())
    points = {round(i * (total - 1) / (spread - 1)) for i in range(spread)} | {*range(total - last, total), -1}
    killed += [run(kind, point) for point in sorted(points)]
print(json.dumps(killed))
"""


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def old(model, tmp_path_factory):
    """An older checkpoint, which an --overwrite replaces."""
    folder = tmp_path_factory.mktemp("old") / "out"
    dicer.prune(model, Recipe(method="random"), output=folder)
    return _bytes(folder)


@pytest.fixture(scope="module")
def new(model, tmp_path_factory):
    """What a run that nobody kills writes."""
    folder = tmp_path_factory.mktemp("new") / "out"
    _prune(model, folder)
    return _bytes(folder)


@pytest.fixture(scope="module")
def killed(model, old, tmp_path_factory):
    """Every kill: (folder that holds ``out``, its kind, exit code)."""
    base = tmp_path_factory.mktemp("killed")
    (base / "new").mkdir()
    _restore(base / "over" / "out", old)
    _restore(base / "apart" / "out", old)
    command = [sys.executable, "-c", RUNNER, base, model, POINTS, LAST]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return [(base / name, name.partition("-")[0], code) for name, code in json.loads(done.stdout)]


def _restore(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _prune(model, out, **options):
    dicer.prune(model, Recipe(method="weight-l2", layers="1-2"), output=out, **options)


def test_every_child_was_killed_at_many_points(killed):
    for kind in ("new", "over", "apart"):
        assert sum(other == kind for _, other, _ in killed) > POINTS
    assert [code for _, _, code in killed] == [-signal.SIGKILL] * len(killed)


def test_after_a_kill_there_is_no_output_or_a_whole_one(killed, model, old, new):
    states = set()
    for parent, kind, _ in killed:
        out = parent / "out"
        left = {path.name for path in parent.iterdir()}
        assert left <= {"out", "out.partial"}
        found = _bytes(out) if out.exists() else None
        state = "absent" if found is None else "new" if found == new else "old" if found == old else "broken"
        states.add((kind, state))
        if state == "absent" and kind == "apart":  # nothing is lost: the next run puts it back
            assert _bytes(parent / "out.partial" / "old") == old
        if state != "absent":
            AutoModelForCausalLM.from_pretrained(out)
    # The kills do fall before, between and after the renames.
    expected = {"new": ("absent", "new"), "over": ("old", "new"), "apart": ("old", "absent", "new")}
    assert states == {(kind, state) for kind, found in expected.items() for state in found}


def test_the_run_after_a_kill_ends_right(killed, model, new, old):
    for parent, kind, _ in killed:
        out = parent / "out"
        if kind != "new" and not out.exists():
            with pytest.raises(OutputError, match="was killed, and the old one lies in"):  # it counts as there
                _prune(model, out)
        _prune(model, out, overwrite=kind != "new" or out.exists())
        assert [path.name for path in parent.iterdir()] == ["out"]
        assert _bytes(out) == new


def _aside(model, parent, old, *, whole):
    """The state between the two renames: the old checkpoint is aside, the new one whole or not."""
    partial = parent / "out.partial"
    _restore(partial / "old", old)
    (partial / ".dicer-partial").touch()
    if whole:
        _prune(model, parent / "made")
        (parent / "made").rename(partial / "new")
    else:
        _restore(partial / "new", {"model.safetensors": b"half"})


@pytest.mark.parametrize("whole", [False, True])
def test_an_old_checkpoint_left_aside_is_put_back_or_replaced(model, old, new, tmp_path, whole):
    _aside(model, tmp_path, old, whole=whole)
    with pytest.raises(
        OutputError, match=r"the old one lies in .*out\.partial/old\. Move it back, or pass --overwrite"
    ):
        _prune(model, tmp_path / "out")
    assert _bytes(tmp_path / "out.partial" / "old") == old
    _prune(model, tmp_path / "out", overwrite=True)
    assert _bytes(tmp_path / "out") == new
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_checkpoint_left_aside_survives_a_run_that_fails(model, old, tmp_path, monkeypatch):
    _aside(model, tmp_path, old, whole=False)
    monkeypatch.setattr(sink, "write_file", _full_disk)
    with pytest.raises(OutputError):
        _prune(model, tmp_path / "out", overwrite=True)
    assert _bytes(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def _bug(*_, **__):
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (_full_disk, OutputError),
        (_interrupted, KeyboardInterrupt),
        (_bug, ZeroDivisionError),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_in_the_middle_leaves_nothing_of_the_new_one(
    model, old, tmp_path, monkeypatch, failure, error, overwrite
):
    if overwrite:
        _restore(tmp_path / "out", old)
    monkeypatch.setattr(sink, "write_file", failure)
    with pytest.raises(error) as caught:
        _prune(model, tmp_path / "out", overwrite=overwrite)
    if error is OutputError:
        assert "No space left on device" in str(caught.value)
        assert str(tmp_path / "out") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert not overwrite or _bytes(tmp_path / "out") == old


def test_a_last_rename_that_fails_puts_the_old_one_back(model, old, tmp_path, monkeypatch):
    _restore(tmp_path / "out", old)
    monkeypatch.setattr("dicer.holds.exchange", lambda *_: False)
    rename = Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Device or resource busy"):
        _prune(model, tmp_path / "out", overwrite=True)
    assert _bytes(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_keeps_pointing_at_what_was_replaced(model, old, new, tmp_path):
    _restore(tmp_path / "real" / "folder", old)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "folder")
    _prune(model, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert _bytes(tmp_path / "link") == new
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["folder"]
    assert load_file(tmp_path / "link" / "model.safetensors")
