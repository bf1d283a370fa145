"""Finding a model, and converting one: where it is kept, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import HIDDEN, NEURONS, VOCABULARY, tiny_tokenizer

from dicer.errors import ModelError
from dicer.model.find import cache_folder, find_model

QUIET = """
import sys
import dicer
from dicer.model.source import load_any, open_model

model, rows, out = sys.argv[1:]
open_model(model)
recipe = dicer.Recipe(calib=rows)
dicer.prune(model, recipe)
dicer.prune(model, recipe, output=out)
dicer.load(out)
load_any(out)
print("ours", file=sys.stderr)
import transformers
transformers.AutoModelForCausalLM.from_pretrained(out)
"""


def tiny_gguf(path):
    """A .gguf file of a Llama of one layer, its matrices quantized to 8 bits."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(NEURONS // 32 * 32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    names = tiny_tokenizer().convert_ids_to_tokens(range(VOCABULARY - 4))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*names, names[4] + names[5], "<1>", "<2>", "<3>"])
    writer.add_token_merges([f"{names[4]} {names[5]}"])
    shapes = {
        **{"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)},
        **{"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)},
        **{"blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN)},
        **{f"blk.0.attn_{name}": (HIDDEN // 2, HIDDEN) for name in "kv"},
        **{f"blk.0.ffn_{name}": (HIDDEN, HIDDEN) for name in ("gate", "up", "down")},
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_no_bars_but_those_that_others_ask_for(tmp_path, rows):
    """In a process of its own: other tests silence transformers, too."""
    model, out = tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out"
    environment = {**os.environ, "DICER_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", QUIET, str(model), str(rows), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    ours, _, others = done.stderr.partition("ours\n")
    assert ours == ""
    assert "Loading weights" in others


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DICER_CACHE": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/own"),
        ({"DICER_CACHE": "", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/dicer"),
        ({"HOME": "/home/me"}, "/home/me/.cache/dicer"),
    ],
)
def test_cache_folder_on_linux(monkeypatch, environment, folder):
    for name in ("DICER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_no_home(monkeypatch, tmp_path):
    def unknown(*_):
        raise KeyError("no such user")

    for name in ("DICER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no home folder to keep x\.gguf converted in\. Set DICER_CACHE"):
        find_model(str(tmp_path / "x.gguf"))
