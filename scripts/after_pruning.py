"""Runs every recipe of docs/after-pruning.md on a checkpoint whose layers differ: ``python scripts/after_pruning.py``.

Each needs its own packages; what is not installed is said and passed over. ``--only NAME`` runs one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

PROMPT = "The capital of France is"
FLAG = {"trust_remote_code": True}
TRAIN = """
import sys, torch, transformers
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 4)["input_ids"]
arguments = transformers.TrainingArguments(
    out, max_steps=3, per_device_train_batch_size=1, learning_rate=1e-4, report_to=[], use_cpu=True, save_strategy="no",
    gradient_checkpointing=True, ddp_backend="gloo", logging_steps=1,
)
trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
trainer.train()
losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
assert losses[-1] < losses[0], losses
print(f"{arguments.world_size} processes, losses {losses}")
"""


def _load(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **FLAG, **options)
    return model, transformers.AutoTokenizer.from_pretrained(folder, **FLAG)


def _text(model: Any, tokenizer: Any) -> str:
    made = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    return repr(tokenizer.decode(made[0]))


def pipeline(folder: Path, _: Path) -> str:
    """The pipeline of transformers."""
    made = transformers.pipeline("text-generation", str(folder), **FLAG)(PROMPT, max_new_tokens=8, do_sample=False)
    return repr(made[0]["generated_text"])


def lora(folder: Path, scratch: Path) -> str:
    """A LoRA adapter: three steps, saved, and merged into a folder that loads."""
    import peft

    model, tokenizer = _load(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    batch, losses = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt"), []
    for _ in range(3):
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
    adapted.save_pretrained(scratch / "adapter")
    adapted.merge_and_unload().save_pretrained(scratch / "merged")
    tokenizer.save_pretrained(scratch / "merged")
    return f"losses {[round(loss, 3) for loss in losses]}, merged: {_text(*_load(scratch / 'merged'))}"


def trainer(folder: Path, scratch: Path) -> str:
    """Trainer with gradient checkpointing on two processes."""
    (scratch / "train.py").write_text(TRAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*torchrun, scratch / "train.py", folder, scratch / "trained"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(line for line in done.stdout.splitlines() if "losses" in line)


def torchao(folder: Path, scratch: Path) -> str:
    """torchao, int8 weights: quantized while loading, saved, loaded again."""
    from torchao.quantization import Int8WeightOnlyConfig

    model, tokenizer = _load(folder, quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))
    kind = type(model.model.layers[1].mlp.down_proj.weight).__name__
    model.save_pretrained(scratch / "int8")
    tokenizer.save_pretrained(scratch / "int8")
    bytes_ = sum(file.stat().st_size for file in (scratch / "int8").glob("*.safetensors"))
    return f"{kind}, {bytes_:,} bytes, again: {_text(*_load(scratch / 'int8'))}"


def bitsandbytes(folder: Path, _: Path) -> str:
    """bitsandbytes, 8 and 4 bits."""
    said = []
    for option in ("load_in_8bit", "load_in_4bit"):
        model, tokenizer = _load(folder, quantization_config=transformers.BitsAndBytesConfig(**{option: True}))
        said.append(f"{type(model.model.layers[1].mlp.down_proj).__name__} {_text(model, tokenizer)}")
    return ", ".join(said)


def lm_eval(folder: Path, _: Path) -> str:
    """lm-evaluation-harness by its own model class, on one request."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=1)
    asked = Instance("loglikelihood", {}, (PROMPT, " Paris"), 0)
    return f"log-likelihood of ' Paris' and whether it is the greedy answer: {model.loglikelihood([asked])[0]}"


def lm_eval_task(folder: Path, scratch: Path) -> str:
    """A whole task by its own command; LM_EVAL_TASKS names a folder with local_openbookqa.yaml (docs/evaluation.md)."""
    if not (tasks := os.environ.get("LM_EVAL_TASKS")):
        return "not run, LM_EVAL_TASKS names no folder of task files"
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--include_path", tasks]
    command += ["--tasks", "local_openbookqa", "--device", "cpu", "--batch_size", "16", "--output_path", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return ", ".join(line for line in done.stdout.splitlines() if "acc" in line)


def push(folder: Path, _: Path) -> str:
    """What would go to the hub."""
    command = [sys.executable, "-m", "dicer", "push", folder, "owner/name", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return next(line for line in done.stdout.splitlines() if "nothing was sent" in line)


def gguf(folder: Path, scratch: Path) -> str:
    """A q8_0 file by dicer export."""
    out = scratch / "model.gguf"
    command = [sys.executable, "-m", "dicer", "export", folder, "--to", "gguf", "--type", "q8_0", "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return f"{out.stat().st_size:,} bytes"


# name -> what runs it, the packages that it needs
RECIPES: dict[str, tuple[Callable[[Path, Path], str], tuple[str, ...]]] = {
    "pipeline": (pipeline, ()),
    "lora": (lora, ("peft",)),
    "trainer": (trainer, ("accelerate",)),
    "torchao": (torchao, ("torchao",)),
    "bitsandbytes": (bitsandbytes, ("bitsandbytes",)),
    "lm_eval": (lm_eval, ("lm_eval",)),
    "lm_eval_task": (lm_eval_task, ("lm_eval",)),
    "push": (push, ()),
    "gguf": (gguf, ("dicer.write.export.llama_cpp",)),
}


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    """Prune SmolLM2 unevenly, one attention gone, and run the recipes on it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--checkpoint", type=Path, help="a folder instead")
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    folder = asked.checkpoint
    if folder is None:
        (scratch / "ratios.json").write_text('{"mlp": {"10": 1.0, "12": 0.5}, "attention": {"8": 0.34, "9": 1.0}}')
        folder = scratch / "pruned"
        words = ["--axis", "all", "--method", "weight-l2", "--allocate", scratch / "ratios.json"]
        command = [sys.executable, "-m", "dicer", "prune", "builtin:smollm2", "-o", folder, *words]
        subprocess.run(command, check=True, capture_output=True)
    try:
        for name, (run, needs) in RECIPES.items():
            if asked.only in (None, name):
                missing = [package for package in needs if not _there(package)]
                own = scratch / name
                own.mkdir()
                print(f"{name}: " + (f"not run, no {', '.join(missing)}" if missing else run(folder, own)), flush=True)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
