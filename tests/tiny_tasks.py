"""Task files for lm-evaluation-harness with a few local documents each."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    {"question": "The cat sat on the", "choices": [" mat", " moon and stars"], "answer": 0},
    {"question": "Two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "Snow is", "choices": [" white", " warm", " loud"], "answer": 0},
    {"question": "Fire is", "choices": [" cold", " hot stuff"], "answer": 1},
    {"question": "Birds can", "choices": [" fly", " be read"], "answer": 0},
]
PAGES = [{"page": "A page of a few plain words ."}, {"page": "Another page , with other words and a comma ."}]


def write_choice(
    folder: Path, name: str, *, data: str | None = None, metrics=("acc", "acc_norm"), tag="", **more: object
) -> None:
    """A multiple-choice task; its documents are CHOICES unless another file is named."""
    if data is None:
        _lines(folder / "choices.jsonl", CHOICES)
    config = {
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        **({"tag": [tag]} if tag else {}),
        **more,
    }
    _write(folder, name, data or str(folder / "choices.jsonl"), "multiple_choice", config)


def write_pages(folder: Path, name: str) -> None:
    """Word perplexity of PAGES."""
    _lines(folder / "pages.jsonl", PAGES)
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    config = {"doc_to_text": "", "doc_to_target": "{{page}}", "metric_list": [metric]}
    _write(folder, name, str(folder / "pages.jsonl"), "loglikelihood_rolling", config)


def write_group(folder: Path, name: str, members: list[str]) -> None:
    """A group whose accuracy is weighted by size, as MMLU's is."""
    config = {
        "group": name,
        "task": members,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (folder / f"_{name}.yaml").write_text(json.dumps(config))


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write(folder: Path, name: str, data: str, kind: str, config: dict) -> None:
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": kind,
        "metadata": {"version": 1.5},
        **config,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
