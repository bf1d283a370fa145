"""What a GGUF file says besides its tensors: sizes, positions, windows, caps; and what no file can say."""

from __future__ import annotations

import math

import pytest
import torch
from reading import File, know_tiny_tokenizer, save_shaped, save_stock
from tiny import HIDDEN, LAYERS, NEURONS, POSITIONS, VOCABULARY

from dicer.errors import ModelError
from dicer.model.source import open_model
from dicer.write.export.llama_cpp.file import export_gguf

SIZE = 8  # of a head


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    know_tiny_tokenizer(monkeypatch)


def exported(folder, out):
    result = export_gguf(open_model(folder), out / "model.gguf")
    return File(result.path), result.notes


def tiny(tmp_path, family="llama", **options):
    return save_stock(tmp_path / "model", family, **options)


def test_sizes(tmp_path):
    file, notes = exported(tiny(tmp_path), tmp_path)
    wanted = {
        "general.type": "model",
        "general.name": "model",
        "general.file_type": 0,
        "block_count": LAYERS,
        "context_length": POSITIONS,
        "embedding_length": HIDDEN,
        "feed_forward_length": NEURONS,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": SIZE,
        "attention.value_length": SIZE,
        "vocab_size": VOCABULARY,
        "rope.dimension_count": SIZE,
        "rope.freq_base": 10000.0,
    }
    assert {key: file.keys[key] for key in wanted} == wanted
    assert file.keys["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert notes == []


@pytest.mark.parametrize(("family", "arch"), [("llama", "deci"), ("qwen3", "openelm")])
def test_description_where_the_architecture_is_another(tmp_path, family, arch):
    folder = save_shaped(tmp_path / "own", tiny(tmp_path, family, tied=True), {0: {"intermediate_size": 8}})
    file, _ = exported(folder, tmp_path)
    assert file.arch == arch
    assert family in file.keys["general.description"]
    assert arch in file.keys["general.description"]


def test_gpt2_has_no_rotary_positions(tmp_path):
    file, _ = exported(tiny(tmp_path, "gpt2"), tmp_path)
    assert not [key for key in file.keys if key.startswith("rope")]
    assert file.keys["attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert file.keys["context_length"] == POSITIONS


# Positions


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 50000.0, "factor": 4.0, **more}}


@pytest.mark.parametrize("layers", [None, {1: {"intermediate_size": 12}}])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_llama3_scaling(tmp_path, layers, family):
    """Long waves are divided by the factor, short ones by one, those between by what lies between."""
    said = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    folder = tiny(tmp_path, family, **said)
    file, _ = exported(save_shaped(tmp_path / "own", folder, layers) if layers else folder, tmp_path)
    wanted = []
    for i in range(SIZE // 2):
        wave = 2 * math.pi * 50000.0 ** (2 * i / SIZE)
        smooth = (64 / wave - 1.0) / (4.0 - 1.0)
        wanted.append(1.0 if wave < 64 / 4 else 4.0 if wave > 64 else 1 / ((1 - smooth) / 4.0 + smooth))
    assert file.tensors["rope_freqs.weight"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert len({round(w, 3) for w in wanted}) > 1
    assert file.keys["rope.freq_base"] == 50000.0
    assert "rope.scaling.type" not in file.keys


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (rope("linear"), {"type": "linear", "factor": 4.0}),
        (rope("yarn"), {"type": "yarn", "factor": 4.0, "original_context_length": POSITIONS}),
        (
            rope("yarn", original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0),
            {"original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
        ),
        (rope("yarn", attention_factor=0.1 * math.log(4.0) + 1), {"type": "yarn", "yarn_beta_fast": 32.0}),
    ],
)
def test_other_scaling(tmp_path, family, said, wanted):
    file, _ = exported(tiny(tmp_path, family, tied=True, **said), tmp_path)
    assert {key: file.keys[f"rope.scaling.{key}"] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("family", "said", "name"),
    [
        ("llama", rope("dynamic"), "dynamic"),
        ("llama", rope("yarn", attention_factor=2.0), "attention factor"),
        ("llama", rope("yarn", truncate=False), "truncation"),
        (
            "qwen3",
            rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
            "llama3",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "a part",
        ),
    ],
)
def test_scaling_that_llama_cpp_does_not_have(tmp_path, family, said, name):
    folder = tiny(tmp_path, family, **said)
    with pytest.raises(ModelError, match=name):
        exported(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_phi3_longrope(tmp_path):
    short, long = [1.0, 1.5, 2.0, 2.5], [2.0, 3.0, 4.0, 5.0]
    said = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    folder = tiny(tmp_path, "phi3", rope_parameters=said, original_max_position_embeddings=32)
    file, notes = exported(folder, tmp_path)
    assert file.tensors["rope_factors_short.weight"].tolist() == short
    assert file.tensors["rope_factors_long.weight"].tolist() == long
    assert file.keys["rope.scaling.original_context_length"] == 32
    attention = math.sqrt(1 + math.log(POSITIONS / 32) / math.log(32))
    assert file.keys["rope.scaling.attn_factor"] == pytest.approx(attention)
    assert "above 32 tokens" in notes[0]


def test_phi3_rotates_a_part(tmp_path):
    said = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    file, _ = exported(tiny(tmp_path, "phi3", rope_parameters=said), tmp_path)
    assert (file.keys["rope.dimension_count"], file.keys["attention.key_length"]) == (SIZE // 2, SIZE)


# Windows and caps


@pytest.mark.parametrize(
    ("family", "options", "context"),
    [
        ("mistral", {}, 8),
        ("mistral", {"sliding_window": None}, POSITIONS),
        ("mistral", {"sliding_window": 4 * POSITIONS}, POSITIONS),
        ("qwen2", {}, 8),
        ("qwen2", {"use_sliding_window": False}, POSITIONS),
        ("phi3", {"sliding_window": 16}, 16),
        ("gemma2", {}, POSITIONS),
        ("gemma2", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}, 8),
    ],
)
def test_context_within_the_window(tmp_path, family, options, context):
    file, notes = exported(tiny(tmp_path, family, **{"tied": True, **options}), tmp_path)
    assert file.keys["context_length"] == context
    assert [f"the context is {context} tokens" in note for note in notes] == [True] * (context < POSITIONS)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        ([SLIDING, FULL] * 2, 2),
        ([SLIDING] * 3 + [FULL], 4),
        ([FULL] * 4, 1),
        ([SLIDING] * 4, 5),
        ([SLIDING, SLIDING, FULL, SLIDING], 3),
    ],
)
def test_gemma_window(tmp_path, kinds, period):
    file, _ = exported(tiny(tmp_path, "gemma3_text", tied=True, layer_types=kinds), tmp_path)
    assert (file.keys["attention.sliding_window"], file.keys["attention.sliding_window_pattern"]) == (8, period)
    assert (file.keys["rope.freq_base"], file.keys["rope.freq_base_swa"]) == (1e6, 1e4)


