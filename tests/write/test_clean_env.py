"""A pruned checkpoint loads and generates where only torch, transformers and safetensors are installed."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from importlib.metadata import version

import pytest

import dicer

pytestmark = pytest.mark.clean_env

SCRIPT = """
import importlib.util, json, sys
import torch, transformers
found = [name for name in ("dicer", "scipy", "wrapt", "accelerate", "gguf") if importlib.util.find_spec(name)]
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt")
text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
print(json.dumps({"found": found, "class": type(model).__name__, "widths": widths, "text": text}))
"""


@pytest.mark.smollm2
def test_a_checkpoint_of_mixed_widths_generates_without_dicer(tmp_path):

    out = tmp_path / "pruned"
    dicer.prune("builtin:smollm2", dicer.Recipe(layers="5-28"), output=out)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "safetensors")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
    ran = subprocess.run([python, "-c", SCRIPT, out], check=True, capture_output=True, text=True, cwd=tmp_path)
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["found"] == []
    assert said["class"] == "PrunedLlamaForCausalLM"
    assert said["widths"] == [1536] * 5 + [1152] * 24 + [1536]
    assert len(said["text"]) > len("The capital of France is")
