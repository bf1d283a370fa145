"""Prune and measure one method, with the flags and method names of the paper's code (llm-random-prune).

    python scripts/run_experiment.py --model Qwen/Qwen2.5-7B-Instruct --method random-merge --apply-mode prune \
        --ratio 0.25 --layers 5-26 --dataset bookcorpus --eval-tasks wikitext,mmlu,hellaswag

``accelerate launch`` in front, instead of ``python``, spreads calibration and evaluation over processes. The result is
a JSON record in ``results/<model_name>/<method>/logs/``; a run that is there already is not done again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dicer.ask.methods import PRESETS
from dicer.cli.terminal import quiet_transformers
from dicer.errors import DicerError, RecipeError, unknown
from dicer.processes import join, rank, several

# --method -> --apply-mode -> dicer's preset; "" where the mode is not asked for.
SEED_METHODS: dict[str, dict[str, str]] = {
    "random-prune": {"": "random"},
    "gradient-magnitude": {"": "taylor"},
    "squared-magnitude": {"": "act-l2"},
    "weight-l2": {"": "weight-l2"},
    "random-merge": {"prune": "rc-a"},
    "activation-merge": {"prune": "sim-a", "mean": "sim-mean", "dominant": "sim-dominant"},
    "post-activation-merge": {"prune": "sim-a-post"},
}


def preset_of(method: str, mode: str | None) -> str:
    """The preset that a method's name and --apply-mode mean.

    Raises:
        RecipeError: no such method, or a mode that it does not have.
    """
    modes = SEED_METHODS.get(method, {"": method})
    if method not in SEED_METHODS and method not in PRESETS:
        raise RecipeError(unknown("method", method, {*SEED_METHODS, *PRESETS}))
    if "" in modes:
        if mode not in (None, "prune"):
            raise RecipeError(f"--apply-mode {mode} means nothing for '{method}'; leave it out.")
        return modes[""]
    if mode not in modes:
        had = f"got '{mode}'" if mode else "and it is missing"
        raise RecipeError(f"'{method}' needs --apply-mode {' or '.join(modes)}, {had}.")
    return modes[mode]


def parse(words: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, .gguf file or builtin:smollm2")
    add("--method", required=True, help=", ".join([*SEED_METHODS, *(p for p in PRESETS if p not in SEED_METHODS)]))
    add("--ratio", type=float, default=0.25, help="fraction of the neurons that goes (default: 0.25)")
    add("--layers", default="all", help="as in 5,6,7 or 5-26, or all (default)")
    add("--eval-tasks", default="", help="tasks of lm-evaluation-harness, with commas")
    add("--apply-mode", default=None, help="prune, mean or dominant: for the methods that group neurons")
    add("--dataset", default="bookcorpus", help="bookcorpus (default), c4, wikitext2, builtin, a .txt or .jsonl file")
    add("--num-calib-samples", type=int, default=10, help="default: 10")
    add("--calib-seq-len", type=int, default=128, help="tokens in a sample (default: 128)")
    add("--seed", type=int, default=42, help="default: 42")
    add("--include-path", default=None, help="folder with task files of your own")
    add("--task-prefix", default="", help="what your own tasks' names begin with, as in local_")
    add("--limit", type=int, default=None, help="documents a task (default: all)")
    add("--batch-size", type=int, default=8, help="requests in a forward pass of the evaluation (default: 8)")
    add("--perplexity", default=None, help="also token perplexity on this text: builtin, or a .txt or .jsonl file")
    add("--original", action="store_true", help="also measure the model as it is")
    add("--device", default="auto", help="auto (default), cpu, cuda ...")
    add("--output-dir", default="results", help="default: results")
    return parser.parse_args(words)


def values_of(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags as an experiment of one run."""
    evaluation = {
        "tasks": tuple(name for name in flags.eval_tasks.split(",") if name),
        "include_path": flags.include_path,
        "task_prefix": flags.task_prefix,
        "limit": flags.limit,
        "batch_size": flags.batch_size,
        "perplexity": flags.perplexity,
    }
    return {
        "models": [flags.model],
        "methods": [preset_of(flags.method, flags.apply_mode)],
        "ratios": [flags.ratio],
        "seeds": [flags.seed],
        "calib": [flags.dataset],
        "samples": [flags.num_calib_samples],
        "original": flags.original,
        "recipe": {"layers": flags.layers, "seq_len": flags.calib_seq_len, "device": flags.device},
        "evaluation": evaluation,
    }


def main() -> int:
    """One line and exit code 2 for what the user can mend; 1 where the run failed."""
    flags = parse(sys.argv[1:])
    try:
        values = values_of(flags)
        from dicer.evaluate.quality import evaluate, load_all_tasks
        from dicer.study.bench import Event
        from dicer.study.grid import make_experiment
        from dicer.study.run import run_experiment

        if several():
            join(cpu=flags.device == "cpu")
        quiet_transformers()
        experiment = make_experiment(values)

        def watch(event: Event) -> None:
            if event.task is not None and event.kind in ("done", "failed", "skipped") and rank() == 0:
                print(f"{event.kind}: {event.task.path}{': ' * bool(event.text)}{event.text}", flush=True)

        counts = run_experiment(
            experiment, Path(flags.output_dir), evaluate=evaluate, check=load_all_tasks, watch=watch
        )
    except DicerError as error:
        if rank() == 0:
            print(f"run_experiment: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
