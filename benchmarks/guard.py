"""What it costs to hold a loaded model against its files and to open what is written, as a part of ``dicer prune``.

One model of Qwen2.5-1.5B's shape with random weights, bfloat16. Rounds with and without the checks take turns. Prints
``guard / prune: X`` (of medians) and ``guard and opening / prune: X`` on lines of their own.

    python benchmarks/guard.py [--layers 28] [--rounds 5] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import dicer
from dicer import pipeline
from dicer.model import source
from dicer.model.find import find_model
from dicer.write import checkpoint
from dicer.write.side_files import copy_side_files

# Each where it is called: of what was loaded, of what would be written, of what was.
CHECKS: tuple[tuple[ModuleType, str], ...] = (
    (source, "check_same"),
    (pipeline, "check_cut"),
    (checkpoint, "check_written"),
)

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def make(folder: Path, layers: int) -> None:
    config = AutoConfig.for_model("qwen2", **SHAPE, num_hidden_layers=layers, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    copy_side_files(find_model("builtin:smollm2")[1], folder)  # a tokenizer to open, of 49,152 tokens
    rows = "".join(f'{{"input_ids": {torch.randint(0, 150_000, (128,)).tolist()}}}\n' for _ in range(10))
    (folder / "rows.jsonl").write_text(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the model is made; 7 GB, a temporary one else")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        model, out = Path(name) / "model", Path(name) / "out"
        make(model, options.layers)
        recipe = dicer.Recipe(calib=str(model / "rows.jsonl"))
        whole: dict[bool, list[float]] = {True: [], False: []}
        alone: dict[str, list[float]] = {name: [] for _, name in CHECKS}
        for number in range(options.rounds + 1):
            for guard in (True, False):
                with ExitStack() as stack:
                    for module, check in CHECKS:
                        put = _timed(getattr(module, check), alone[check]) if guard else _passed_over
                        stack.enter_context(patch.object(module, check, put))
                    start = time.perf_counter()
                    dicer.prune(model, recipe, output=out)
                    if number:  # the first round warms up
                        whole[guard].append(time.perf_counter() - start)
                shutil.rmtree(out)
    with_it, without = (statistics.median(whole[guard]) for guard in (True, False))
    parts = {name: statistics.median(times[1:]) for name, times in alone.items()}
    print(f"qwen2, {options.layers} layers of 1.5B's shape, bfloat16, 10 x 128 tokens, {options.rounds} rounds")
    print(f"   with: median {with_it:.2f} s, {min(whole[True]):.2f} to {max(whole[True]):.2f}")
    print(f"without: median {without:.2f} s, {min(whole[False]):.2f} to {max(whole[False]):.2f}")
    for name, part in parts.items():
        least, most = min(alone[name][1:]), max(alone[name][1:])
        print(f"{name} alone: median {part:.3f} s, {least:.3f} to {most:.3f} ({part / without:.2%} of prune)")
    print(f"guard / prune: {parts['check_same'] / without:.4f}")
    print(f"guard and opening / prune: {sum(parts.values()) / without:.4f}")


def _timed(check: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = check(*arguments)
        times.append(time.perf_counter() - start)
        return found

    return run


def _passed_over(*given: Any) -> Any:
    return given[-1]  # where it came from stands for what was written


if __name__ == "__main__":
    main()
