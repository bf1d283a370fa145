"""How weights, tokenizers and configs lie on disk: old names, leftovers, shards, and nothing of this machine."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from by_hand import assert_near, assert_same_tensors, bytes_in, logits_of, masked, plan_for, tensors_in
from safetensors.torch import load_file, save_file
from tiny import LAYERS, POSITIONS, save_tiny, tiny_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dicer
from dicer.decide.plan import LayerPlan
from dicer.model.source import open_model


@pytest.fixture(scope="module")
def recipe(calib):
    def make(**values):
        return dicer.Recipe(**{"method": "rc-a", "calib": calib, **values})

    return make


def test_no_folder_of_this_machine_in_any_file(tmp_path, recipe):
    own = tmp_path / "mine.py"
    own.write_text("import dicer\n\n@dicer.criterion('mine', source='me')\ndef mine(w, s):\n    return w.up.sum(1)\n")
    dense = save_tiny(tmp_path / "dense", shards=True)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    asked = recipe(
        method=None, criterion=f"{own}:mine", grouping="similarity", calib=str(text), seq_len=16, layers="1-2"
    )
    dicer.prune(dense, asked, output=tmp_path / "out", perplexity_text=str(text))
    files = bytes_in(tmp_path / "out")
    assert "mine.py:mine (sha256" in files["dicer_plan.json"].decode()
    loaded, tokenizer = (auto.from_pretrained(dense) for auto in (AutoModelForCausalLM, AutoTokenizer))
    dicer.prune(loaded, asked, tokenizer=tokenizer, output=tmp_path / "from-memory")
    dicer.prune(loaded, asked, tokenizer=tokenizer).model.save_pretrained(tmp_path / "saved")
    files |= {f"{out}/{name}": c for out in ("from-memory", "saved") for name, c in bytes_in(tmp_path / out).items()}
    assert {"from-memory/tokenizer_config.json", "saved/config.json"} < files.keys()
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []


def test_old_gpt2_names_without_prefix(tmp_path, recipe):
    new = save_tiny(tmp_path / "new", "gpt2", tied=True)
    old = shutil.copytree(new, tmp_path / "old")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(new / "model.safetensors").items()}
    assert "h.0.mlp.c_fc.weight" in tensors
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    for folder in (new, old):
        dicer.prune(folder, recipe(layers="1-2"), output=folder.with_name(f"{folder.name}-pruned"))
    assert_same_tensors(tensors_in(tmp_path / "old-pruned"), tensors_in(tmp_path / "new-pruned"))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("old-pruned", "new-pruned")]
    assert torch.equal(*map(logits_of, models))
    in_memory = dicer.prune(old, recipe(layers="1-2")).model
    assert torch.equal(logits_of(in_memory), logits_of(models[0]))


def test_old_buffers_and_tied_copies(tmp_path, recipe):
    """Causal masks in old GPT-2 files, and a head that is tied."""
    clean = save_tiny(tmp_path / "clean", "gpt2", tied=True)
    old = shutil.copytree(clean, tmp_path / "old")
    tensors = load_file(clean / "model.safetensors")
    tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS) for i in range(LAYERS)}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    how = recipe(axis="all", ratio_of="decoder", ratio=0.4, criterion="weight-l2", width_multiple=1)
    results = [dicer.prune(folder, how, output=folder.with_suffix(".out")) for folder in (clean, old)]
    assert results[0].before == results[1].before
    assert results[0].after == results[1].after
    assert_same_tensors(tensors_in(tmp_path / "clean.out"), tensors_in(tmp_path / "old.out"))
    note = "5 tensors that are no part of the model are left out"
    assert [any(note in line for line in result.notes) for result in results] == [False, True]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shards_or_a_single_file(family, tmp_path, recipe):
    shards = save_tiny(tmp_path / "shards", family, shards=True)
    single = save_tiny(tmp_path / "single", family)
    assert len(list(shards.glob("model-*.safetensors"))) > 3
    assert (single / "model.safetensors").is_file()
    results = [dicer.prune(f, recipe(layers="1-2"), output=tmp_path / f"{f.name}-out") for f in (shards, single)]
    assert results[0].plan.model["fingerprint"] == results[1].plan.model["fingerprint"]
    assert_same_tensors(tensors_in(tmp_path / "shards-out"), tensors_in(tmp_path / "single-out"))
    assert results[0].plan.files()["dicer_plan.tensors"] == results[1].plan.files()["dicer_plan.tensors"]


def test_a_tensor_that_no_config_calls_for(tmp_path, recipe):
    dense = save_tiny(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    save_file({**tensors, "extra.buffer": torch.arange(3)}, dense / "model.safetensors", metadata={"format": "pt"})
    dicer.apply_plan(dicer.make_plan(dense, recipe(method="weight-l2")), dense, tmp_path / "out")
    assert torch.equal(tensors_in(tmp_path / "out")["extra.buffer"], torch.arange(3))


def test_tokenizer_named_by_the_model_type_alone(tmp_path):
    """Old GPT-2 folders have vocab.json and merges.txt, and nothing says which class reads them but the model type."""
    folder = tmp_path / "model"
    tiny_model("gpt2").save_pretrained(folder)
    alphabet = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()), start=4)}
    (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, **alphabet}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    before = AutoTokenizer.from_pretrained(folder)
    dicer.prune(folder, dicer.Recipe(layers="1-2", seq_len=24, samples=2), output=tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(after) is type(before)
    assert after("Two words.")["input_ids"] == before("Two words.")["input_ids"] != []


@pytest.mark.parametrize(("family", "stock"), [("llama", False), ("gemma2", False), ("mistral", True), ("qwen2", True)])
def test_three_of_four_heads(family, stock, tmp_path):
    """32 is no multiple of 3, which some stock configs refuse; those get the form with a say for every layer."""
    dense = save_tiny(tmp_path / "dense", family, kv_heads=4)
    layers = {i: LayerPlan(4, torch.tensor([0, 2, 3]), torch.zeros(4)) for i in range(LAYERS)}
    plan = plan_for(open_model(dense), {"attention": layers})
    dicer.apply_plan(plan, dense, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_pruned.py").exists() is not stock
    loaded = dicer.load(tmp_path / "out")
    assert_near(logits_of(loaded), logits_of(masked(dicer.load(dense), f"{family}-tied-mha", plan)))
    if stock:
        assert (loaded.config.num_attention_heads, loaded.config.head_dim) == (3, 8)
