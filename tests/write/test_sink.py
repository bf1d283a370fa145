"""The output folder: shards and their bytes, what may be written where, and who holds it."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dicer.errors import OutputError
from dicer.model.tensors import INDEX, WEIGHTS, SafetensorsSource, TensorInfo
from dicer.write.sink import CheckpointSink, check_output, check_space

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "b": torch.arange(6, dtype=torch.float16),
    "c": torch.arange(8, dtype=torch.bfloat16).reshape(2, 2, 2),
    "d": torch.tensor(3.5),
    "e": torch.arange(10, dtype=torch.int64).reshape(5, 2),
}
PLAN = "dicer_plan.json"  # what tells a folder of dicer's


def _infos(tensors):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _write(out, *, shard_bytes=10**9, tensors=TENSORS, **options):
    done = []
    with CheckpointSink(out, shard_bytes=shard_bytes, **options) as sink:
        sink.write_tensors(_infos(tensors), tensors.__getitem__, done.append)
        sink.write_json("config.json", {"b": 1, "a": "é"})
    return done


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# Weights


def test_one_shard(out):
    assert _write(out) == [1, 2, 3, 4, 5]
    assert _names(out) == ["config.json", WEIGHTS, INDEX]
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without
    assert (out / "config.json").read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'


@pytest.mark.parametrize(
    ("shard_bytes", "shards"),
    [
        (1, [["a"], ["b"], ["c"], ["d"], ["e"]]),
        (96, [["a"], ["b", "c", "d"], ["e"]]),
        (108, [["a", "b"], ["c", "d", "e"]]),
        (124, [["a", "b", "c"], ["d", "e"]]),
        (207, [["a", "b", "c", "d"], ["e"]]),
        (208, [["a", "b", "c", "d", "e"]]),
    ],
)
def test_shards_in_order_up_to_the_limit(out, shard_bytes, shards):
    _write(out, shard_bytes=shard_bytes)
    source = SafetensorsSource(out)
    assert dict(source.infos()) == _infos(TENSORS)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert _names(out) == sorted(["config.json", INDEX, *names])
    assert [sorted(load_file(out / name)) for name in names] == shards
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in TENSORS.values()),
        "total_parameters": sum(t.numel() for t in TENSORS.values()),
    }


@pytest.mark.parametrize("bad", ["a", "b"])
def test_where_one_shard_fails_the_others_end(out, bad):
    """Its own error is told at once, and what has not begun never does."""
    begun = []

    def read(name):
        begun.append(name)
        if name == bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.5)
        return TENSORS[name]

    with pytest.raises(OutputError, match="No space left"), CheckpointSink(out, shard_bytes=1) as sink:
        sink.write_tensors(_infos(TENSORS), read, lambda _: None)
    assert not out.exists()
    assert not {"d", "e"} & {*begun}


def test_index_last(out):
    """It never points at a shard that is not there, while two of them are written at once."""
    seen = {}

    def read(name):
        seen[name] = _names(sink.folder)
        return TENSORS[name]

    with CheckpointSink(out, shard_bytes=1) as sink:
        sink.write_tensors(_infos(TENSORS), read, lambda _: None)
    shards = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(seen) == [*"abcde"]
    assert all(shard in seen[name] and INDEX not in seen[name] for shard, name in zip(shards, "abcde", strict=True))
    assert _names(out) == [*shards, INDEX]


@pytest.mark.parametrize("shard_bytes", [60, 10**9])
def test_same_bytes_twice(tmp_path, shard_bytes):
    _write(tmp_path / "one", shard_bytes=shard_bytes)
    _write(tmp_path / "two", shard_bytes=shard_bytes)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_views_and_shared_memory(out):
    base = torch.arange(24.0).reshape(6, 4)
    tensors = {"transposed": base.T, "rows": base[1:3], "all": base}
    _write(out, tensors=tensors)
    read = load_file(out / WEIGHTS)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_from_the_umask(out, mask):
    before = os.umask(mask)
    try:
        _write(out, shard_bytes=60)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


# The place


def test_nothing_under_the_final_name_before_the_end(tmp_path, out):
    with CheckpointSink(out) as sink:
        sink.write_json("config.json", {})
        assert not out.exists()
        assert sink.folder.is_relative_to(tmp_path / "out.partial")
    assert _names(tmp_path) == ["out"]
    assert _names(out) == ["config.json"]


HELD = {
    "nothing": None,
    "empty folder": [],
    "checkpoint": ["config.json", PLAN],
    "other checkpoint": ["config.json", "runs"],  # of a training, say
    "plan": [PLAN],
    "notes": ["notes.txt"],
}


@pytest.mark.parametrize("there", HELD)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_there_already(tmp_path, out, there, overwrite):
    held = HELD[there]
    if held is not None:
        out.mkdir()
    for name in held or ():
        (out / name).write_text("{}")
    says = None
    if held and not (overwrite and PLAN in held):
        says = f"no {PLAN}, so dicer did not write it" if overwrite else "is not empty"
        for write in (check_output, _write):
            with pytest.raises(OutputError, match=says):
                write(out, overwrite=overwrite)
        assert _names(out) == held
        return
    check_output(out, overwrite=overwrite)
    _write(out, overwrite=overwrite)
    assert _names(out) == ["config.json", WEIGHTS, INDEX]
    assert _names(tmp_path) == ["out"]


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "below", "says"),
    [
        (_fifo, "", "is no folder"),
        (_socket, "", "is no folder"),
        (Path.touch, "", "is a file"),
        (_fifo, "deeper", "is a file"),
        (lambda path: path.symlink_to(path), "", "leads to itself"),
    ],
)
def test_no_folder(tmp_path, monkeypatch, make, below, says):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    out = Path("out")
    make(out)
    before = out.lstat()
    for write in (check_output, _write):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=says):
                write(out / below, overwrite=overwrite)
    assert out.lstat() == before
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["fifo", "file", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_it_writes(tmp_path, out, there, overwrite):
    sink = CheckpointSink(out, overwrite=overwrite)
    sink.__enter__()
    sink.write_text("config.json", "{}")
    if there == "folder":
        out.mkdir()
    _fifo(out) if there == "fifo" else (out / "mine.txt" if there == "folder" else out).write_text("mine")
    with pytest.raises(OutputError, match=r"is no folder|is a file|not empty|did not write it"):
        sink.__exit__(None, None, None)
    assert _names(tmp_path) == ["out"]
    assert out.is_fifo() if there == "fifo" else out.is_file() or _bytes(out) == {"mine.txt": b"mine"}


def test_inputs_inside(tmp_path, out):
    (out / "deep").mkdir(parents=True)
    (out / PLAN).write_text("{}")
    with pytest.raises(OutputError, match="which this run reads"):
        check_output(out, overwrite=True, inputs=[tmp_path, out / "deep"])
    check_output(out, overwrite=True, inputs=[tmp_path, "gpt2", None])


# The unfinished folder


@pytest.mark.parametrize("marked", [False, True])
def test_unfinished_folder_of_ours(tmp_path, out, marked):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if marked:
        (partial / ".dicer-partial").touch()
        (partial / "new").mkdir()
        (partial / "new" / WEIGHTS).write_bytes(b"half")
    _write(out)
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_no_folder_set_aside(tmp_path, out, there):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".dicer-partial").touch()
    _fifo(partial / "old")
    if there:
        out.mkdir()
    with pytest.raises(OutputError, match="in the way"):
        _write(out)
    assert (partial / "old").is_fifo()
    assert out.exists() == there


@pytest.mark.parametrize("name", ["out.partial", "out.replaced", "out.partial.1"])
def test_folder_of_somebody_else(tmp_path, out, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    if name == "out.partial":
        with pytest.raises(OutputError, match="in the way"):
            _write(out)
    else:
        _write(out)
        (out / PLAN).touch()
        _write(out, overwrite=True)
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


WRITER = """
import pathlib, sys
from dicer.write.sink import CheckpointSink
with CheckpointSink(pathlib.Path(sys.argv[1])) as sink:
    sink.write_text("config.json", "{}")
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(out):
    """Another process that has begun to write ``out``."""
    command = [sys.executable, "-c", WRITER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_second_run(tmp_path, out, writer):
    for refused in (lambda: check_output(out, overwrite=True), lambda: _write(out)):
        with pytest.raises(OutputError, match="another run of dicer writes"):
            refused()
    writer.communicate("")
    assert writer.returncode == 0
    assert _names(out) == ["config.json"]
    assert _names(tmp_path) == ["out"]


def test_second_run_between_check_and_writing(out):
    first, second = CheckpointSink(out), CheckpointSink(out)
    with first:
        with pytest.raises(OutputError, match="another run of dicer writes"), second:
            pass
        first.write_text("config.json", "{}")
    assert _names(out) == ["config.json"]


def test_second_run_while_the_first_goes(tmp_path, out, monkeypatch):
    """It takes the folder between the first's letting go and its taking the folder away: the first is done."""
    rmdir, second = Path.rmdir, CheckpointSink(out, overwrite=True)

    def late(path):
        monkeypatch.setattr(Path, "rmdir", rmdir)
        second.__enter__()
        rmdir(path)

    with CheckpointSink(out) as first:
        first.write_text(PLAN, "{}")
        monkeypatch.setattr(Path, "rmdir", late)
    assert _names(out) == [PLAN]
    second.write_text("config.json", "{}")
    second.__exit__(None, None, None)
    assert _names(out) == ["config.json"]
    assert _names(tmp_path) == ["out"]


def test_second_run_after_a_kill(tmp_path, out, writer):
    writer.kill()
    writer.wait()
    assert (tmp_path / "out.partial" / "new" / "config.json").exists()
    check_output(out, overwrite=False)
    _write(out)
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_file_system_without_locks(tmp_path, out, monkeypatch, number):
    def without(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", without)
    _write(out)
    assert _names(tmp_path) == ["out"]


def test_space(tmp_path, monkeypatch):
    check_space(tmp_path / "not" / "yet" / "there", 1000)
    monkeypatch.setattr("dicer.write.sink.shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OutputError, match="are free on that disk"):
        check_space(tmp_path / "two", 1000)
    assert list(tmp_path.iterdir()) == []
