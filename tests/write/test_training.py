"""Training after pruning: every parameter has a gradient, also on two processes and with gradient checkpointing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from by_hand import logits_of, masked, plan_of
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny, tiny_tokens
from transformers import AutoModelForCausalLM

import dicer
from dicer.model.source import open_model

GONE = ("sub-layers gone with biases", "a shell", "first attention gone")

SCRIPT = """
import os, sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
folder, report = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(10, 60)
arguments = transformers.TrainingArguments(
    report + ".out", max_steps=3, per_device_train_batch_size=1, learning_rate=1e-3, report_to=[], use_cpu=True,
    save_strategy="no", gradient_checkpointing=True, ddp_backend="gloo", logging_steps=1, disable_tqdm=True,
)
trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
trainer.train()
if arguments.process_index == 0:
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    open(report, "w").write(f"{arguments.world_size} {losses}")
"""


def _cut(folder, family, shape):
    """A folder with a model of a shape of the contract, beside the dense one."""
    dense = save_tiny(folder / "dense", family)
    plan = plan_of(open_model(dense), family, shape)
    dicer.apply_plan(plan, dense, folder / "out")
    return folder / "out", plan


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", GONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient(family, shape, checkpointing, tmp_path):
    out, _ = _cut(tmp_path, family, shape)
    model = AutoModelForCausalLM.from_pretrained(out).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = tiny_tokens(2)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_of_the_first_version_with_the_norms(family, tmp_path):
    """They were written, and are passed over without a word."""
    out, plan = _cut(tmp_path, family, "sub-layers gone with biases")
    dense, new = load_file(tmp_path / "dense" / "model.safetensors"), load_file(out / "model.safetensors")
    norms = {n: t for n, t in dense.items() if n not in new and ("norm" in n or ".ln_" in n) and "_attn." not in n}
    assert norms, "a norm in front of what is gone is left out"
    save_file({**new, **norms}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors.index.json").unlink()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    expected = logits_of(masked(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), family, plan))
    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    again = dicer.prune(out, dicer.Recipe(method="weight-l2", ratio=0.5), output=tmp_path / "again")
    assert again.before.parameters == sum(tensor.numel() for tensor in new.values())
    assert not norms.keys() & load_file(tmp_path / "again" / "model.safetensors").keys()


def test_opt_with_norms_in_the_residual_stream_keeps_them(tmp_path):
    """OPT-350m's norms lie behind the sum, so they are in use."""
    dense = save_tiny(tmp_path / "dense", "opt", do_layer_norm_before=False)
    plan = plan_of(open_model(dense), "opt-post-norm", "a shell")
    dicer.apply_plan(plan, dense, tmp_path / "out")
    assert "model.decoder.layers.1.final_layer_norm.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_two_processes(tmp_path):
    """Gemma's norms behind a sub-layer stay where a bias is left, and go where none is."""
    out, _ = _cut(tmp_path, "gemma3_text", "sub-layers gone with biases")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*torchrun, str(script), str(out), str(tmp_path / "report")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    world, losses = (tmp_path / "report").read_text().split(" ", 1)
    losses = json.loads(losses)
    assert (world, len(losses)) == ("2", 3)
    assert losses[0] > losses[1] > losses[2]
