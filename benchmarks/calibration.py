"""What scoring costs, against a bare forward pass through the same layers on the same tokens; and what repair adds.

One process, rounds interleaved, medians; on CPU in seconds of the processor, which other programs disturb less. Prints
``rc-a / forward: X``, ``taylor / rc-a: Y`` and ``(rc-a rolls solved - rc-a) / rc-a: Z`` on lines of their own.

    python benchmarks/calibration.py [--model builtin:smollm2] [--device cpu] [--dtype float32] [--layers 5-28]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

import dicer
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.machine import pick_device
from dicer.measure.batches import own_batches
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import open_model

RECIPES: dict[str, dict[str, Any]] = {
    "rc-a": {"method": "rc-a"},
    "act-l2": {"method": "act-l2"},
    "taylor": {"method": "taylor"},
    "rc-a propagated": {"method": "rc-a", "propagate": "pruned"},
    "rc-a rolls": {"method": "rc-a", "rolls": 64},
    "rc-a solved": {"method": "rc-a", "repair": "least-squares"},
    "rc-a rolls solved": {"method": "rc-a", "repair": "least-squares", "rolls": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--layers", default="5-28")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes beside forward")
    options = parser.parse_args()
    logging.disable_progress_bar()

    source = open_model(options.model)
    asked = {"layers": options.layers, "samples": options.samples, "seq_len": options.seq_len}
    recipes = {name: dicer.Recipe(**RECIPES[name], **asked) for name in options.only.split(",")}
    tasks = {name: with_text(prepare(source, recipe)) for name, recipe in recipes.items()}
    device = pick_device(options.device)
    model = source.load_model(options.dtype, device)
    store = ResidentStore(model, source.family)
    any_task = next(iter(tasks.values()))
    calibration = any_task.calibration
    assert calibration is not None
    batches = own_batches(calibration.tokens)
    base, last = model.base_model, max(any_task.layers)
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
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number > 0:  # the first round warms up
                times[name].append(clock() - start)

    print(f"{options.model}, layers {options.layers}, {options.samples} x {options.seq_len} tokens, {device}")
    for name, seconds in times.items():
        print(f"{name:>20}: median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}")
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    for above, below in (("rc-a", "forward"), ("taylor", "rc-a")):
        if {above, below} <= median.keys():
            print(f"{above} / {below}: {median[above] / median[below]:.3f}")
    for name in {"rc-a solved", "rc-a rolls solved"} & median.keys() if "rc-a" in median else ():
        print(f"({name} - rc-a) / rc-a: {median[name] / median['rc-a'] - 1:.3f}")


if __name__ == "__main__":
    main()
