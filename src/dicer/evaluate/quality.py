"""What a model is worth: token perplexity, and the tasks of lm-evaluation-harness under the papers' protocols."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dicer.ask.evaluation import PROTOCOLS as PROTOCOLS
from dicer.ask.evaluation import Evaluation as Evaluation
from dicer.ask.evaluation import Protocol
from dicer.errors import CalibrationError, ModelError, RecipeError
from dicer.evaluate.dense import open_dense
from dicer.evaluate.fidelity import fidelity
from dicer.evaluate.harness import load_tasks, run_tasks
from dicer.evaluate.reference import Reference, reference_of
from dicer.measure.documents import HUB_TEXTS
from dicer.measure.stores.resident import evaluating
from dicer.measure.text import load_windows
from dicer.model.source import tokenize_with
from dicer.processes import rank
from dicer.progress import Progress, silent
from dicer.reading import TABLES, read_text, reason


def evaluate(
    model: Any,
    tokenizer: Any,
    evaluation: Evaluation,
    *,
    reference: Reference | None = None,
    name: str = "the model",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model in memory.

    ``word_perplexity`` and accuracies are those of the harness's command line on the same checkpoint. In several
    processes (``accelerate launch``) the tasks are shared; perplexity is the first one's work.

    Args:
        model: a causal language model; evaluated without dropout, whatever its mode.
        tokenizer: its tokenizer.
        evaluation: what to measure.
        reference: the answers of ``evaluation.against`` (:func:`dicer.evaluate.reference.reference_of`); without, they
            are had here, with both models in memory where they are not kept yet.
        name: the model's, for people.
        progress: called with (stage, done, total).

    Returns:
        Plain values: ``perplexity`` (text, window, windows, tokens predicted, value, and the same under ``also`` for
        another window) or None, ``tasks`` and ``groups`` (see :func:`dicer.evaluate.harness.run_tasks`), ``summary``
        (the protocol's numbers by short names, and their ``average``), ``versions``, and with ``against`` ``fidelity``
        (:func:`dicer.evaluate.fidelity.fidelity`). Nothing at all ({}) in every process but the first.

    Raises:
        DicerError: anything that the user can mend; all but a failing model is found before anything is measured.
    """
    evaluation.require_something()
    text = evaluation.perplexity_text()
    if tokenizer is None:
        raise ModelError("the model has no tokenizer, so it cannot be measured on text.")
    lengths = (None, evaluation.also_window) if evaluation.also_window else (None,)
    windows = [] if text is None else [_windows(model, tokenizer, evaluation, text, length) for length in lengths]
    tasks = load_all_tasks(evaluation)
    result: dict[str, Any] = {"perplexity": None, "tasks": {}, "groups": {}, "summary": {}, "versions": {}}
    with evaluating(model):
        for limit, members in tasks.items():
            found = run_tasks(
                model,
                tokenizer,
                members,
                num_fewshot=0 if evaluation.protocol else evaluation.num_fewshot,
                limit=limit,
                batch_size=evaluation.batch_size,
                progress=lambda done, total: progress("tasks", done, total),
            )
            for kind in ("tasks", "groups"):
                result[kind] |= (found or {}).get(kind, {})
            result["versions"] = {"lm_eval": importlib.metadata.version("lm_eval")}
        if rank():
            return {}
        measured = [_measure(model, one, Path(str(text)).name, evaluation, progress) for one in windows]
        if measured:
            result["perplexity"] = {**measured[0], **({"also": measured[1]} if len(measured) > 1 else {})}
        if reference is None and evaluation.against is not None:
            dense = open_dense(evaluation.against, str(model.dtype).removeprefix("torch."), str(model.device))
            reference = reference_of(evaluation, dense, progress=progress)
        if reference is not None:
            size = evaluation.batch_size
            result["fidelity"] = fidelity(model, tokenizer, reference, name=name, batch_size=size, progress=progress)
    if evaluation.protocol:
        result["summary"] = _summary(PROTOCOLS[evaluation.protocol], evaluation.task_prefix, result)
    return result


def load_all_tasks(evaluation: Evaluation) -> dict[int | None, dict[str, Any]]:
    """Documents a task -> its tasks with their documents (:func:`dicer.evaluate.harness.load_tasks`).

    Raises:
        EvaluationError: there is no such task, or its data cannot be had.
    """
    return {limit: load_tasks(names, evaluation.include_path) for limit, names in evaluation.by_limit().items()}


