"""What an independent transfer-entropy profile costs, against forward passes of the stock model on the same batches.

One process, rounds interleaved, medians. Prints ``profile / forward: X`` and ``closed form: Y`` (layer forwards over
layers) on lines of their own. The forward pass has no logits, and a bypassed sub-layer is not run: X may lie below Y.

    python benchmarks/entropy.py [--model builtin:smollm2] [--samples 4] [--seq-len 128] [--dtype float32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers.utils import logging

from dicer.ask.text import Text
from dicer.machine import pick_device
from dicer.measure.batches import own_batches
from dicer.measure.entropy.profile import LISTS
from dicer.measure.entropy.transfer import layer_forwards, measure
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import load_calibration
from dicer.model.source import open_model, tokenize_with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lists", default=",".join(LISTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    source, device = open_model(options.model), pick_device(options.device)
    model, lists = source.load_model(options.dtype, device), options.lists.split(",")
    text = Text(samples=options.samples, seq_len=options.seq_len)
    tokens = load_calibration(text, tokenize_with(source.tokenizer())).tokens
    batches = own_batches(tokens, options.batch_size)
    store = ResidentStore(model, source.family)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model.base_model(input_ids=batch.to(device), use_cache=False)

    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        "profile": lambda: measure(store, batches, lists=lists),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            count = 1 if name == "profile" else 5  # a forward pass is short
            start = time.perf_counter()
            for _ in range(count):
                run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number > 0:  # the first round warms up
                times[name].append((time.perf_counter() - start) / count)
    print(f"{options.model}, {options.samples} x {options.seq_len} tokens, {model.dtype}, {device}, {options.lists}")
    for name, seconds in times.items():
        print(f"{name:>8}: median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}")
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"profile / forward: {median['profile'] / median['forward']:.1f}")
    print(f"closed form: {layer_forwards(store.depth, lists) / store.depth:.1f}")


if __name__ == "__main__":
    main()
