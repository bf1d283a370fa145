"""What a kill between two renames has left, and errors in the middle of writing; kills themselves: tests/kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import save_tiny

import dicer
from dicer.ask.recipe import Recipe
from dicer.errors import OutputError
from dicer.write import sink


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


def _restore(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _prune(model, out, **options):
    dicer.prune(model, Recipe(method="weight-l2", layers="1-2"), output=out, **options)


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
