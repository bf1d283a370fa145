"""What a record measured, in one form whichever way it was asked for, and how sure each number is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from dicer.study.record import Done, Fidelity, Score, TaskScores
from dicer.study.report.paper import ACCURACIES, PERPLEXITY

_SHARES = ("acc", "acc_norm")  # metrics that are a share of the documents
DEGENERATE, CHOICE, OPEN = "degenerate", "questions, choice", "questions, open"
_CLEAR = 2.0  # standard errors of a difference


class Measure(NamedTuple):
    """A number, and its standard error; None where none is known."""

    value: float
    error: float | None = None


def measures(record: Done) -> dict[str, Measure]:
    """Column -> value: the protocol's summary, and what the tasks that were named say themselves; one perplexity."""
    metrics, asked = record.metrics, record.evaluation
    entries = {**metrics.tasks, **metrics.groups}
    short = {name.removeprefix(asked.task_prefix): entry for name, entry in entries.items()}
    summary = {name: value for name, value in metrics.summary.items() if value is not None}
    found = {name: Measure(value, _error_behind(value, short.get(name))) for name, value in summary.items()}
    named = set(asked.tasks)
    if not found and not (named and named <= set(entries)):  # a tag has no entry of its own
        named = set(entries)
    for name in [name for name in entries if name in named]:
        found = {**_columns(name.removeprefix(asked.task_prefix), entries[name]), **found}
    if "word_perplexity" in found:
        found[PERPLEXITY] = found.pop("word_perplexity")
    elif metrics.perplexity:
        found[PERPLEXITY] = Measure(metrics.perplexity.value)
    if metrics.perplexity and (also := metrics.perplexity.also):
        found[f"perplexity, windows of {also.window:,}"] = Measure(also.value)
    found |= _lost(metrics.fidelity) if metrics.fidelity else {}
    if "average" in found:
        parts = [found[name] for name in summary if name in found and name != "average" and not lower_is_better(name)]
        found["average"] = Measure(found["average"].value, _error_of_mean(parts))
    elif set(ACCURACIES) <= set(found):
        parts = [found[name] for name in ACCURACIES]
        found["average"] = Measure(statistics.fmean(part.value for part in parts), _error_of_mean(parts))
    return found


def _lost(fidelity: Fidelity) -> dict[str, Measure]:
    """A comparison with the dense model."""
    found = {}
    for one in fidelity.texts:
        found[f"KL, {one.text}"] = Measure(one.kl.mean, one.kl.stderr)
        found[f"same token, {one.text}"] = _as_measure(one.same_token)
        found[f"perplexity over dense, {one.text}"] = Measure(one.perplexity.ratio, one.perplexity.ratio_stderr)
    found["tokens alike"] = _as_measure(fidelity.greedy.agreed)
    found[DEGENERATE] = _as_measure(fidelity.greedy.degenerate)
    if (asked := fidelity.questions) is not None:
        found |= {CHOICE: _as_measure(asked.choice), OPEN: _as_measure(asked.open)}
    return found


def _as_measure(score: Score) -> Measure:
    return Measure(score.value, score.stderr)


def floors(record: Done) -> dict[str, Measure]:
    """Column -> what a model gets that knows nothing and always says the same."""
    metrics, prefix = record.metrics, record.evaluation.task_prefix
    found = {
        name.removeprefix(prefix): Measure(entry.floor)
        for name, entry in {**metrics.tasks, **metrics.groups}.items()
        if entry.floor is not None
    }
    if metrics.fidelity and (asked := metrics.fidelity.questions):
        found |= {CHOICE: Measure(asked.choice.floor), OPEN: Measure(asked.open.floor)}
    return found


def _columns(task: str, entry: TaskScores) -> dict[str, Measure]:
    """A task's word perplexity or accuracy; all that it has where it has neither."""
    values = {metric: Measure(entry.metrics[metric].value, _error(metric, entry)) for metric in entry.metrics}
    columns = {"word_perplexity": "word_perplexity", "acc": task}
    known = {column: values[metric] for metric, column in columns.items() if metric in values}
    return known or {f"{task} {metric}": value for metric, value in values.items()}


def _error_behind(value: float, entry: TaskScores | None) -> float | None:
    """The standard error of a protocol's number: that of the task's metric that it was taken from."""
    metrics = entry.metrics if entry else {}
    found = [_error(name, entry) for name in metrics if entry and metrics[name].value == value]
    return max((error for error in found if error is not None), default=None)


def _error(metric: str, entry: TaskScores) -> float | None:
    """As the harness gives it; where it gives none (one document a subject) or 0 (all wrong, all right), Laplace's.

    By his rule of succession a share of n documents is taken to be that of two more, one of them right.
    """
    score, n = entry.metrics[metric], entry.n
    if score.stderr or metric not in _SHARES or not n or not 0 <= score.value <= 1:
        return score.stderr if score.stderr is not None and math.isfinite(score.stderr) else None
    share = (score.value * n + 1) / (n + 2)
    return math.sqrt(share * (1 - share) / (n + 2))


def _error_of_mean(parts: Sequence[Measure]) -> float | None:
    """Of a mean of numbers from different documents; None where the error of one is not known."""
    errors = [part.error for part in parts if part.error is not None]
    return math.hypot(*errors) / len(errors) if errors and len(errors) == len(parts) else None


def clear(first: Measure, second: Measure) -> bool | None:
    """Whether two numbers differ by more than two standard errors of their difference; None where that is not known.

    Both are taken to be independent. Of models that answered the same documents that is careful: what they share
    cancels in the difference.
    """
    if first.error is None or second.error is None:
        return None
    return abs(first.value - second.value) > _CLEAR * math.hypot(first.error, second.error)


def lower_is_better(column: str) -> bool:
    """Of perplexities, of what was lost, and of degenerate answers; of everything else more is better."""
    return "perplexity" in column or column.startswith("KL, ") or column == DEGENERATE


def perplexity_kind(record: Done) -> str:
    """What the perplexity of a record is of."""
    metrics = record.metrics
    if "word_perplexity" in metrics.summary or any("word_perplexity" in t.metrics for t in metrics.tasks.values()):
        return "word perplexity of the harness's wikitext task"
    token = metrics.perplexity
    return f"token perplexity on {token.text}, windows of {token.window}" if token else "no perplexity measured"
