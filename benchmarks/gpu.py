"""What a GPU makes of it: passes, gradients, layers streamed over the bus, transfer entropy, similarity, generation.

    python benchmarks/gpu.py [--device cuda] [--shape 7B] [--scratch FOLDER] [--output FILE.json] [--rounds 3]

A model of Qwen2's shape with random weights is made on the device; rc-a and Taylor are timed on it in turns (the paper:
4 s for rc-a at 7B on an L40, and Taylor about 50 times that with weights off-loaded to the CPU). Then it is written to
SCRATCH (in memory, /dev/shm, where there is room), streamed from there, and beside it stands what a copy of pinned
memory over the bus takes. ``benchmarks/gpu.sh`` runs this and all else that wants a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import dicer
from dicer.measure.batches import own_batches
from dicer.measure.entropy.transfer import measure
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import from_memory

SHAPES = {  # layers, hidden, neurons, heads, key-value heads, vocabulary; which layers are pruned
    "7B": (28, 3_584, 18_944, 28, 4, 152_064, "5-26"),
    "tiny": (6, 64, 256, 4, 2, 512, "1-4"),
}


def make(shape: str, device: str) -> Any:
    """The model, its weights random, in bf16."""
    layers, hidden, neurons, heads, groups, vocabulary, _ = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=neurons, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, all work of the device being done, and what came out."""
    done = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    done()
    start = time.perf_counter()
    result = work()
    done()
    return time.perf_counter() - start, result


def scoring(model: Any, rows: Path, layers: str, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of scoring by method, in turns; the first round warms up."""
    methods = {"rc-a": layers, "taylor": layers, "random": layers, "sim-a, one layer": layers.partition("-")[0]}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, chosen in methods.items():
            recipe = dicer.Recipe(method=name.partition(",")[0], layers=chosen, calib=str(rows))
            _, result = timed(lambda recipe=recipe: dicer.prune(model, recipe), device)  # type: ignore[misc]
            if number:
                seconds[name].append(result.seconds["score"])
            del result
    found: dict[str, Any] = {name: statistics.median(values) for name, values in seconds.items()}
    return found | {"taylor / rc-a": found["taylor"] / found["rc-a"], "all": seconds}


def entropy(model: Any, tokens: torch.Tensor, device: str) -> float:
    """Seconds of a profile of attention and MLPs."""
    store = ResidentStore(model, from_memory(model).family)
    return timed(lambda: measure(store, own_batches(tokens, None), lists=["attention", "mlp"]), device)[0]


def over_the_bus(device: str) -> float:
    """GB a second from pinned memory to the device."""
    pinned = device.startswith("cuda")
    held = torch.empty(2**29, dtype=torch.uint8, pin_memory=pinned)
    seconds = [timed(lambda: held.to(device, non_blocking=True, copy=True), device)[0] for _ in range(4)]
    return held.nbytes / 1e9 / statistics.median(seconds[1:])


def streamed(folder: Path, rows: Path, layers: str, device: str) -> dict[str, Any]:
    """A plan of a model that is read layer by layer, and what was said of it."""
    said: list[str] = []
    compute = dicer.Compute(device=device, stream=True)
    recipe = dicer.Recipe(method="rc-a", layers=layers, calib=str(rows))
    seconds, _ = timed(lambda: dicer.make_plan(folder, recipe, compute, tell=said.append), device)
    return {"seconds": seconds, "said": said, "GB a second over the bus": over_the_bus(device)}


def generation(dense: Path, pruned: Path, device: str) -> str:
    """The table of ``dicer bench``."""
    command = [sys.executable, "-m", "dicer", "bench", str(dense), str(pruned), "--device", device, "--tokens", "64"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7B", choices=SHAPES)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    device, layers = options.device, SHAPES[options.shape][-1]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": options.shape}
    with tempfile.TemporaryDirectory(dir=options.scratch if options.scratch.is_dir() else None) as folder:
        place = Path(folder)
        rows, generator = place / "rows.jsonl", torch.Generator().manual_seed(1)
        tokens = torch.randint(3, SHAPES[options.shape][5], (10, 128), generator=generator)
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tokens.tolist()))
        model = make(options.shape, device)

        def note(part: str, value: Any) -> None:
            found[part] = value
            print(part, json.dumps(value, indent=1), flush=True)
            if options.output:  # after each part, as the machine may be taken away
                options.output.write_text(json.dumps(found, indent=1))

        note("scoring, s", scoring(model, rows, layers, device, options.rounds))
        note("transfer entropy, s", entropy(model, tokens, device))
        model.save_pretrained(place / "dense")
        del model
        note("streamed", streamed(place / "dense", rows, layers, device))
        dicer.prune(place / "dense", dicer.Recipe(method="weight-l2", layers=layers), output=place / "pruned")
        note("generation", generation(place / "dense", place / "pruned", device))
        shutil.rmtree(place / "pruned")


if __name__ == "__main__":
    main()
