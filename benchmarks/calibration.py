"""What scoring costs, against a bare forward pass through the same layers on the same tokens.

One process, rounds interleaved, medians. Prints ``rc-a / forward: X`` and ``taylor / rc-a: Y`` on lines of their own.

    python benchmarks/calibration.py [--model builtin:smollm2] [--device cpu] [--dtype float32] [--layers 5-28]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers.utils import logging

import dicer
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.machine import pick_device
from dicer.measure.batches import own_batches
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--layers", default="5-28")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.disable_progress_bar()

    source = open_model(options.model)
    asked = {"layers": options.layers, "samples": options.samples, "seq_len": options.seq_len}
    recipes = {name: dicer.Recipe(method=name, **asked) for name in ("rc-a", "act-l2", "taylor")}
    tasks = {name: with_text(prepare(source, recipe)) for name, recipe in recipes.items()}
    device = pick_device(options.device)
    model = source.load_model(options.dtype, device)
    store = ResidentStore(model, source.family)
    calibration = tasks["rc-a"].calibration
    assert calibration is not None
    batches = own_batches(calibration.tokens)
    base, last = model.base_model, max(tasks["rc-a"].layers)
    layers = base.get_submodule(source.family.layers.split(".", 1)[1])

    def forward() -> None:
        every = list(layers)
        del layers[last + 1 :]  # the same layers as rc-a: none behind the last chosen one, and no logits
        count, base.config.num_hidden_layers = base.config.num_hidden_layers, last + 1
        try:
            with torch.no_grad():
                for batch in batches:
                    base(input_ids=batch.to(device), use_cache=False)
        finally:
            base.config.num_hidden_layers = count
            layers.extend(every[last + 1 :])

    runs: dict[str, Callable[[], object]] = {"forward": forward}
    for name, task in tasks.items():
        runs[name] = lambda task=task: score([task], store)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)

    print(f"{options.model}, layers {options.layers}, {options.samples} x {options.seq_len} tokens, {device}")
    for name, seconds in times.items():
        print(f"{name:>8}: median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}")
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"rc-a / forward: {median['rc-a'] / median['forward']:.3f}")
    print(f"taylor / rc-a: {median['taylor'] / median['rc-a']:.2f}")


if __name__ == "__main__":
    main()
