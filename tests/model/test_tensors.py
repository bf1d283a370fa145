"""Tensors by their names on disk: lazy reads and fingerprints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny_model

from dicer.model.source import from_memory, open_model
from dicer.model.tensors import (
    INDEX,
    WEIGHTS,
    MemorySource,
    SafetensorsSource,
    TensorInfo,
    fingerprint,
)

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "b": torch.arange(6, dtype=torch.float16),
    "c": torch.arange(8, dtype=torch.bfloat16).reshape(2, 2, 2),
    "d": torch.tensor(3.5),
    "e": torch.arange(10, dtype=torch.int64).reshape(5, 2),
}
INFOS = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.fixture(params=["single", "sharded", "memory"])
def source(request, tmp_path):
    """The same tensors, three ways."""
    if request.param == "memory":
        return MemorySource(TENSORS)
    if request.param == "single":
        save_file(TENSORS, tmp_path / WEIGHTS)
    else:
        for name, tensor in TENSORS.items():
            save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}))
    return SafetensorsSource(tmp_path)


def test_infos(source):
    assert dict(source.infos()) == INFOS
    assert {name: (info.numel, info.nbytes) for name, info in source.infos().items()} == {
        name: (t.numel(), t.nbytes) for name, t in TENSORS.items()
    }


def test_tensors_as_they_were_written(source):
    for name, tensor in TENSORS.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_rows_alone(source):
    for start, stop in [(0, 1), (1, 5), (5, 6), (0, 6), (2, 2)]:
        for name in ("a", "b"):
            assert torch.equal(source.read_rows(name, start, stop), TENSORS[name][start:stop])


def test_fingerprint_wherever_the_tensors_are(source):
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
def test_fingerprint_of_other_tensors(change):
    changed = {name: t for name, t in {**TENSORS, **change}.items() if t is not None}
    assert fingerprint(MemorySource(changed)) != fingerprint(MemorySource(TENSORS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_of_a_model_single_sharded_and_in_memory(tmp_path, dtype):
    single = open_model(save_tiny(tmp_path / "single", dtype=dtype))
    sharded = open_model(save_tiny(tmp_path / "sharded", shards=True, dtype=dtype))
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert single.fingerprint == sharded.fingerprint == from_memory(tiny_model("llama", dtype=dtype)).fingerprint
    assert single.fingerprint != from_memory(tiny_model("llama", seed=1, dtype=dtype)).fingerprint


def test_fingerprint_of_tied_weights(tmp_path):
    on_disk = open_model(save_tiny(tmp_path / "tied", tied=True))
    in_memory = from_memory(tiny_model("llama", tied=True))
    assert on_disk.fingerprint == in_memory.fingerprint
    assert "lm_head.weight" not in in_memory.tensors.infos()


def test_tensor_in_two_shards(tmp_path):
    for number in (1, 2):
        save_file({"a": torch.full((2,), float(number))}, tmp_path / f"model-{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert SafetensorsSource(tmp_path).read("a").tolist() == [2.0, 2.0]
