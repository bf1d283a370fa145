"""What other loaders want of a folder, held without them: vLLM's source says so, and tests/serving run it."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny

import dicer
from dicer.decide.plan import LayerPlan
from dicer.model.source import open_model
from dicer.model.tensors import INDEX
from dicer.write.config import IN_VLLM
from dicer.write.export import modeling_pruned


@pytest.fixture(scope="module", params=["alike", "differ"])
def written(request, tmp_path_factory, model, calib):
    out = tmp_path_factory.mktemp("written") / "out"
    dicer.prune(model, dicer.Recipe(layers="all" if request.param == "alike" else "1-2", calib=calib), output=out)
    return out


def test_weights_alone_end_as_weights(written):
    index = json.loads((written / INDEX).read_text())
    assert {path.name for path in written.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["weight_map"].keys() == load_file(written / "model.safetensors").keys()


def test_plan_of_the_first_version(written, tmp_path):
    """Format 2, whose tensors ended in .safetensors; also beside those of a newer one."""
    plan = dicer.load_plan(written)
    for name, content in plan.files().items():
        (tmp_path / name).write_bytes(content)
    record = json.loads((tmp_path / "dicer_plan.json").read_text()) | {"format": 2}
    (tmp_path / "dicer_plan.json").write_text(json.dumps(record))
    tensors = load_file(tmp_path / "dicer_plan.tensors")
    save_file(tensors, tmp_path / "dicer_plan.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, tmp_path / "dicer_plan.tensors")
    assert plan.diff(dicer.load_plan(tmp_path)) == []


@pytest.mark.parametrize("name", ["PrunedLlamaModel", "PrunedLlamaForCausalLM"])
def test_constructor_without_annotations(name):
    parameters = inspect.signature(getattr(modeling_pruned, name).__init__).parameters
    assert {p.name: p.annotation for p in parameters.values()} == dict.fromkeys(("self", "config"), inspect._empty)


def test_skipped_attention_calls_the_attention_interface():
    """By name, once, in its own forward: vLLM reads the source."""
    source = inspect.getsource(modeling_pruned.SkippedAttention.forward)
    calls = [node for node in ast.walk(ast.parse(source.strip())) if isinstance(node, ast.Call)]
    looked_up = [c for c in calls if ast.unparse(c.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"]
    assert (len(looked_up), [ast.unparse(c.func) for c in calls].count("attend")) == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", ["attention", "mlp"])
def test_head_dim_where_heads_differ(family, axis, tmp_path):
    source = open_model(save_tiny(tmp_path / "dense", family))
    units = source.family.units(axis)[1]
    plan = {axis: {1: LayerPlan(units, torch.arange(units // 2), torch.zeros(units))}}
    dicer.apply_plan(_plan(source, plan), tmp_path / "dense", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    served = family in IN_VLLM and axis == "attention"  # vLLM takes the size of a head from each layer's number of them
    assert config.get("head_dim") == (8 if served or "head_dim" in source.raw_config else None)
    assert ("per_layer_config" in config) == served


def _plan(source, axes):
    model = {"name": source.name, "model_type": source.config.model_type, "fingerprint": source.fingerprint}
    return dicer.PrunePlan(model, {"method": None}, {}, {}, axes)


QUIET = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
folder, again, dicer = sys.argv[1:]
flag = {} if dicer else {"trust_remote_code": True}
if dicer:
    import dicer
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **flag)
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
model.save_pretrained(again)
transformers.AutoTokenizer.from_pretrained(folder, **flag).save_pretrained(again)
transformers.AutoModelForCausalLM.from_pretrained(again, **flag)
transformers.AutoTokenizer.from_pretrained(again, **flag)
"""


@pytest.mark.parametrize("with_dicer", ["", "dicer"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_is_asked_or_printed(family, with_dicer, tmp_path):
    """Loading, generating, saving, loading again, in a process of its own: with the flag, or with dicer and none."""
    source = open_model(save_tiny(tmp_path / "dense", family))
    heads = source.family.units("attention")[0]
    half, gone = (LayerPlan(heads, torch.arange(kept), torch.zeros(heads)) for kept in (heads // 2, 0))
    dicer.apply_plan(_plan(source, {"attention": {0: gone, 1: half}}), tmp_path / "dense", tmp_path / "out")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", QUIET, tmp_path / "out", tmp_path / "again", with_dicer]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