def _windows(model: Any, tokenizer: Any, evaluation: Evaluation, text: str, other: int | None = None) -> Tensor:
    """Windows side by side, int64 [W, T]; as long as was asked for, else the protocol's, else what the model can.

    ``other`` is another length, of which as many windows are taken as cover the same text.
    """
    protocol = PROTOCOLS.get(evaluation.protocol or "")
    own = protocol.window if protocol and "window" not in evaluation.model_fields_set else evaluation.window
    length = other or own
    count = evaluation.windows and max(1, evaluation.windows * own // length)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length > positions:
        if protocol or other or "window" in evaluation.model_fields_set:
            raise RecipeError(
                f"a window of {length} tokens is longer than the model's {positions} positions; "
                f"use {'--also-window' if other else '--window'} {positions}."
            )
        length = int(positions)
    tokenize = tokenize_with(tokenizer)
    assert tokenize is not None
    if text == "wikitext2":
        rows = _hub_rows()
    elif protocol and protocol.text and text.endswith(".txt"):
        rows = _file_rows(Path(text))
    else:
        return load_windows(text, tokenize, length, count)
    ids = torch.tensor(tokenize("\n\n".join(rows)))
    if len(ids) < length:
        raise CalibrationError(f"'{text}' is shorter than one window of {length} tokens; use a longer text.")
    return ids[: len(ids) // length * length].view(-1, length)[:count]  # [W, T]


def _file_rows(path: Path) -> list[str]:
    """A text's lines as the hub has them: a blank line is an empty row, any other keeps its newline."""
    try:
        lines = read_text(path, TABLES).removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {reason(error)}.") from None
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _hub_rows() -> list[str]:
    known = HUB_TEXTS["wikitext2"]
    try:
        import datasets

        return list(datasets.load_dataset(known.path, known.config, split="test")[known.field])
    except Exception as error:  # not installed, or one of the dozen kinds for: offline
        said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CalibrationError(
            f"the test split of '{known.path}' cannot be had: {said}. Give a file with --perplexity."
        ) from None


def _measure(model: Any, windows: Tensor, text: str, evaluation: Evaluation, progress: Progress) -> dict[str, Any]:
    size = 1 if evaluation.batch_size == "auto" else evaluation.batch_size
    value = perplexity(
        model, windows, batch_size=size, progress=lambda done, total: progress("perplexity", done, total)
    )
    count, length = windows.shape
    return {"text": text, "window": length, "windows": count, "tokens": count * (length - 1), "value": value}


def _summary(protocol: Protocol, prefix: str, result: Mapping[str, Any]) -> dict[str, float | None]:
    """A paper's row; None where a task of one's own does not give the metric, rather than losing what was measured."""
    values = {"perplexity": result["perplexity"]["value"]} if protocol.text else {}
    accuracies: dict[str, Any] = {}
    measured = {**result["tasks"], **result["groups"]}
    for name, preferred in protocol.tasks.items():
        metrics = measured.get(prefix + name, {}).get("metrics", {})
        value = next((metrics[metric]["value"] for metric in preferred if metric in metrics), None)
        if preferred == ("word_perplexity",):
            values["word_perplexity"] = value
        else:
            accuracies[name] = value
    whole = None not in accuracies.values()
    return {**values, **accuracies, "average": sum(accuracies.values()) / len(accuracies) if whole else None}


@torch.no_grad()
def perplexity(
    model: Any, windows: Tensor, *, batch_size: int = 1, progress: Callable[[int, int], None] = lambda *_: None
) -> float:
    """Exp of the mean next-token cross-entropy over all windows, each seen on its own (docs/evaluation.md).

    Args:
        model: a causal language model; evaluated without dropout, whatever its mode.
        windows: int64 [W, T]; the T - 1 last tokens of each are predicted.
        batch_size: windows in a forward pass.
        progress: called with (windows done, windows).

    Returns:
        Perplexity per token; inf where the loss overflows.
    """
    total, done = 0.0, 0
    with evaluating(model):
        for batch in windows.split(batch_size):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T-1, V]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            total += float(loss)
            done += len(batch)
            progress(done, len(windows))
    mean = total / windows[:, 1:].numel()
    return math.exp(mean) if mean < 700 else math.inf
