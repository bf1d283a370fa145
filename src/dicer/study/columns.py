"""What a record measured, in one form whichever way it was asked for."""

from __future__ import annotations

import statistics
from typing import Any

from dicer.study.report.paper import ACCURACIES, PERPLEXITY


def measures(record: dict[str, Any]) -> dict[str, float]:
    """Column -> value: the protocol's summary, and what the tasks that were named say themselves; one perplexity."""
    metrics, evaluation = record["metrics"], record["evaluation"]
    found = {name: float(value) for name, value in metrics.get("summary", {}).items() if value is not None}
    entries = {**metrics.get("tasks", {}), **metrics.get("groups", {})}
    named = set(evaluation.get("tasks") or ())
    if not found and not (named and named <= set(entries)):  # a tag has no entry of its own
        named = set(entries)
    for name in entries:
        if name in named:
            own = _columns(name.removeprefix(evaluation.get("task_prefix") or ""), entries[name]["metrics"])
            found = {**own, **found}
    token = metrics.get("perplexity") or {}
    if "word_perplexity" in found:
        found[PERPLEXITY] = found.pop("word_perplexity")
    elif "value" in token:
        found[PERPLEXITY] = float(token["value"])
    if also := token.get("also"):
        found[f"perplexity, windows of {also['window']:,}"] = float(also["value"])
    if "average" not in found and set(ACCURACIES) <= set(found):
        found["average"] = statistics.fmean(found[name] for name in ACCURACIES)
    return found


def _columns(task: str, metrics: dict[str, Any]) -> dict[str, float]:
    """A task's word perplexity or accuracy; all that it has where it has neither."""
    values = {metric: float(entry["value"]) for metric, entry in metrics.items()}
    columns = {"word_perplexity": "word_perplexity", "acc": task}
    known = {column: values[metric] for metric, column in columns.items() if metric in values}
    return known or {f"{task} {metric}": value for metric, value in values.items()}


def lower_is_better(column: str) -> bool:
    """Of perplexities; of everything else more is better."""
    return "perplexity" in column


def perplexity_kind(record: dict[str, Any]) -> str:
    """What the perplexity of a record is of."""
    metrics = record["metrics"]
    words = "word_perplexity" in metrics.get("summary", {}) or any(
        "word_perplexity" in entry["metrics"] for entry in metrics.get("tasks", {}).values()
    )
    if words:
        return "word perplexity of the harness's wikitext task"
    token = metrics.get("perplexity")
    return f"token perplexity on {token['text']}, windows of {token['window']}" if token else "no perplexity measured"
