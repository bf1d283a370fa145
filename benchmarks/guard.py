"""What it costs to hold a loaded model against its files, as a part of the whole of ``dicer prune``.

One model of Qwen2.5-1.5B's shape with random weights, bfloat16. Rounds with and without the comparison take turns.
Prints ``guard / prune: X`` (of medians) on a line of its own.

    python benchmarks/guard.py [--layers 28] [--rounds 5] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import dicer
from dicer.model import source
from dicer.model.same import check_same

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
        alone: list[float] = []

        def guarded(*arguments: Any) -> None:
            start = time.perf_counter()
            check_same(*arguments)
            alone.append(time.perf_counter() - start)

        for number in range(options.rounds + 1):
            for guard in (True, False):
                with patch.object(source, "check_same", guarded if guard else lambda *_: None):
                    start = time.perf_counter()
                    dicer.prune(model, recipe, output=out)
                if number:  # the first round warms up
                    whole[guard].append(time.perf_counter() - start)
                shutil.rmtree(out)
    with_it, without = (statistics.median(whole[guard]) for guard in (True, False))
    part = statistics.median(alone[1:])
    print(f"qwen2, {options.layers} layers of 1.5B's shape, bfloat16, 10 x 128 tokens, {options.rounds} rounds")
    print(f"   with: median {with_it:.2f} s, {min(whole[True]):.2f} to {max(whole[True]):.2f}")
    print(f"without: median {without:.2f} s, {min(whole[False]):.2f} to {max(whole[False]):.2f}")
    print(f"the comparison alone: median {part:.3f} s")
    print(f"guard / prune: {part / without:.4f}")


if __name__ == "__main__":
    main()
