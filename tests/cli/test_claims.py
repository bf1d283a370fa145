"""Numbers in files are claims: held against the tensors, the text and the machine, before anything is built of them."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from tiny import save_tiny

SECONDS = 20
pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


COUNTS = [
    *(("num_hidden_layers", value) for value in (5_000, 10**6, 10**30, 1e6)),
    *((key, value) for key in ("n_layer", "num_experts", "num_local_experts") for value in (10**6, 10**30)),
    *(("num_labels", 10**9), ("max_window_layers", 10**9), ("num_experts_per_tok", 10**9)),
]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("key", "value"), COUNTS)
def test_count_in_a_config(refused, tmp_path, family, key, value):
    folder = save_tiny(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    refused("info", folder, says=[f"config.json says {key} {value:,}"])


@pytest.mark.parametrize("nest", [("text_config",), ("vision_config", "encoder"), ("a", "b", "c")])
def test_count_in_a_part_of_a_config(refused, tmp_path, model, nest):
    folder = shutil.copytree(model, tmp_path / "model")
    inner = {"num_hidden_layers": 10**9}
    for name in reversed(nest):
        inner = {name: inner}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **inner}))
    refused("info", folder, says=["config.json says num_hidden_layers 1,000,000,000, and no model has more"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", 10**12), ("vocab_size", 10**12), ("intermediate_size", 10**18), ("hidden_size", 10**40)),
        *(("num_attention_heads", 10**9), ("head_dim", 10**9), ("num_key_value_heads", 0), ("hidden_size", -1)),
        *(("intermediate_size", 1e308), ("num_hidden_layers", -5), ("num_hidden_layers", 0)),
    ],
)
def test_size_in_a_config(refused, tmp_path, model, key, value):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    refused("prune", folder, "-o", tmp_path / "out", "--method", "weight-l2")


@pytest.mark.parametrize(
    "line",
    [
        *("samples = 100000000000000000000", "samples = 1e20", "samples = 16777216", "seq_len = 10000000000"),
        *("batch_size = 100000000000000000000", "groups = 100000000000000000000", "rolls = 1000000000"),
        *("min_width = 100000000000000000000", "width_multiple = 100000000000000000000", "seed = 9223372036854775808"),
        *(".".join(["a"] * 100_000) + " = 1", "set = " + "[" * 10_000, "layers = '0-999999'", "ratio = 1e400"),
        *("set.groups = 100000000000000000000", "ridge = 1e400", "samples = " + "9" * 5000),
    ],
)
def test_number_in_a_recipe(refused, tmp_path, model, line, monkeypatch):
    monkeypatch.setattr("dicer.measure.batches.free_memory", lambda _: 2**33)
    more = "method = 'rc-a'\nrepair = 'none'\n" if not line.startswith(("set", "a.a")) else ""
    (tmp_path / "recipe.toml").write_text(f"{more}{line}\n")
    refused("prune", model, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    refused("prune", model, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.toml", "--dry-run")


@pytest.mark.parametrize("flag", ["--samples", "--seq-len", "--batch-size", "--groups", "--rolls", "--min-width"])
@pytest.mark.parametrize("value", ["1e20", "100000000000000000000", "-1", "9" * 5000])
def test_number_of_a_flag(refused, tmp_path, model, flag, value):
    refused("prune", model, "-o", tmp_path / "out", flag, value)


def test_lists_that_multiply(refused, tmp_path, model):
    values = list(range(1000))
    (tmp_path / "a.toml").write_text(
        f"models = ['{model}']\nmethods = ['rc-a']\nseeds = {values}\nsamples = {values}\n"
    )
    refused("run", tmp_path / "a.toml", "-o", tmp_path / "r", says=["the lists multiply to 1,000,000 runs"])
    own = f"[[methods]]\nmethod = 'rc-a'\nseeds = {values}\nratios = {[0.5] * 1000}\n"
    (tmp_path / "a.toml").write_text(f"models = ['{model}']\n{own}")
    refused("run", tmp_path / "a.toml", "-o", tmp_path / "r", says=["the lists multiply to 1,000,000 runs"])


def test_row_longer_than_the_model_sees(refused, tmp_path, model):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [5] * 100_000}))
    says = ["samples of 100,000 tokens are more than 8 times as long as the model's 128 positions"]
    refused("prune", model, "-o", tmp_path / "out", "--calib", tmp_path / "a.jsonl", says=says)


def test_rows_that_one_makes_long(refused, tmp_path, model, monkeypatch):
    """All rows are kept as long as the longest."""
    monkeypatch.setattr("dicer.measure.batches.free_memory", lambda _: 2**33)
    rows = [{"input_ids": [5, 6]}] * 20_000 + [{"input_ids": [5] * 100_000}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    says = ["20,001 samples of up to 100,000 tokens take", "Ask for fewer"]
    refused("prune", model, "-o", tmp_path / "out", "--calib", tmp_path / "a.jsonl", says=says)


@pytest.mark.parametrize("factor", ["1e999999999", "1e9", "0", "-1", "1/0", "9" * 100])
def test_factor_of_a_family(refused, tmp_path, model, factor):
    (tmp_path / "a.toml").write_text(f"model_type = 'llama'\n[axes.mlp]\nfactor = '{factor}'\n")
    start = time.monotonic()
    refused("info", model, "--family", tmp_path / "a.toml", says=["a.toml"])
    assert time.monotonic() - start < SECONDS / 2


@pytest.mark.parametrize(("old", "new"), [("axes.mlp", "axes.mfp"), ("intermediate_size", "interm2diate_size")])
def test_name_in_a_family(refused, tmp_path, model, old, new):
    down = '{ name = "mlp.down_proj.weight", dim = 1, roles = ["down"] }'
    text = f'model_type = "llama"\n[axes.mlp]\nkey = "intermediate_size"\nslices = [{down}]\n'
    (tmp_path / "a.toml").write_text(text.replace(old, new))
    refused(
        "info",
        model,
        "--family",
        tmp_path / "a.toml",
        says=["a.toml", "Did you mean" if "key" in text else "", new[-3:]],
    )
