"""Checkpoints padded until the stock class loads them: the same model, bit by bit or nearly, without code."""

from __future__ import annotations

import json

import pytest
import torch
from reading import save_shaped, save_stock, weights
from tiny import FAMILIES, HIDDEN, LAYERS, NEURONS, tiny_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from dicer.errors import ModelError
from dicer.model.source import open_model
from dicer.write.export.stock import export_stock

TOLERANCE = 1e-6  # relative; a longer sum of the same numbers and zeros may round otherwise
HEADS = {"gpt2": {"n_head": 3}, "opt": {"num_attention_heads": 3}}
WIDTH = {"gpt2": "n_inner", "opt": "ffn_dim"}
BIASED = ("llama",)  # whose stock class can have biases behind both sub-layers
ATTENTION_BIASED = ("qwen3", "gemma", "gemma2", "gemma3_text")


def layers_of(family):
    heads = HEADS.get(family, {"num_attention_heads": 2, "num_key_value_heads": 1})
    width = WIDTH.get(family, "intermediate_size")
    return {
        "neurons": {0: {width: 24}, 2: {width: 9}},
        "heads": {1: heads},
        "mlp gone": {1: {"skip": ["mlp"]}, 3: heads},
        "attention gone": {0: {"skip": ["attention"]}, 3: {width: 1}},
        "all narrower": {i: {**heads, width: 20 + i} for i in range(LAYERS)},
    }


def logits(model):
    with torch.inference_mode():
        return model(tiny_tokens(2, 16)).logits


def check(folder, out, family):
    export_stock(open_model(folder), out)
    exact = {"dtype": torch.float64}  # an MLP of one neuron can be near zero, and a norm behind it divides by that
    before, after = (AutoModelForCausalLM.from_pretrained(path, **exact).eval() for path in (folder, out))
    assert type(after).__module__.startswith("transformers.models.")
    assert not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "per_layer_config"} & config.keys()
    wanted = logits(before)
    torch.testing.assert_close(logits(after), wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())
    assert AutoTokenizer.from_pretrained(out)("the sea")["input_ids"]
    return config


@pytest.mark.parametrize("case", layers_of("llama"))
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_differ(tmp_path, family, case):
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock", family), layers_of(family)[case])
    config = check(folder, tmp_path / "out", family)
    if case == "all narrower":
        assert config[WIDTH.get(family, "intermediate_size")] == 23
        key = "n_head" if family == "gpt2" else "num_attention_heads"
        assert config[key] == (4 if family in HEADS else 2)  # GPT-2 and OPT take the size of a head from their number


def test_padded_with_zeros(tmp_path):
    layers = {0: {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}, 1: {"skip": ["mlp"]}}
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock"), layers)
    result = export_stock(open_model(folder), tmp_path / "out")
    before, after = weights(folder), weights(tmp_path / "out")
    down = after["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(down[:, :24], before["model.layers.0.mlp.down_proj.weight"])
    assert not down[:, 24:].any()
    assert not after["model.layers.1.mlp.up_proj.weight"].any()
    padding = HIDDEN + (16 * HIDDEN * 3) + (NEURONS * HIDDEN * 3) + (16 * HIDDEN * 2) + (8 * HIDDEN * 2)
    assert result.notes[0].startswith(
        f"{padding:,} of {sum(t.numel() for t in after.values()):,} parameters are padding"
    )
    assert json.loads((tmp_path / "out" / "dicer_export.json").read_text())["padding"] == padding


def test_stock_checkpoint_stays(tmp_path):
    folder = save_stock(tmp_path / "model", shards=True)
    export_stock(open_model(folder), tmp_path / "out")
    source = open_model(folder).tensors
    written = weights(tmp_path / "out")
    assert written.keys() == source.infos().keys()
    assert all(torch.equal(tensor, source.read(name)) for name, tensor in written.items())


@pytest.mark.parametrize(("pad", "width"), [(1, 40), (32, 64), (256, 256)])
def test_multiple(tmp_path, pad, width):
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock"), {0: {"intermediate_size": 24}})
    export_stock(open_model(folder), tmp_path / "out", pad=pad)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == width


OUTPUT_BIASES = {
    "attention": {1: {"output_bias": ["attention"]}},
    "constant": {1: {"output_bias": ["attention"], "skip": ["attention"]}, 2: {"skip": ["mlp"]}},
    "mlp": {0: {"output_bias": ["mlp"]}, 2: {"output_bias": ["mlp"], "skip": ["mlp"]}},
    "both": {0: {"output_bias": ["attention", "mlp"]}, 3: {"output_bias": ["mlp"]}},
}


@pytest.mark.parametrize("case", OUTPUT_BIASES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "qwen2", "mistral", "phi3"])
def test_output_biases(tmp_path, family, case):
    stock = save_stock(tmp_path / "stock", family)
    folder = save_shaped(tmp_path / "model", stock, OUTPUT_BIASES[case], output_bias=[])
    if family in BIASED or (family in ATTENTION_BIASED and case in ("attention", "constant")):
        check(folder, tmp_path / "out", family)
        return
    with pytest.raises(ModelError, match=r"has no bias behind its .*Prune it without '--compensate bias'"):
        export_stock(open_model(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_left_of_an_axis(tmp_path):
    layers = {i: {"skip": ["mlp"]} for i in range(LAYERS)}
    folder = save_shaped(tmp_path / "model", save_stock(tmp_path / "stock"), layers)
    with pytest.raises(ModelError, match="no layer has any mlp left"):
        export_stock(open_model(folder), tmp_path / "out")
