"""What seven methods cost together, against one shared calibration pass, the taylor pass and seven cuts.

The left side is what an experiment does (`decide.together.score_all`, then each pruned model is built and dropped); the
right side is the sum of its parts, each timed alone in the same round. One process, rounds interleaved, medians. Prints
``seven methods / parts: X`` on a line of its own.

    python benchmarks/sharing.py [--model builtin:smollm2] [--layers 5-28] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from transformers.utils import logging

from dicer.ask.spelling import make_wanted
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.decide.together import score_all
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import open_model
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

METHODS = ("taylor", "random", "rc-a", "act-mean", "act-l2", "weight-l2", "sim-a")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--layers", default="5-28")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    logging.disable_progress_bar()
    source = open_model(options.model)
    store, tokenizer = ResidentStore(source.load_model(), source.family), source.tokenizer()
    methods = options.methods.split(",")
    wanted = [make_wanted({"method": method, "layers": options.layers}) for method in methods]
    tasks = {method: with_text(prepare(source, *asked)) for method, asked in zip(methods, wanted, strict=True)}
    plans = score(list(tasks.values()), store)

    def together() -> None:
        for found in score_all(source, store, wanted, tokenizer):
            if isinstance(found, Exception):
                raise found
            build_model(plan_cut(source, found.plan))

    # One pass that collects what all methods without gradients need; its decisions (clustering ...) are part of it.
    shared = [task for method, task in tasks.items() if method != "taylor"]
    parts: dict[str, Callable[[], object]] = {
        "calibration pass": lambda: score(shared, store),
        "taylor pass": lambda: score([tasks["taylor"]], store),
        "cuts": lambda: [build_model(plan_cut(source, plan)) for plan in plans],
    }
    whole: list[float] = []
    apart: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(options.rounds + 1):
        took = seconds(together)
        each = {name: seconds(work) for name, work in parts.items()}
        if number > 0:  # the first round warms up
            whole.append(took)
            for name, value in each.items():
                apart[name].append(value)
    print(f"{options.model}, layers {options.layers}, {len(methods)} methods: {', '.join(methods)}")
    for name, values in {"together": whole, **apart}.items():
        print(f"{name:>16}: median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f}")
    total = sum(statistics.median(values) for values in apart.values())
    print(f"seven methods / parts: {statistics.median(whole) / total:.3f}")


if __name__ == "__main__":
    main()
