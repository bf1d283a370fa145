"""Tensors written one at a time are the file that safetensors would have written of all of them."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import dicer
from dicer.model.tensors import DTYPES, SafetensorsSource, Selection, Stretch, TensorInfo
from dicer.write import tensor_file
from dicer.write.tensor_file import _header, write_file

TENSORS = {
    **{f"of {name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    "b.transposed": torch.arange(12.0).reshape(3, 4).T,
    "a.view": torch.arange(12.0)[3:7],
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(2.5, dtype=torch.bfloat16),
    'strange "näme"\\': torch.ones(3, dtype=torch.float16),
}


def _infos(tensors):
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("names", [[*TENSORS], [*reversed(TENSORS)], ["number"], []], ids=len)
def test_same_bytes(tmp_path, names):
    tensors = {name: TENSORS[name] for name in names}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    write_file(tmp_path / "ours", _infos(tensors), tensors.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_copies_are_not_read(tmp_path, monkeypatch):
    """What is only copied is made no tensor, in several shards too, and what comes out is the same."""
    model = save_tiny(tmp_path / "model", shards=True)
    reads, read = [], SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: reads.append(name) or read(self, name))
    dicer.prune(model, dicer.Recipe(method="random"), output=tmp_path / "out")
    assert reads
    assert all(".mlp." in name for name in reads)
    before, after = (_all_tensors(tmp_path / name) for name in ("model", "out"))
    assert before.keys() == after.keys()
    for name in before.keys() - set(reads):
        assert torch.equal(before[name], after[name])


def _all_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_stretch(tmp_path, monkeypatch):
    """Piece by piece; a file that has become shorter meanwhile is none to copy from."""
    monkeypatch.setattr(tensor_file, "_PIECE", 5)
    (tmp_path / "theirs").write_bytes(bytes(range(100)))
    found = Stretch(tmp_path / "theirs", 11, 24)
    write_file(tmp_path / "ours", {"a": TensorInfo((24,), torch.uint8)}, lambda _: found)
    assert load_file(tmp_path / "ours")["a"].tolist() == list(range(11, 35))
    with pytest.raises(OSError, match="it has become shorter"):
        write_file(tmp_path / "b", {"a": TensorInfo((24,), torch.uint8)}, lambda _: found._replace(start=90))


@pytest.mark.parametrize("piece", [1, 40, 2**24])
@pytest.mark.parametrize(("shape", "dim"), [((9,), 0), ((9, 5), 0), ((5, 9), 1), ((3, 9, 2), 1), ((2, 3, 9), 2)])
def test_selected_rows(tmp_path, monkeypatch, shape, dim, piece):
    """Piece by piece, what ``index_select`` gives of the whole tensor."""
    monkeypatch.setattr(tensor_file, "_PIECE", piece)
    numbers, found = torch.arange(torch.Size(shape).numel()).reshape(shape), {}
    for name, dtype in DTYPES.items():
        rows = torch.randperm(9)[: len(name) + 2].sort().values
        found[name] = Selection((numbers % 2 if dtype == torch.bool else numbers).to(dtype), dim, rows)
    write_file(tmp_path / "ours", {name: one.info for name, one in found.items()}, found.__getitem__)
    written = load_file(tmp_path / "ours")
    assert all(torch.equal(written[n], one.tensor.index_select(dim, one.rows)) for n, one in found.items())


@pytest.mark.parametrize("rows", [[0, 9], [-1, 2]])
def test_rows_that_are_not_there(tmp_path, rows):
    found = Selection(torch.zeros(9, 2), 0, torch.tensor(rows))
    with pytest.raises(ValueError, match="of 9"):
        write_file(tmp_path / "ours", {"a": found.info}, lambda _: found)


@pytest.mark.parametrize(("shape", "dim"), [((9, 2), 0), ((5, 9), 1)])
def test_no_rows(tmp_path, monkeypatch, shape, dim):
    """Nothing is written over what is still being written."""
    rows, write = torch.arange(9), tensor_file._write
    found = {"b": Selection(torch.zeros(shape), dim, rows[:0])}
    found |= {name: Selection(torch.full((9, 4), value), 0, rows) for name, value in (("a", 1.0), ("c", 2.0))}
    monkeypatch.setattr(tensor_file, "_write", lambda file, content: (time.sleep(0.1), write(file, content)))
    write_file(tmp_path / "ours", {name: one.info for name, one in found.items()}, found.__getitem__)
    written = load_file(tmp_path / "ours")
    assert all(torch.equal(written[n], one.tensor.index_select(one.dim, one.rows)) for n, one in found.items())


def test_one_ahead(tmp_path):
    """While one is written the next is read, and no more than that."""
    tensors = {f"{i}": torch.full((4,), float(i)) for i in range(5)}
    written = lambda: (tmp_path / "ours").stat().st_size  # noqa: E731
    header = len(_header(sorted(tensors), _infos(tensors)))
    sizes = []

    def read(name):
        sizes.append(written())
        return tensors[name]

    write_file(tmp_path / "ours", _infos(tensors), read)
    assert all(size >= header + 16 * (number - 2) for number, size in enumerate(sizes))


def test_each_read_once(tmp_path):
    read = []
    write_file(tmp_path / "ours", _infos(TENSORS), lambda name: read.append(name) or TENSORS[name])
    assert sorted(read) == sorted(TENSORS)


@pytest.mark.parametrize("other", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)])
def test_other_than_said(tmp_path, other):
    with pytest.raises(ValueError, match="'a' is"):
        write_file(tmp_path / "ours", {"a": TensorInfo((2, 3), torch.float32)}, lambda _: other)
