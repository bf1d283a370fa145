"""Tensors written one at a time are the file that safetensors would have written of all of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny

import dicer
from dicer.model.tensors import DTYPES, SafetensorsSource, TensorInfo
from dicer.write import surgery
from dicer.write.tensor_file import write_file

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


def test_rows_at_a_time(tmp_path):
    table = torch.arange(40.0).reshape(10, 4)
    save_file({"a": table}, tmp_path / "theirs", metadata={"format": "pt"})
    write_file(tmp_path / "ours", _infos({"a": table}), lambda _: iter(table.split(3)))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_copies_in_rows(tmp_path, monkeypatch):
    """A tensor that is copied and larger than what is held at once is never read whole."""
    model = save_tiny(tmp_path / "model")
    dicer.prune(model, dicer.Recipe(method="random"), output=tmp_path / "whole")
    reads, read = [], SafetensorsSource.read
    monkeypatch.setattr(surgery, "_AT_ONCE", 1000)
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: reads.append(name) or read(self, name))
    dicer.prune(model, dicer.Recipe(method="random"), output=tmp_path / "rows")
    assert "model.embed_tokens.weight" not in reads
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "rows")]
    assert written[0] == written[1]


def test_each_read_once(tmp_path):
    read = []
    write_file(tmp_path / "ours", _infos(TENSORS), lambda name: read.append(name) or TENSORS[name])
    assert sorted(read) == sorted(TENSORS)


@pytest.mark.parametrize("other", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)])
def test_other_than_said(tmp_path, other):
    with pytest.raises(ValueError, match="'a' is"):
        write_file(tmp_path / "ours", {"a": TensorInfo((2, 3), torch.float32)}, lambda _: other)
