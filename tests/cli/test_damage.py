"""Damage is found before the work: nothing is scored, and the line says what is wrong."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import dicer
from dicer.errors import ModelError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"one": save_tiny(base / "one"), "shards": save_tiny(base / "shards", shards=True)}


@pytest.fixture
def before_the_work(refused, tmp_path, models, monkeypatch):
    """``dicer prune`` a damaged copy: refused, and neither loaded nor scored."""
    folder = shutil.copytree(models["one"], tmp_path / "model")

    def working(*_, **__):
        pytest.fail("it works already")

    monkeypatch.setattr("dicer.pipeline.score", working)
    monkeypatch.setattr("dicer.model.source.ModelSource.load_model", working)

    def typed(damage, *flags, says=()):
        damage(folder)
        more = ("--samples", 2, "--seq-len", 16, *flags)
        refused("prune", folder, "-o", tmp_path / "out", *more, says=says)
        refused("prune", folder, "-o", tmp_path / "out", *more, "--dry-run", says=says)

    return typed


def edited(name, change):
    def damage(folder):
        value = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        *(("model.layers.0.mlp.up_proj.bias", size) for size in (1, 7, 40)),
        *(("model.layers.1.mlp.down_proj.bias", size) for size in (1, 32)),
        *(("model.layers.0.self_attn.q_proj.bias", size) for size in (3, 32)),
        ("model.layers.2.mlp.gate_proj.scale", 40),
    ],
)
def test_tensor_that_the_model_has_not(before_the_work, tensor, size):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, tensor: torch.ones(size)}, folder / WEIGHTS, metadata={"format": "pt"})

    before_the_work(damage, says=[f"the weights have '{tensor}'"])


@pytest.mark.parametrize("value", ["many", [], {}, "1e30"])
def test_length_of_another_type(before_the_work, value):
    damage = edited("tokenizer_config.json", lambda found: found.update(model_max_length=value))
    before_the_work(damage, says=["the tokenizer cannot be loaded"])


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}),
        ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 1}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("model", {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
    ],
)
def test_tokenizer_that_panics_or_fails(before_the_work, part, value):
    damage = edited("tokenizer.json", lambda found: found.update({part: value}))
    before_the_work(damage, says=["model: the tokenizer cannot be loaded: "])


def test_words_of_the_library_itself(run, tmp_path, models):
    """The tokenizers library prints what it does not know, as it stands."""
    folder = shutil.copytree(models["one"], tmp_path / "model")
    edited("tokenizer.json", lambda found: found["added_tokens"][0].update({"own\x1b[2J": 1}))(folder)
    assert "unknown" not in run("prune", folder, "-o", tmp_path / "out", "--samples", 2, "--seq-len", 16)


def test_panic_at_a_text():
    from dicer.model.tokenizer import token_ids

    panic = type("PanicException", (BaseException,), {})

    def tokenizer(*_, **__):
        raise panic("index out\nof range")

    with pytest.raises(ModelError, match=r"the tokenizer cannot read a text: index out of range\."):
        token_ids(tokenizer, "a")


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff{", '{"max_new_tokens": "\\ud800"}'])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "added_tokens.json"])
def test_broken_side_file(before_the_work, name, content):
    before_the_work(lambda folder: (folder / name).write_text(content), "--method", "weight-l2", says=["model"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_half_a_surrogate(before_the_work, name):
    before_the_work(edited(name, lambda found: found.update(note="\ud800")), says=[name, "half a surrogate"])


def test_half_a_surrogate_in_an_index(refused, tmp_path, models):
    folder = shutil.copytree(models["shards"], tmp_path / "model")
    edited("model.safetensors.index.json", lambda found: found["weight_map"].update({"\ud800": "\udfff"}))(folder)
    refused("info", folder, says=["is not a weight index", "half a surrogate"])


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "NOTICE.txt"])
def test_side_file_that_nobody_may_open(before_the_work, monkeypatch, name):
    import os

    opened = os.open

    def refuse(path, *rest, **named):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    before_the_work(lambda folder: (folder / name).write_text("text"), says=[name, "Permission denied"])


def test_stderr_that_is_closed(models, monkeypatch):
    import os

    from dicer.model.source import open_model

    def closed(_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    monkeypatch.setattr(sys, "stderr", None)
    assert open_model(models["one"]).tokenizer() is not None


def test_good_model_is_still_pruned(models, tmp_path):
    result = dicer.prune(models["one"], dicer.Recipe(samples=2, seq_len=16), output=tmp_path / "out")
    assert result.path == tmp_path / "out"
