"""What a pruned model has lost of the dense one: token by token, in greedy text, and on a text of another domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dicer.errors import EvaluationError
from dicer.evaluate.answers import TOP, Compared, compare
from dicer.evaluate.greedy import judge, looping, write_on
from dicer.evaluate.questions import ask, judge_questions
from dicer.evaluate.reference import Reference
from dicer.evaluate.shares import share_of
from dicer.model.source import tokenize_with
from dicer.progress import Progress, silent

_WORST = 0.2  # the share of tokens whose part of the whole divergence is told


def fidelity(
    model: Any,
    tokenizer: Any,
    reference: Reference,
    *,
    name: str = "the model",
    batch_size: int | str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """What a model has lost of the dense one.

    Args:
        model: a causal language model of the same vocabulary.
        tokenizer: its tokenizer.
        reference: the dense model's answers.
        name: the model's, for people.
        batch_size: windows in a forward pass; auto is 1.
        progress: called with (stage, done, total).

    Returns:
        Plain values (docs/evaluation.md): ``against``, ``texts`` (each with ``kl`` in nats a token, ``same_token``,
        ``perplexity``, ``bits_per_byte``), ``leakage`` (the second text's ratio of perplexities less the first's),
        ``greedy`` and ``questions``. Standard errors of texts are those of a mean over windows, as tokens of one
        window go together; None where there is one window.

    Raises:
        EvaluationError: another tokenizer or vocabulary, or logits that are not finite.
    """
    _check_tokenizer(tokenizer, reference, name)
    _check_positions(model, reference, name)
    size = 1 if batch_size == "auto" else int(batch_size)
    texts = [
        _text(model, reference, place, name, size, lambda done, total: progress("fidelity", done, total))
        for place in range(len(reference.texts))
    ]
    written = write_on(
        model, reference.prompts, reference.ends, step=lambda done, total: progress("greedy text", done, total)
    )
    found = {
        "against": {"name": reference.name, "fingerprint": reference.fingerprint, "bytes": reference.model_bytes},
        "top": TOP,
        "texts": texts,
        "leakage": _leakage(texts),
        "greedy": _greedy(written, reference),
    }
    if (asked := reference.questions) is not None:
        own = ask(model, asked.questions, reference.ends, lambda *at: progress("questions", *at))
        found["questions"] = judge_questions(own, asked)
    return found


def _check_tokenizer(tokenizer: Any, reference: Reference, name: str) -> None:
    if tokenizer is None:
        raise EvaluationError(f"{name} has no tokenizer, so it cannot be held against {reference.name} on text.")
    sample = reference.tokenizer.decode(reference.windows[0][0].tolist(), clean_up_tokenization_spaces=False)
    own, other = (tokenize_with(one) for one in (tokenizer, reference.tokenizer))
    assert own is not None
    assert other is not None
    tokens, others = ({i: t for t, i in one.get_vocab().items()} for one in (tokenizer, reference.tokenizer))
    if any(tokens[i] != others[i] for i in tokens.keys() & others.keys()) or own(sample) != other(sample):
        raise EvaluationError(
            f"{name} and {reference.name} have different tokenizers, so their tokens cannot be compared; name the "
            "dense model that this one was made of."
        )


def _check_positions(model: Any, reference: Reference, name: str) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max(reference.windows[0].shape[1], reference.prompts.shape[1] + reference.greedy.shape[1])
    if longest > positions:
        raise EvaluationError(
            f"{name} sees {positions} tokens, and the comparison with {reference.name} has {longest} in a row; use "
            f"--window {max(2, positions - reference.greedy.shape[1])}."
        )


def _text(model: Any, reference: Reference, place: int, name: str, size: int, step: Any) -> dict[str, Any]:
    windows, dense = reference.windows[place], reference.answers[place]
    found = compare(model, windows, dense, name=name, batch_size=size, step=step)
    count, length = windows.shape
    loss, dense_loss = (float(one.double().mean()) for one in (found.losses, dense.losses))
    bits = windows[:, 1:].numel() / math.log(2) / max(reference.nbytes[place], 1)
    ratio = _exp(loss - dense_loss)
    error = _error_over_windows(found.losses.double() - dense.losses.double())
    return {
        "text": reference.texts[place],
        "window": length,
        "windows": count,
        "tokens": count * (length - 1),
        "bytes": reference.nbytes[place],
        "kl": _divergence(found),
        "same_token": {"value": float(found.same.double().mean()), "stderr": _error_over_windows(found.same.double())},
        "perplexity": {
            "value": _exp(loss),
            "dense": _exp(dense_loss),
            "ratio": ratio,
            "ratio_stderr": None if error is None else ratio * error,  # of exp(x): exp(x) times that of x
        },
        "bits_per_byte": {"value": loss * bits, "dense": dense_loss * bits},
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _divergence(found: Compared) -> dict[str, float | None]:
    """Mean, standard error, median, 99th percentile, and what part of the whole the worst fifth of tokens carries."""
    values = found.divergence.flatten().numpy()
    worst = np.sort(values)[-math.ceil(_WORST * len(values)) :].sum()
    whole = float(values.sum())
    return {
        "mean": float(values.mean()),
        "stderr": _error_over_windows(found.divergence),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
        "worst_fifth": float(worst) / whole if whole > 0 else None,
    }


def _error_over_windows(values: Tensor) -> float | None:
    """Standard error of the mean of [W, T], from the W means; None for one window."""
    means = values.double().mean(1)  # [W]
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None


def _leakage(texts: Sequence[dict[str, Any]]) -> dict[str, float | None] | None:
    """How much more the second text's perplexity has grown than the first's; None for one text."""
    if len(texts) < 2:
        return None
    first, second = (one["perplexity"] for one in texts[:2])
    errors = [one["ratio_stderr"] for one in (first, second)]
    known = None not in errors
    return {"value": second["ratio"] - first["ratio"], "stderr": math.hypot(*errors) if known else None}


def _greedy(own: Tensor, reference: Reference) -> dict[str, Any]:
    found = judge(reference.greedy, own, reference.ends)
    lengths = found.agreed.double()
    error = float(lengths.std() / math.sqrt(len(lengths))) if len(lengths) > 1 else None
    dense_loops = [looping(text) for text in reference.greedy.tolist()]
    return {
        "prompts": len(own),
        "prompt_length": reference.prompts.shape[1],
        "tokens": own.shape[1],
        "agreed": {"value": float(lengths.mean()), "stderr": error},
        "whole": share_of(found.whole.tolist()),
        "degenerate": share_of((found.loops | found.cut_off).tolist()),
        "loops": share_of(found.loops.tolist()),
        "cut_off": share_of(found.cut_off.tolist()),
        "dense_loops": share_of(dense_loops),
    }
