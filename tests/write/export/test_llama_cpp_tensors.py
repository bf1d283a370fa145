"""Every tensor of a GGUF file against the checkpoint's: rows, padding and shifts from the formulas."""

from __future__ import annotations

import pytest
import torch
from reading import File, know_tiny_tokenizer, save_shaped, save_stock, weights
from tiny import FAMILIES, HIDDEN, LAYERS, NEURONS

from dicer.model.source import open_model
from dicer.write.export.llama_cpp import arch as archs
from dicer.write.export.llama_cpp.file import export_gguf

OWN = {"mistral": "llama", "gemma3_text": "gemma3"}  # else an architecture is called as its family
WITH_ARCH = [family for family in FAMILIES if family != "opt"]
ALWAYS_TIED = ("gemma", "gemma2")
SIZE = 8  # of a head
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
POST_NORMS = {  # Gemma 2 and 3
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    know_tiny_tokenizer(monkeypatch)


def exported(folder, out, **options):
    return File(export_gguf(open_model(folder), out / "model.gguf", **options).path)


def their_name(family, name):
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, index, inner = name.split(".", 3)
    names = LAYER_NAMES | (POST_NORMS if family in ("gemma2", "gemma3_text") else {})
    for ours, theirs in names.items():
        if inner == ours or inner.startswith(f"{ours}."):
            return f"blk.{index}.{theirs}{inner.removeprefix(ours)}"
    raise AssertionError(name)


def paired(rows, heads):
    """Row 2j of a head is its row j, row 2j+1 its row j + size/2."""
    size = len(rows) // heads
    order = [h * size + j % 2 * (size // 2) + j // 2 for h in range(heads) for j in range(size)]
    return rows[order]


def expected(family, name, tensor, heads=4, groups=2):
    if family in ("llama", "mistral") and "q_proj" in name:
        return paired(tensor, heads)
    if family in ("llama", "mistral") and "k_proj" in name:
        return paired(tensor, groups)
    if family == "gpt2" and ".h." in name and tensor.dim() == 2:
        return tensor.T
    if family.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    if (family == "gemma2" and "q_proj" in name) or (family == "gemma3_text" and "q_norm" in name):
        tensor = tensor * (SIZE / 256) ** 0.5  # the config's query_pre_attn_scalar is 256, llama.cpp takes the head's
    return tensor


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", WITH_ARCH)
def test_stock_checkpoint(tmp_path, family, tied):
    folder = save_stock(tmp_path / "model", family, tied=tied or family in ALWAYS_TIED)
    file = exported(folder, tmp_path)
    assert file.arch == OWN.get(family, family)
    stored = weights(folder)
    assert file.tensors.keys() == {their_name(family, name) for name in stored}
    for name, tensor in stored.items():
        found = file.tensors[their_name(family, name)]
        exact = not (family in ("gemma2", "gemma3_text") and ("q_proj" in name or "q_norm" in name))
        torch.testing.assert_close(found, expected(family, name, tensor), rtol=0 if exact else 1e-6, atol=0)
    assert ("output.weight" in file.tensors) == (not tied and family not in ALWAYS_TIED)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(tmp_path, dtype, type):
    folder = save_stock(tmp_path / "model", dtype=dtype)
    file = exported(folder, tmp_path, type=type)
    whole = exported(folder, tmp_path, type="f32", pad=32 if type == "q8_0" else 1, overwrite=True)
    for name, tensor in whole.tensors.items():
        vector, short = tensor.dim() == 1, tensor.shape[-1] % 32 != 0
        wanted = "F32" if vector else "F16" if type == "q8_0" and short else type.upper()
        assert file.types[name] == wanted
        step = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}.get(wanted)
        close = tensor.abs().max() / 200 if step is None else step * tensor.abs() + 1e-7
        assert ((file.tensors[name] - tensor).abs() <= close).all()


@pytest.mark.parametrize(("dtype", "type"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_type_of_the_checkpoint(tmp_path, dtype, type):
    file = exported(save_stock(tmp_path / "model", dtype=dtype), tmp_path)
    assert {kind for name, kind in file.types.items() if "norm" not in name} == {type}
    assert {kind for name, kind in file.types.items() if "norm" in name} == {"F32"}


# Layers that differ: trap by trap

UNEQUAL = {
    "neurons": {0: {"intermediate_size": 24}, 2: {"intermediate_size": 7}},
    "heads": {1: {"num_attention_heads": 2, "num_key_value_heads": 1}},
    "both": {0: {"num_attention_heads": 2, "num_key_value_heads": 1}, 3: {"intermediate_size": 1}},
    "mlp gone": {2: {"skip": ["mlp"]}},
    "attention gone": {0: {"skip": ["attention"]}},
    "attention gone in the middle": {2: {"skip": ["attention"]}},
    "both gone": {1: {"skip": ["attention", "mlp"]}, 3: {"num_attention_heads": 2, "num_key_value_heads": 1}},
}


def sizes(layer, widest=False):
    """(query heads, key-value heads, neurons) of a layer of these, as the file must have them."""
    gone = layer.get("skip", ())
    heads = 1 if "attention" in gone else layer.get("num_key_value_heads", 2)
    neurons = 32 if "mlp" in gone else layer.get("intermediate_size", NEURONS)
    return (4, 2, NEURONS) if widest else (2 * heads, heads, neurons)


@pytest.mark.parametrize("layers", UNEQUAL.values(), ids=UNEQUAL)
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("mistral", True), ("qwen2", True), ("qwen3", True), ("qwen3", False)]
)
def test_own_width_of_every_layer(tmp_path, family, layers, tied):
    stock = save_stock(tmp_path / "stock", family, tied=tied)
    folder = save_shaped(tmp_path / "model", stock, layers)
    file, stored = exported(folder, tmp_path), weights(folder)
    padded = family == "qwen3" and not tied
    assert file.arch == ("qwen3" if padded else "openelm" if family == "qwen3" else "deci")
    wanted = [sizes(layers.get(i, {}), padded) for i in range(LAYERS)]
    for key, column in (("attention.head_count", 0), ("attention.head_count_kv", 1), ("feed_forward_length", 2)):
        said = file.keys[key]
        assert (said if isinstance(said, list) else [said] * LAYERS) == [sizes[column] for sizes in wanted]
    assert (file.keys["attention.key_length"], file.keys["attention.value_length"]) == (SIZE, SIZE)
    assert file.keys["rope.dimension_count"] == SIZE
    for i, (heads, groups, neurons) in enumerate(wanted):
        check_layer(file, stored, family, i, heads, groups, neurons)


def check_layer(file, stored, family, i, heads, groups, neurons):
    def own(name):
        return stored.get(f"model.layers.{i}.{name}.weight")

    def block(name):
        return file.tensors[f"blk.{i}.{name}.weight"]

    for ours, theirs, rows, turn in (
        ("q", "attn_q", heads, True),
        ("k", "attn_k", groups, True),
        ("v", "attn_v", groups, 0),
    ):
        if file.arch == "openelm":
            start = {"q": 0, "k": heads, "v": heads + groups}[ours] * SIZE
            found = block("attn_qkv")[start : start + rows * SIZE]
        else:
            found = block(theirs)
        tensor = padded(own(f"self_attn.{ours}_proj"), rows * SIZE, 0, HIDDEN)
        assert torch.equal(found, paired(tensor, rows) if turn and file.arch == "deci" else tensor)
        if family == "qwen2":
            bias = padded(stored.get(f"model.layers.{i}.self_attn.{ours}_proj.bias"), rows * SIZE, 0)
            assert torch.equal(file.tensors[f"blk.{i}.{theirs}.bias"], paired(bias, rows) if turn else bias)
    assert torch.equal(block("attn_output"), padded(own("self_attn.o_proj"), heads * SIZE, 1, HIDDEN))
    for ours, theirs, dim in (("gate", "ffn_gate", 0), ("up", "ffn_up", 0), ("down", "ffn_down", 1)):
        assert torch.equal(block(theirs), padded(own(f"mlp.{ours}_proj"), neurons, dim, HIDDEN))
    for ours, theirs in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
        found = own(ours)
        assert torch.equal(block(theirs), torch.ones(HIDDEN) if found is None else found)


def padded(tensor, length, dim, other=None):
    """Zeros behind a tensor, or nothing but zeros where there is none."""
    shape = [length] if other is None else [length, other] if dim == 0 else [other, length]
    result = torch.zeros(shape)
    if tensor is not None:
        result.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return result


@pytest.mark.parametrize("gone", ["input_layernorm", "post_attention_layernorm"])
def test_norm_of_a_sub_layer_that_is_gone_is_missing(tmp_path, gone):
    """Nothing depends on it, so checkpoints have none, and llama.cpp wants one."""
    skip = "attention" if gone == "input_layernorm" else "mlp"
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock"), {1: {"skip": [skip]}})
    assert f"model.layers.1.{gone}.weight" not in weights(folder)
    file = File(export_gguf(open_model(folder), tmp_path / "model.gguf").path)
    assert torch.equal(
        file.tensors[f"blk.1.{'attn' if skip == 'attention' else 'ffn'}_norm.weight"], torch.ones(HIDDEN)
    )


BIASES = {
    "kept": {0: {"output_bias": ["attention", "mlp"]}},
    "one of many": {1: {"output_bias": ["mlp"]}, 2: {"intermediate_size": 12}},
    "constant instead of attention": {2: {"output_bias": ["attention"], "skip": ["attention"]}},
    "constant instead of mlp": {0: {"output_bias": ["mlp"], "skip": ["mlp"]}, 1: {"output_bias": ["attention"]}},
}


@pytest.mark.parametrize("layers", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_output_biases(tmp_path, family, layers):
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock", family), layers, output_bias=[])
    file, stored = exported(folder, tmp_path), weights(folder)
    assert file.arch in ("deci", "llama")
    for axis, (module, output, theirs) in {
        "attention": ("self_attn", "o_proj", "attn_output"),
        "mlp": ("mlp", "down_proj", "ffn_down"),
    }.items():
        for i in range(LAYERS):
            own = stored.get(f"model.layers.{i}.{module}.{output}.bias", stored.get(f"model.layers.{i}.{module}.bias"))
            found = file.tensors.get(f"blk.{i}.{theirs}.bias")
            assert (own is not None) == (axis in layers.get(i, {}).get("output_bias", ()))
            if own is not None:
                assert torch.equal(found, own)
            elif found is not None:
                assert not found.any()


# Architectures with one width: padded to the widest, heads to what they must be


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_gemma_padded(tmp_path, family):
    layers = {
        0: {"num_attention_heads": 2, "num_key_value_heads": 1},
        1: {"intermediate_size": 9},
        3: {"skip": ["mlp"]},
    }
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock", family, tied=True), layers)
    file, stored = exported(folder, tmp_path), weights(folder)
    keys = [file.keys[f"attention.{key}"] for key in ("head_count", "head_count_kv")]
    assert [*keys, file.keys["feed_forward_length"]] == [4, 2, NEURONS]
    value = stored["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(file.tensors["blk.0.attn_v.weight"], padded(value, 2 * SIZE, 0, HIDDEN))
    assert torch.equal(file.tensors["blk.3.ffn_gate.weight"], torch.zeros(NEURONS, HIDDEN))
    down = stored["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(file.tensors["blk.1.ffn_down.weight"], padded(down, NEURONS, 1, HIDDEN))


@pytest.mark.parametrize("layers", [{0: {"num_attention_heads": 2, "num_key_value_heads": 1}}, None])
def test_phi3_heads_fill_the_hidden_size(tmp_path, layers):
    half = {i: {"num_attention_heads": 2, "num_key_value_heads": 1} for i in range(LAYERS)}
    stock = save_stock(tmp_path / "stock", "phi3")
    folder = save_shaped(tmp_path / "model", stock, layers or half)
    file, stored = exported(folder, tmp_path), weights(folder)
    assert (file.keys["attention.head_count"], file.keys["attention.head_count_kv"]) == (4, 2)
    query, key, value = stored["model.layers.0.self_attn.qkv_proj.weight"].split([16, 8, 8])
    wanted = [padded(part, rows, 0, HIDDEN) for part, rows in ((query, 32), (key, 16), (value, 16))]
    assert torch.equal(file.tensors["blk.0.attn_qkv.weight"], torch.cat(wanted))


def test_phi3_gate_and_up_padded_apart(tmp_path):
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock", "phi3"), {1: {"intermediate_size": 6}})
    file, stored = exported(folder, tmp_path), weights(folder)
    halves = stored["model.layers.1.mlp.gate_up_proj.weight"].chunk(2)
    wanted = torch.cat([padded(half, NEURONS, 0, HIDDEN) for half in halves])
    assert torch.equal(file.tensors["blk.1.ffn_up.weight"], wanted)


@pytest.mark.parametrize("layers", [{0: {"n_head": 3}}, {2: {"n_head": 1}, 3: {"n_inner": 5}}])
def test_gpt2_padded(tmp_path, layers):
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock", "gpt2"), layers)
    file, stored = exported(folder, tmp_path), weights(folder)
    assert file.keys["attention.head_count"] == 4
    for i, own in layers.items():
        rows = own.get("n_head", 4) * SIZE
        for kind in ("weight", "bias"):
            parts = stored[f"transformer.h.{i}.attn.c_attn.{kind}"].split([rows] * 3, dim=-1)
            wanted = [
                padded(part.T if kind == "weight" else part, HIDDEN, 0, *[HIDDEN] * (kind == "weight"))
                for part in parts
            ]
            assert torch.equal(file.tensors[f"blk.{i}.attn_qkv.{kind}"], torch.cat(wanted))


@pytest.mark.parametrize(
    ("pad", "type", "neurons"), [(None, "q8_0", 64), (256, "f32", 256), (None, "f32", 40), (8, "f32", 40)]
)
def test_multiple_of_neurons(tmp_path, pad, type, neurons):
    folder = save_stock(tmp_path / "model")
    file = exported(folder, tmp_path, type=type, pad=pad)
    assert file.keys["feed_forward_length"] == neurons
    assert file.tensors["blk.0.ffn_down.weight"].shape == (HIDDEN, neurons)
    if type == "q8_0":
        assert {file.types[f"blk.{i}.ffn_{part}.weight"] for i in range(LAYERS) for part in ("gate", "down")} == {
            "Q8_0"
        }


def test_wide_gemma_takes_its_scale_from_the_width(tmp_path, monkeypatch):
    """llama.cpp takes 46 layers for the 27B, whose scale is that of hidden size over heads."""
    folder = save_stock(
        tmp_path / "model", "gemma2", tied=True, num_hidden_layers=46, query_pre_attn_scalar=HIDDEN // 4
    )
    query = weights(folder)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(exported(folder, tmp_path).tensors["blk.0.attn_q.weight"], query)


def test_width_of_nothing_is_never_written():
    assert archs.EMPTY_NEURONS == 32  # 0 loads, and is silently wrong
