"""dicer verify: what was written against the masked original, its cache, and what shall serve it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from by_hand import CASES, assert_near, logits_of, masked, plan_of
from reading import know_tiny_tokenizer, save_shaped, save_stock
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import dicer
from dicer.errors import ModelError
from dicer.model.source import open_model
from dicer.write.export.llama_cpp.file import export_gguf
from dicer.write.opened import as_source
from dicer.write.surgery import plan_cut
from dicer.write.targets import parallel_line, targets_line
from dicer.write.verify import known_code
from dicer.write.verify.masked import masked_model


@pytest.fixture(scope="module")
def written(tmp_path_factory, model, calib):
    out = tmp_path_factory.mktemp("written") / "out"
    recipe = dicer.Recipe(method="sim-dominant", axis="mlp", layers="1-2", compensate="bias", calib=calib)
    dicer.prune(model, recipe, output=out)
    return out


@pytest.fixture
def hurt(written, tmp_path):
    return shutil.copytree(written, tmp_path / "hurt")


@pytest.mark.parametrize("shape", ["mixed with biases", "sub-layers gone with biases", "first block and more"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith(("mha", "bf16"))])
def test_masked_as_by_hand(case, shape, tmp_path):
    family, options = CASES[case]
    source = open_model(save_tiny(tmp_path / "dense", family, **options))
    plan = plan_of(source, case, shape)
    expected = masked(source.load_model(), case, plan)
    assert_near(logits_of(masked_model(source, plan)), logits_of(expected))


def test_good(run, written, model):
    lines = run("verify", written, "--against", model).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("good  the folder", "good  cache against no cache", "good  the masked original")
    ]
    assert float(lines[2].split("logit ")[1].split(",")[0]) < 1e-4


def test_without_the_original(run, written, model):
    assert f"not compared: give {model.name} with --against MODEL" in run("verify", written)


def test_weights_that_are_not_those_of_the_plan(command, hurt, model):
    tensors = load_file(hurt / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, hurt / "model.safetensors", metadata={"format": "pt"})
    code, out, err = command("verify", hurt, "--against", model)
    assert (code, err.count("\n")) == (2, 1)
    assert "BAD   the masked original" in out
    assert "is not what it should be: the masked original. Write it anew" in err


def _without(folder, name):
    (folder / name).unlink()


def _narrower(folder):
    config = json.loads((folder / "config.json").read_text())
    for name, shape in config["pruned"]["own"]["001"]["shapes"].items():
        shape[name.endswith("down_proj.weight")] = 7
    (folder / "config.json").write_text(json.dumps(config))


DAMAGED = {
    "no weights": (lambda f: _without(f, "model.safetensors"), "model.safetensors is missing"),
    "no config": (lambda f: _without(f, "config.json"), "has no config.json"),
    "no plan": (lambda f: _without(f, "dicer_plan.tensors"), "dicer_plan.tensors is missing"),
    "another width": (_narrower, "config.json calls for (7, 32)"),
    "half a file": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "truncated or corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_folder(refused, hurt, damage):
    DAMAGED[damage][0](hurt)
    assert DAMAGED[damage][1] in refused("verify", hurt)


def test_code_of_another_hand_is_not_run(command, hurt):
    (hurt / "modeling_pruned.py").write_text("raise SystemExit(99)\n")
    code, _, err = command("verify", hurt)
    assert (code, err.count("\n")) == (2, 1)
    assert "is none that dicer wrote, so it is not run" in err


def test_code_of_today_is_known():
    """Whoever changes the model file adds its hash: checkpoints with today's will be tomorrow's older ones."""
    assert hashlib.sha256(known_code.NOW.read_bytes()).hexdigest() in known_code.KNOWN


def test_code_of_an_older_dicer(run, hurt, monkeypatch):
    code = hurt / "modeling_pruned.py"
    code.write_text(code.read_text() + "# once\n")
    name = hashlib.sha256(code.read_bytes()).hexdigest()
    monkeypatch.setattr(known_code, "KNOWN", {name: "0.0.9"})
    assert "config; its code is that of dicer 0.0.9." in run("verify", hurt)


def test_target_that_is_not_there(refused, written, tmp_path):
    refused("verify", written, "--with", "vllm", says=["--vllm-python", "pip install vllm"])
    refused("verify", written, "--with", "vllm", "--vllm-python", tmp_path / "no", says=["is no file"])
    refused(
        "verify", written, "--with", "gguf", "--llama-cpp-python", tmp_path / "no", says=["is no file", "llama.cpp"]
    )
    refused("verify", written, "--with", "ggml", says=["unknown target 'ggml'", "gguf"])


def test_target_that_cannot_load_it(refused, tmp_path):
    dense = save_tiny(tmp_path / "dense", "gpt2")
    dicer.apply_plan(plan_of(open_model(dense), "gpt2", "neurons differ"), dense, tmp_path / "out")
    python = tmp_path / "python"
    python.write_text("")
    says = ["is no checkpoint for vLLM: it serves GPT-2 only with equal layers", "dicer export --to stock"]
    refused("verify", tmp_path / "out", "--with", "vllm", "--vllm-python", python, says=says)


EXPORTS = "llama.cpp ('dicer export --to gguf' makes it a"
WIDTHS = {1: {"intermediate_size": 24}}
LINES = {  # case -> family, its config, layers that differ, what the line has, and what the exporter makes of it
    "stock": ("llama", {}, None, f"Loads in transformers (no flag), vLLM, {EXPORTS} llama), torchao", "llama"),
    "widths": ("llama", {}, WIDTHS, f"vLLM (--trust-remote-code), {EXPORTS} deci), torchao", "deci"),
    "tied qwen3": ("qwen3", {"tied": True}, WIDTHS, f"{EXPORTS} openelm)", "openelm"),
    "untied qwen3": ("qwen3", {"tied": False}, WIDTHS, f"{EXPORTS} qwen3; padding adds", "qwen3"),
    "gemma": ("gemma", {"tied": True}, WIDTHS, f"{EXPORTS} gemma; padding adds", "gemma"),
    "gpt2": ("gpt2", {}, {1: {"n_inner": 24}}, "; not in vLLM: it serves GPT-2 only with equal layers", "gpt2"),
    "opt": ("opt", {}, None, "; not in llama.cpp: llama.cpp has no architecture for the family opt", None),
    "activation": ("llama", {"hidden_act": "relu"}, None, "; not in llama.cpp: llama.cpp's llama computes silu", None),
    "biases": (
        *("qwen3", {"tied": True}, {1: {"output_bias": ["mlp"]}}),
        *("has no bias in mlp.down_proj, and this model has. Prune it without '--compensate bias'", None),
    ),
    "windows": (
        *("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, None),
        *("llama.cpp's gemma3 does not compute what config.json says under layer_types", None),
    ),
    "positions": (
        *("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}}, None),
        *("; not in llama.cpp: rotary scaling 'dynamic' is none that", None),
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_line_of_targets(case, tmp_path, monkeypatch):
    """What it says of llama.cpp is what the exporter does."""
    know_tiny_tokenizer(monkeypatch)
    family, options, layers, says, arch = LINES[case]
    folder = save_stock(tmp_path / "stock", family, **options)
    if layers is not None:
        folder = save_shaped(tmp_path / "shaped", folder, layers, **({"output_bias": []} if case == "biases" else {}))
    source = open_model(folder)
    line = targets_line(source)
    assert says in line
    assert "\n" not in line
    if arch is None:
        with pytest.raises(ModelError) as refused:
            export_gguf(source, tmp_path / "model.gguf")
        assert str(refused.value).removeprefix(f"{source.name}: ").removesuffix(".") in line
    else:
        assert export_gguf(source, tmp_path / "model.gguf").arch == arch


def test_line_without_a_known_tokenizer(tmp_path):
    assert "not in llama.cpp: its way of cutting text" in targets_line(open_model(save_stock(tmp_path / "own")))
    assert "not in llama.cpp: its tokenizer merges nothing" in targets_line(open_model(save_tiny(tmp_path / "bare")))


@pytest.mark.parametrize("shape", ["mixed with biases", "first attention gone", "neurons alike"])
@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2", "opt"])
def test_line_foreseen(case, shape, tmp_path):
    """Before anything is written it says what it says of what was written."""
    family, options = CASES[case]
    dense = open_model(save_tiny(tmp_path / "dense", family, **options))
    plan = plan_of(dense, case, shape)
    foreseen = replace(as_source(plan_cut(dense, plan)), name="out")
    dicer.apply_plan(plan, tmp_path / "dense", tmp_path / "out")
    assert targets_line(foreseen) == targets_line(open_model(tmp_path / "out"))


def test_tensor_parallel(run, written, model):
    assert "Widths divide by 2: every layer can be shared out to 2 devices." in run(
        "info", model, "--tensor-parallel", 2
    )
    source = open_model(written)
    line = parallel_line(source.family, 4)
    assert "key-value heads of layers 0, 1, 2, 3; neurons of layers 1, 2. Prune with --width-multiple 4" in line


def test_line_is_printed_and_in_the_card(run, model, calib, tmp_path):
    words = ("prune", model, "-o", tmp_path / "out", "--layers", "1-2", "--calib", calib)
    asked, done = run(*words, "--dry-run"), run(*words)
    line = targets_line(open_model(tmp_path / "out")).partition("; not in llama.cpp")[0]
    assert line.startswith("Loads in transformers (trust_remote_code=True")
    assert all(line in said for said in (asked, done, (tmp_path / "out" / "README.md").read_text()))
