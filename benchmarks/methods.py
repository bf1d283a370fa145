"""Perplexity of SmolLM2 after every preset, each on the same text: the paper's Table 1 and 2 at a size that runs here.

    python benchmarks/methods.py [--ratio 0.25] [--windows 8] [--methods rc-a,taylor] [--seeds 42,0,1,7]

Calibration is 10 x 128 tokens of wikitext2/valid.txt, perplexity is on wikitext2/test.txt in windows of 1,024, both
under $DICER_DATA. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from transformers.utils import logging

import dicer
from dicer.ask.methods import PRESETS
from dicer.measure.text import load_windows
from dicer.model.source import open_model, tokenize_with

DRAWN = ("random", "rc-a")  # the methods whose result depends on the seed beyond the choice of samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--layers", default="5-28")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--methods", default=",".join(PRESETS))
    parser.add_argument("--seeds", default="42,0,1,7")
    options = parser.parse_args()
    logging.disable_progress_bar()
    data = Path(os.environ.get("DICER_DATA", Path(__file__).parents[2] / "shared" / "data"))

    source = open_model(options.model)
    model, tokenizer = source.load_model(), source.tokenizer()
    tokenize = tokenize_with(tokenizer)
    assert tokenize is not None
    windows = load_windows(str(data / "wikitext2" / "test.txt"), tokenize, 1024, options.windows)
    print(f"{options.model}, layers {options.layers}, {options.ratio:.0%} of their neurons, {windows.numel()} tokens\n")
    print("| method | perplexity | by seed | plan, s |\n| --- | --- | --- | --- |")
    print(f"| dense | {dicer.perplexity(model, windows):.2f} | | |", flush=True)
    for method in options.methods.split(","):
        seeds = [int(seed) for seed in options.seeds.split(",")]
        found, seconds = [], []
        for seed in seeds if method in DRAWN else seeds[:1]:
            recipe = dicer.Recipe(
                method=method,
                ratio=options.ratio,
                layers=options.layers,
                seed=seed,
                calib=str(data / "wikitext2" / "valid.txt"),
            )
            start = time.perf_counter()
            result = dicer.prune(model, recipe, tokenizer=tokenizer)
            seconds.append(time.perf_counter() - start)
            found.append(dicer.perplexity(result.model, windows))
        each = ", ".join(f"{value:.1f}" for value in found)
        print(f"| {method} | {statistics.mean(found):.2f} | {each} | {statistics.median(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
