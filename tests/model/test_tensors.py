"""Tensors by their names on disk: lazy reads, fingerprints, shards, and the rules of the output folder."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model

from dicer.errors import OutputError
from dicer.model.source import from_memory, open_model
from dicer.model.tensors import INDEX, WEIGHTS, MemorySource, SafetensorsSource, TensorInfo, fingerprint
from dicer.write.sink import CheckpointSink, check_output, check_space

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "b": torch.arange(6, dtype=torch.float16),
    "c": torch.arange(8, dtype=torch.bfloat16).reshape(2, 2, 2),
    "d": torch.tensor(3.5),
    "e": torch.arange(10, dtype=torch.int64).reshape(5, 2),
}
INFOS = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


def _write(out, *, shard_bytes=10**9, tensors=TENSORS, **options):
    done = []
    with CheckpointSink(out, shard_bytes=shard_bytes, **options) as sink:
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        sink.write_tensors(infos, tensors.__getitem__, done.append)
        sink.write_json("config.json", {"b": 1, "a": "é"})
    return done


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(params=["single", "sharded", "memory"])
def source(request, tmp_path):
    """The same tensors, three ways."""
    if request.param == "memory":
        return MemorySource(TENSORS)
    _write(tmp_path / "out", shard_bytes=60 if request.param == "sharded" else 10**9)
    assert (tmp_path / "out" / INDEX).exists() == (request.param == "sharded")
    return SafetensorsSource(tmp_path / "out")


def test_a_source_knows_every_tensor_without_reading_it(source):
    assert dict(source.infos()) == INFOS
    assert {name: (info.numel, info.nbytes) for name, info in source.infos().items()} == {
        name: (t.numel(), t.nbytes) for name, t in TENSORS.items()
    }


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_it_was_written(source, name):
    read = source.read(name)
    assert read.dtype == TENSORS[name].dtype
    assert torch.equal(read, TENSORS[name])


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 5), (5, 6), (0, 6), (2, 2)])
def test_rows_are_read_alone(source, start, stop):
    assert torch.equal(source.read_rows("a", start, stop), TENSORS["a"][start:stop])
    assert torch.equal(source.read_rows("b", start, stop), TENSORS["b"][start:stop])


def test_the_fingerprint_does_not_depend_on_where_the_tensors_are(source):
    assert fingerprint(source) == fingerprint(MemorySource(dict(reversed(TENSORS.items()))))


@pytest.mark.parametrize(
    "change",
    [
        {"a": TENSORS["a"].index_fill(0, torch.tensor([0]), 9.0)},
        {"a": TENSORS["a"].index_fill(0, torch.tensor([5]), 9.0)},
        {"a": TENSORS["a"].reshape(4, 6)},
        {"a": TENSORS["a"].double()},
        {"b": TENSORS["b"].view(torch.bfloat16)},
        {"f": torch.zeros(1)},
        {"f": torch.zeros(0)},
        {"a": None},
    ],
)
def test_the_fingerprint_tells_tensors_apart(change):
    changed = {name: t for name, t in {**TENSORS, **change}.items() if t is not None}
    assert fingerprint(MemorySource(changed)) != fingerprint(MemorySource(TENSORS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_has_one_fingerprint_single_sharded_and_in_memory(tmp_path, dtype):
    single = open_model(save_tiny(tmp_path / "single", dtype=dtype))
    sharded = open_model(save_tiny(tmp_path / "sharded", shards=True, dtype=dtype))
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert single.fingerprint == sharded.fingerprint == from_memory(tiny_model("llama", dtype=dtype)).fingerprint
    assert single.fingerprint != from_memory(tiny_model("llama", seed=1, dtype=dtype)).fingerprint


def test_tied_weights_count_once_wherever_the_model_is(tmp_path):
    on_disk = open_model(save_tiny(tmp_path / "tied", tied=True))
    in_memory = from_memory(tiny_model("llama", tied=True))
    assert on_disk.fingerprint == in_memory.fingerprint
    assert "lm_head.weight" not in in_memory.tensors.infos()


def test_one_shard_needs_no_index(tmp_path):
    assert _write(tmp_path / "out") == [1, 2, 3, 4, 5]
    assert sorted(_bytes(tmp_path / "out")) == ["config.json", WEIGHTS]
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


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
def test_shards_are_filled_in_order_up_to_the_limit(tmp_path, shard_bytes, shards):
    out = tmp_path / "out"
    _write(out, shard_bytes=shard_bytes)
    count = len(shards)
    if count == 1:
        assert not (out / INDEX).exists()
        return
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(_bytes(out)) == sorted(["config.json", INDEX, *names])
    assert [sorted(load_file(out / name)) for name in names] == shards
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in TENSORS.values()),
        "total_parameters": sum(t.numel() for t in TENSORS.values()),
    }


def test_the_index_is_written_after_every_shard(tmp_path):
    files = []
    with CheckpointSink(tmp_path / "out", shard_bytes=1) as sink:
        write_json = sink.write_json

        def note(name, value):
            files.append((name, sorted(path.name for path in sink.folder.iterdir())))
            write_json(name, value)

        sink.write_json = note
        sink.write_tensors(INFOS, TENSORS.__getitem__, lambda _: None)
    assert files == [(INDEX, [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)])]


def test_only_one_shard_is_in_memory_at_a_time(tmp_path):
    seen = []

    def read(name):
        seen.append((name, len(list((tmp_path / "out.partial" / "new").glob("*.safetensors")))))
        return TENSORS[name]

    with CheckpointSink(tmp_path / "out", shard_bytes=1) as sink:
        sink.write_tensors(INFOS, read, lambda _: None)
    assert seen == [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4)]


@pytest.mark.parametrize("shard_bytes", [60, 10**9])
def test_the_same_tensors_give_the_same_bytes(tmp_path, shard_bytes):
    _write(tmp_path / "one", shard_bytes=shard_bytes)
    _write(tmp_path / "two", shard_bytes=shard_bytes)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_views_and_tensors_that_share_memory_are_written_whole(tmp_path):
    base = torch.arange(24.0).reshape(6, 4)
    tensors = {"transposed": base.T, "rows": base[1:3], "all": base}
    _write(tmp_path / "out", tensors=tensors)
    read = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_json_has_sorted_keys_and_ends_with_a_newline(tmp_path):
    _write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_the_umask_asks_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        _write(tmp_path / "out", shard_bytes=60)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_nothing_is_under_the_final_name_before_the_end(tmp_path):
    out = tmp_path / "out"
    with CheckpointSink(out) as sink:
        sink.write_json("config.json", {})
        assert not out.exists()
        assert sink.folder.is_relative_to(tmp_path / "out.partial")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("there", ["nothing", "empty folder", "checkpoint", "other checkpoint", "plan", "notes"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_an_output_folder_may_hold(tmp_path, there, overwrite):
    out = tmp_path / "out"
    if there != "nothing":
        out.mkdir()
    held = {
        "checkpoint": ["config.json", "dicer_plan.json"],
        "other checkpoint": ["config.json", "runs"],  # of a training, say
        "plan": ["dicer_plan.json"],
        "notes": ["notes.txt"],
    }
    for name in held.get(there, []):
        (out / name).write_text("{}")
    says = None if there in ("nothing", "empty folder") else "is not empty"
    if says and overwrite:
        says = None if "dicer_plan.json" in held[there] else "no dicer_plan.json, so dicer did not write it"
    if says:
        for write in (check_output, _write):
            with pytest.raises(OutputError, match=says):
                write(out, overwrite=overwrite)
        assert sorted(path.name for path in out.iterdir()) == held[there]
        return
    check_output(out, overwrite=overwrite)
    _write(out, overwrite=overwrite)
    assert sorted(_bytes(out)) == ["config.json", WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "below", "says"),
    [
        (_fifo, "", "is no folder"),
        (_socket, "", "is no folder"),
        (_fifo, "deeper", "Not a directory|is a file"),
        (_loop, "", "leads to itself"),
        (_loop, "deeper", "leads to itself"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_folder_is_never_replaced(tmp_path, monkeypatch, make, below, says, overwrite):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    out = Path("out")
    make(out)
    before = out.lstat()
    for write in (check_output, _write):
        with pytest.raises(OutputError, match=says):
            write(out / below, overwrite=overwrite)
    assert out.lstat() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("there", ["fifo", "file", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_it_writes_is_not_replaced(tmp_path, there, overwrite):
    out = tmp_path / "out"
    sink = CheckpointSink(out, overwrite=overwrite)
    sink.__enter__()
    sink.write_text("config.json", "{}")
    if there == "folder":
        out.mkdir()
    _fifo(out) if there == "fifo" else (out / "mine.txt" if there == "folder" else out).write_text("mine")
    with pytest.raises(OutputError, match=r"is no folder|is a file|not empty|did not write it"):
        sink.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [out]
    assert out.is_fifo() if there == "fifo" else out.is_file() or _bytes(out) == {"mine.txt": b"mine"}


def test_what_was_set_aside_and_is_no_folder_stays(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".dicer-partial").touch()
    _fifo(partial / "old")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="not empty"):
        _write(tmp_path / "out")
    assert (partial / "old").is_fifo()


@pytest.mark.parametrize("place", ["out", "out/text.txt", "out/deep/model", "link"])
def test_an_output_folder_never_holds_what_the_run_reads(tmp_path, place):
    (tmp_path / "out" / "deep" / "model").mkdir(parents=True)
    for name in ("dicer_plan.json", "text.txt"):
        (tmp_path / "out" / name).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(OutputError, match="which this run reads"):
        check_output(tmp_path / "out", overwrite=True, inputs=[tmp_path / "other", tmp_path / place])
    check_output(tmp_path / "out", overwrite=True, inputs=[tmp_path / "output", tmp_path])


@pytest.mark.parametrize("state", ["empty", "marked"])
def test_an_unfinished_folder_of_ours_is_cleared_away(tmp_path, state):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if state == "marked":
        (partial / ".dicer-partial").touch()
        (partial / "new").mkdir()
        (partial / "new" / WEIGHTS).write_bytes(b"half")
    _write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import pathlib, sys
from dicer.write.sink import CheckpointSink
with CheckpointSink(pathlib.Path(sys.argv[1])) as sink:
    sink.write_text("config.json", "{}")
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that has begun to write ``out``."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_second_run_leaves_the_folder_of_a_first_alone(tmp_path, writer):
    for refused in (lambda: check_output(tmp_path / "out", overwrite=True), lambda: _write(tmp_path / "out")):
        with pytest.raises(OutputError, match="another run of dicer writes"):
            refused()
    writer.communicate("")
    assert writer.returncode == 0
    assert sorted(_bytes(tmp_path / "out")) == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_begins_between_check_and_writing_is_seen_too(tmp_path):
    first, second = CheckpointSink(tmp_path / "out"), CheckpointSink(tmp_path / "out")
    with first:
        with pytest.raises(OutputError, match="another run of dicer writes"), second:
            pass
        first.write_text("config.json", "{}")
    assert sorted(_bytes(tmp_path / "out")) == ["config.json"]


def test_a_kill_frees_the_folder(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert (tmp_path / "out.partial" / "new" / "config.json").exists()
    _write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_such_locks_writing_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dicer.write.sink.fcntl", None)
    _write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out.partial", "out.replaced", "out.partial.1"])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    _write(tmp_path / "other")
    if name == "out.partial":
        with pytest.raises(OutputError, match="in the way"):
            _write(tmp_path / "out")
    else:
        _write(tmp_path / "out")
        (tmp_path / "out" / "dicer_plan.json").touch()
        _write(tmp_path / "out", overwrite=True)
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_space_is_asked_for_before_any_work(tmp_path, monkeypatch):
    check_space(tmp_path / "not" / "yet" / "there", 1000)
    monkeypatch.setattr("dicer.write.sink.shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    with pytest.raises(OutputError, match="are free on that disk"):
        check_space(tmp_path / "two", 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_in_two_shards_is_read_where_the_index_says(tmp_path):
    for number in (1, 2):
        save_file({"a": torch.full((2,), float(number))}, tmp_path / f"model-{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert SafetensorsSource(tmp_path).read("a").tolist() == [2.0, 2.0]
