"""What one layer of a 7B model costs: 18,944 neurons of 3,584, scored, chosen and solved anew, in seconds and memory.

    python benchmarks/wide_layer.py [--device cuda] [--samples 32] [--recipes "rc-a;rc-a solved;obs solved"]

One random Qwen2 layer of that shape, so that quality says nothing; time and memory do. Seconds of the processor are of
all its cores together, and say more where other programs run.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dicer

SOLVED = {"repair": "least-squares"}
RECIPES: dict[str, dict[str, Any]] = {
    "rc-a": {"method": "rc-a"},
    "rc-a solved": {"method": "rc-a", **SOLVED, "ridge": 1e-2},
    "rc-a rolls solved": {"method": "rc-a", "rolls": 64, **SOLVED, "ridge": 1e-2},
    "obs solved": {"criterion": "obs", **SOLVED, "ridge": 1e-2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=18_944)
    parser.add_argument("--recipes", default=";".join(RECIPES))
    options = parser.parse_args()
    config = AutoConfig.for_model(
        "qwen2", hidden_size=3584, intermediate_size=options.neurons, num_hidden_layers=1, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(options.device).eval()
    print(f"{options.device}, {options.neurons} neurons, {options.samples} x 512 tokens")
    for name in options.recipes.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            ids = torch.randint(3, 1024, (options.samples, 512), generator=torch.Generator().manual_seed(1)).tolist()
            rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start, processor = time.perf_counter(), time.process_time()
            result = dicer.prune(model, dicer.Recipe(calib=str(rows), ratio=0.25, **RECIPES[name]))
            seconds, processor = time.perf_counter() - start, time.process_time() - processor
        if options.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        stages = {stage: round(value, 1) for stage, value in result.seconds.items()}
        print(
            f"{name}: {seconds:.1f} s, {processor:.1f} of the processor, {stages}, peak {peak:.1f} GiB so far",
            flush=True,
        )
        del result


if __name__ == "__main__":
    main()
