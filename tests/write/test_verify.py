"""dicer verify: what was written against the masked original, its cache, and what shall serve it."""

from __future__ import annotations

import json
import shutil

import pytest
from by_hand import CASES, assert_near, logits_of, masked, plan_of
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import dicer
from dicer.model.families import FAMILIES
from dicer.model.source import open_model
from dicer.write.targets import parallel_line, targets_line
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
    config["per_layer_config"]["001"]["intermediate_size"] = 7
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
    assert "is not that of this version of dicer, so it is not run" in err


def test_target_that_is_not_there(refused, written, tmp_path):
    refused("verify", written, "--with", "vllm", says=["--vllm-python", "pip install vllm"])
    refused("verify", written, "--with", "vllm", "--vllm-python", tmp_path / "no", says=["is no file"])
    refused("verify", written, "--with", "ggml", says=["unknown target 'ggml'", "gguf"])


def test_target_that_cannot_load_it(refused, tmp_path):
    dense = save_tiny(tmp_path / "dense", "gpt2")
    dicer.apply_plan(plan_of(open_model(dense), "gpt2", "neurons differ"), dense, tmp_path / "out")
    python = tmp_path / "python"
    python.write_text("")
    says = ["is no checkpoint for vLLM: it serves GPT-2 only with equal layers", "dicer export --to stock"]
    refused("verify", tmp_path / "out", "--with", "vllm", "--vllm-python", python, says=says)


@pytest.mark.parametrize(
    ("family", "code", "says"),
    [
        ("llama", False, "Loads in transformers (no flag), vLLM, llama.cpp (after 'dicer export --to gguf'), torchao"),
        ("llama", True, "vLLM (--trust-remote-code)"),
        ("gpt2", True, "; not in vLLM: it serves GPT-2 only with equal layers"),
        ("gpt2", False, "vLLM, llama.cpp"),
        ("opt", True, "; not in llama.cpp: it has no OPT."),
    ],
)
def test_line_of_targets(family, code, says):
    assert says in targets_line(FAMILIES[family], {"auto_map": {}} if code else {})


def test_tensor_parallel(run, written, model):
    assert "Widths divide by 2: every layer can be shared out to 2 devices." in run(
        "info", model, "--tensor-parallel", 2
    )
    source = open_model(written)
    line = parallel_line(source.family, source.config, 4)
    assert "key-value heads of layers 0, 1, 2, 3; neurons of layers 1, 2. Prune with --width-multiple 4" in line


def test_line_is_printed_and_in_the_card(run, model, calib, tmp_path):
    words = ("prune", model, "-o", tmp_path / "out", "--layers", "1-2", "--calib", calib)
    asked, done = run(*words, "--dry-run"), run(*words)
    line = targets_line(FAMILIES["llama"], {"auto_map": {}})
    assert all(line in said for said in (asked, done, (tmp_path / "out" / "README.md").read_text()))