def test_gemma2_caps(tmp_path):
    file, _ = exported(tiny(tmp_path, "gemma2", tied=True), tmp_path)
    assert (file.keys["attn_logit_softcapping"], file.keys["final_logit_softcapping"]) == (50.0, 30.0)
    assert (file.keys["attention.sliding_window"], file.keys["attention.sliding_window_pattern"]) == (8, 2)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("gemma3_text", {"layer_types": [FULL, SLIDING, FULL, SLIDING]}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"activation_function": "relu"}, "not relu"),
        ("llama", {"hidden_act": "gelu"}, "not gelu"),
        ("gemma2", {"hidden_activation": "silu"}, "not silu"),
        ("qwen3", {"attention_bias": True}, "no bias in self_attn.k_proj"),
        ("gemma", {"tied": False}, "no head of its own"),
        ("opt", {}, "no architecture for the family opt"),
    ],
)
def test_what_no_file_can_say(tmp_path, family, options, says):
    folder = tiny(tmp_path, family, **{"tied": family != "opt", **options})
    with pytest.raises(ModelError, match=says):
        exported(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma2", "gemma3_text", "phi3"])
def test_output_bias_without_a_place(tmp_path, family):
    stock = tiny(tmp_path, family, tied=True)
    folder = save_shaped(tmp_path / "own", stock, {1: {"output_bias": ["mlp"]}}, output_bias=[])
    with pytest.raises(ModelError, match=r"no bias in mlp.down_proj.*Prune it without '--compensate bias'"):
        exported(folder, tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_padding_is_told(tmp_path, family):
    folder = save_shaped(
        tmp_path / "own", tiny(tmp_path, family), {0: {"intermediate_size": 10}}, tie_word_embeddings=True
    )
    file, notes = exported(folder, tmp_path)
    one = 30 * HIDDEN * 3
    assert notes == ([] if file.arch in ("deci", "openelm") else [notes[0]])
    assert all(f"{one:,} zeros were added" in note and "one width for all layers" in note for note in notes)


def test_pruned_blocks_of_qwen2(tmp_path):
    """A model whose heads no longer fill its hidden size is no qwen2 of llama.cpp, but a deci."""
    half = {i: {"num_attention_heads": 2, "num_key_value_heads": 1} for i in range(LAYERS)}
    file, _ = exported(save_shaped(tmp_path / "own", tiny(tmp_path, "qwen2"), half), tmp_path)
    assert (file.arch, file.keys["attention.head_count"]) == ("deci", 2)
    assert torch.isfinite(file.tensors["blk.0.attn_q.weight"]).all()
