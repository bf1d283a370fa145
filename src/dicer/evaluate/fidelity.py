"""What a pruned model has lost of the dense one: token by token, in greedy text, and on a text of another domain."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.errors import EvaluationError, RecipeError
from dicer.evaluate.answers import TOP, Answers, Compared, answers, compare
from dicer.evaluate.dense import Dense, held_dense, open_dense
from dicer.evaluate.greedy import TOKENS, ends_of, judge, looping, prompts_of, write_on
from dicer.evaluate.kept import kept
from dicer.evaluate.questions import Asked, ask, judge_questions, read_questions
from dicer.evaluate.shares import share_of
from dicer.evaluate.texts import check_texts, text_windows
from dicer.machine import pick_device
from dicer.model.source import ModelSource, tokenize_with
from dicer.progress import Progress, silent

_WORST = 0.2  # the share of tokens whose part of the whole divergence is told


@dataclass(frozen=True)
class Reference:
    """A dense model's answers to all that others are asked; the model itself is no longer needed.

    Attributes:
        name: of the model, for people.
        fingerprint: tells it from others.
        model_bytes: of its weights; None where that is not known.
        tokenizer: its tokenizer.
        texts: names of the texts.
        windows: of each, int64 [W, T].
        answers: to each.
        nbytes: of the predicted tokens of each, as UTF-8.
        prompts: int64 [P, L].
        ends: tokens that end a text.
        greedy: what the dense model writes after the prompts, int64 [P, N].
        questions: what it answers, where questions were asked.
    """

    name: str
    fingerprint: str
    model_bytes: int | None
    tokenizer: Any
    texts: tuple[str, ...]
    windows: tuple[Tensor, ...]
    answers: tuple[Answers, ...]
    nbytes: tuple[int, ...]
    prompts: Tensor
    ends: list[int]
    greedy: Tensor
    questions: Asked | None = None


def reference_of(evaluation: Evaluation, dense: Dense, *, progress: Progress = silent) -> Reference:
    """Ask a dense model all that others will be asked, or take its answers from the cache.

    Args:
        evaluation: the texts, their windows, the questions.
        dense: the model.
        progress: called with (stage, done, total).

    Raises:
        DicerError: a text cannot be read or is too short, kept answers are damaged, or a logit is not finite.
    """
    texts = evaluation.fidelity_texts()
    check_texts(texts)
    tokenize = tokenize_with(dense.tokenizer)
    assert tokenize is not None
    length = _length(evaluation, dense.positions)
    windows = tuple(text_windows(text, tokenize, length, evaluation.windows) for text in texts)
    size = 1 if evaluation.batch_size == "auto" else evaluation.batch_size
    held = tuple(_answers(dense, own, size, progress) for own in windows)
    prompts = prompts_of(windows, int(min(dense.positions, 2**31)))
    written = kept(
        {**_known(dense), "prompts": _digest(prompts), "tokens": TOKENS},
        lambda: _written(dense, prompts, progress),
    )
    questions = None
    if evaluation.questions is not None:
        read = read_questions(Path(evaluation.questions), dense.tokenizer, evaluation.limit)
        found = kept(
            {**_known(dense), "questions": read.digest},
            lambda: ask(dense.model, read, ends_of(dense.model), lambda *at: progress("dense questions", *at)),
        )
        questions = Asked(read, found)
    return Reference(
        name=dense.name,
        fingerprint=dense.fingerprint,
        model_bytes=dense.nbytes,
        tokenizer=dense.tokenizer,
        texts=tuple(Path(text).name for text in texts),
        windows=windows,
        answers=held,
        nbytes=tuple(_nbytes(dense.tokenizer, own) for own in windows),
        prompts=prompts,
        ends=written["ends"].tolist(),
        greedy=written["text"],
        questions=questions,
    )


def refer(
    evaluation: Evaluation,
    compute: Compute,
    held: tuple[Any, Any, ModelSource] | None = None,
    *,
    progress: Progress = silent,
) -> Reference:
    """The answers of the dense model that an evaluation names, or of one that is held.

    Args:
        evaluation: what is measured.
        compute: device and dtype to load with.
        held: a model in memory, its tokenizer and where it is from, instead of the one that is named.
        progress: called with (stage, done, total).

    Raises:
        DicerError: as :func:`reference_of`; or the model cannot be found.
    """
    if held is None:
        assert evaluation.against is not None
        named = open_dense(evaluation.against, compute.dtype, pick_device(compute.device))
        reference = reference_of(evaluation, named, progress=progress)
        del named
        gc.collect()  # a model that is gone but not collected would be in memory with the next
        return reference
    model, tokenizer, source = held
    nbytes = sum(info.nbytes for info in source.tensors.infos().values())
    dense = held_dense(model, tokenizer, source.name, source.fingerprint, nbytes, source.folder)
    return reference_of(evaluation, dense, progress=progress)


def _length(evaluation: Evaluation, positions: float) -> int:
    """Tokens in a window: as asked for, else what the model can see of the usual."""
    if evaluation.window > positions and "window" in evaluation.model_fields_set:
        raise RecipeError(
            f"a window of {evaluation.window} tokens is longer than the model's {positions} positions; "
            f"use --window {positions}."
        )
    return int(min(evaluation.window, positions))


def _known(dense: Dense) -> dict[str, Any]:
    return {"model": dense.fingerprint, "weights": dense.weights, **dense.computes}


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().astype("<i8").tobytes()).hexdigest()


def _answers(dense: Dense, windows: Tensor, size: int, progress: Progress) -> Answers:
    decides = {**_known(dense), "text": _digest(windows), "top": TOP, "together": size}

    def step(done: int, total: int) -> None:
        progress("dense answers", done, total)

    return Answers(
        **kept(decides, lambda: answers(dense.model, windows, name=dense.name, batch_size=size, step=step).tensors())
    )


def _written(dense: Dense, prompts: Tensor, progress: Progress) -> dict[str, Tensor]:
    ends = ends_of(dense.model)
    text = write_on(dense.model, prompts, ends, step=lambda *at: progress("dense greedy text", *at))
    return {"text": text, "ends": torch.tensor(ends, dtype=torch.int64)}


def _nbytes(tokenizer: Any, windows: Tensor) -> int:
    """Bytes of all tokens of windows but the first of each, which is not predicted."""

    def size(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    return sum(size(row) - size(row[:1]) for row in windows.tolist())


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
