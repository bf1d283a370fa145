"""Records of runs that never were, for the tests of reports and of what reads records."""

from __future__ import annotations

import numpy as np

from dicer.study.record import make_record, pack
from dicer.study.records import record_path, write_record

QWEN = "Qwen2.5-7B-Instruct"
METHODS = ("taylor", "random", "rc-a", "act-mean", "act-l2", "weight-l2", "sim-a", "sim-mean", "sim-dominant")
TASKS = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "openbookqa", "winogrande")
LAYERS, UNITS = (5, 6, 7, 8), 64


def values(method, ratio=None, seed=42, *, model=QWEN, text="bookcorpus", average=0.5, perplexity=20.0, **more):
    """What a record says, as JSON; of the model as it is without a ratio."""
    rng = np.random.default_rng([len(method), int(100 * (ratio or 0)), seed])
    recipe = {"dtype": "auto"}
    layers = {}
    if ratio is not None:
        recipe |= {"ratio": ratio, "seed": seed, "layers": "5-26", "calib": text, "samples": 10, "seq_len": 128}
        for index in LAYERS:
            keep = np.sort(rng.permutation(UNITS)[: int(UNITS * (1 - ratio))])
            norm = {"kept": 10.0 + index + rng.random(), "dropped": 5.0 + index + rng.random()}
            layers[str(index)] = {"units": UNITS, "keep": pack(keep, UNITS), "norm": norm, "score": norm}
    summary = {"word_perplexity": perplexity, **dict.fromkeys((*TASKS, "average"), average)}
    return {
        "format": 1,
        "id": f"{method}-{ratio}-{seed}-{text}-{model}",
        "status": "done",
        "error": None,
        "method": method,
        "text": text if ratio is not None else "",
        "model": {"name": f"Qwen/{model}" if model == QWEN else model, "model_type": "qwen2", "fingerprint": model},
        "recipe": recipe,
        "evaluation": {"protocol": "randomness", "task_prefix": "", "batch_size": 8},
        "metrics": {"perplexity": None, "tasks": {}, "groups": {}, "summary": summary, "versions": {}},
        "seconds": {"load": 1.0, "score": 2.0 + len(method), "build": 0.5, "evaluate": 30.0},
        "memory": {"score": {"host": 3_000_000_000}, "evaluate": {"host": 2_000_000_000}},
        "layers": layers,
        "versions": {"dicer": "0.1.0", "python": "3.11"},
        "environment": {"system": "Linux", "accelerators": []},
        "git": "0" * 40,
        "computed_on": "cpu float32",
        **more,
    }


def record(method, ratio=None, seed=42, *, also=None, **more):
    """The record; ``also`` is merged into its parts: ``{"recipe": {"samples": 3}}``."""
    said = values(method, ratio, seed, **more)
    for part, inner in (also or {}).items():
        said[part] = {**said[part], **inner} if isinstance(said.get(part), dict) else inner
    return make_record(said)


def scored(method, share, n, ratio=0.25, **more):
    """A record whose six tasks have the same share of n documents right, with the harness's standard error."""
    error = (share * (1 - share) / (n - 1)) ** 0.5
    tasks = {name: {"metrics": {"acc": {"value": share, "stderr": error}}, "n": n} for name in TASKS}
    return record(method, ratio, average=share, also={"metrics": {"tasks": tasks}}, **more)


def grid(model=QWEN):
    """Every method at two ratios and two seeds; the better, the earlier in METHODS."""
    records = [record("original", model=model, average=0.622, perplexity=9.6)]
    for place, method in enumerate(METHODS):
        for ratio in (0.25, 0.5):
            for seed in (42, 0):
                average = 0.6 - place / 50 - ratio / 4 + seed / 10_000
                worse = 3.0**place * 20 * (1 + 4 * ratio) + seed / 10
                records.append(record(method, ratio, seed, model=model, average=average, perplexity=worse))
    return records


def save(records, folder):
    """A results folder with these records."""
    for one in records:
        write_record(record_path(folder, one.model.name, one.method, one.id.replace("/", "-")), one)
    return folder
