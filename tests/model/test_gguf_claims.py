"""A .gguf file is as long as it says, and its numbers are no larger than its tensors can be."""

from __future__ import annotations

import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest

from dicer.errors import ModelError
from dicer.model.find import _builtin_file
from dicer.model.gguf_claims import check_claims


def written(path, **numbers):
    """A small file, with whatever numbers it is to claim."""
    writer = gguf.GGUFWriter(path, "llama")
    said = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 40, "context_length": 10**6, **numbers}
    for name, value in said.items():
        writer.add_uint64(f"llama.{name}", value) if isinstance(value, int) else writer.add_array(
            f"llama.{name}", value
        )
    writer.add_token_list(["a", "b"])
    for name in ("a", "b", "c"):
        writer.add_tensor(name, np.zeros((40, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_true_numbers(tmp_path):
    check_claims(written(tmp_path / "a.gguf"))
    check_claims(written(tmp_path / "b.gguf", feed_forward_length=[40, 32]))
    check_claims(_builtin_file("builtin:smollm2"))


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"block_count": 10**6}, "it says 1,000,000 layers, and has 3 tensors"),
        ({"block_count": 2**63}, "layers, and has 3 tensors"),
        ({"embedding_length": 10**9}, "it says embedding_length 1,000,000,000"),
        ({"feed_forward_length": [40, 10**9]}, "it says feed_forward_length"),
        ({"attention.head_count": 10**9}, "it says head_count"),
        ({"expert_count": 10**9}, "it says expert_count"),
        ({"vocab_size": 2**40}, "it says vocab_size"),
    ],
)
def test_numbers_beyond_the_tensors(tmp_path, numbers, says):
    with pytest.raises(ModelError, match=says):
        check_claims(written(tmp_path / "a.gguf", **numbers))


@pytest.mark.parametrize("place", range(8, 1500, 7))
def test_large_number_anywhere(tmp_path, place):
    """Wherever eight bytes are made a number without end, the walk ends."""
    data = bytearray(written(tmp_path / "a.gguf").read_bytes())
    data[place : place + 8] = struct.pack("<Q", 2**62)
    (tmp_path / "a.gguf").write_bytes(data)
    with suppress(ModelError):
        check_claims(tmp_path / "a.gguf")


@pytest.mark.parametrize("length", [0, 3, 4, 8, 23, 24, 60, 200, 700])
def test_file_that_ends(tmp_path, length):
    data = written(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:length])
    with pytest.raises(ModelError, match="cannot be loaded"):
        check_claims(tmp_path / "a.gguf")
