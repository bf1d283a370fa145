"""What a record measured, in one form whichever way it was asked for."""

from __future__ import annotations

from typing import Any

from dicer.paper import PERPLEXITY


def measures(record: dict[str, Any]) -> dict[str, float]:
    """Column -> value: the protocol's summary, or what the tasks themselves say; one perplexity."""
    metrics, prefix = record["metrics"], record["evaluation"].get("task_prefix") or ""
    found = {name: float(value) for name, value in metrics.get("summary", {}).items() if value is not None}
    if not found:
        for name, entry in {**metrics.get("tasks", {}), **metrics.get("groups", {})}.items():
            for metric in ("word_perplexity", "acc"):
                if metric in entry["metrics"]:
                    column = "word_perplexity" if metric != "acc" else name.removeprefix(prefix)
                    found[column] = float(entry["metrics"][metric]["value"])
    token = metrics.get("perplexity") or {}
    if "word_perplexity" in found:
        found[PERPLEXITY] = found.pop("word_perplexity")
    elif "value" in token:
        found[PERPLEXITY] = float(token["value"])
    return found


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
