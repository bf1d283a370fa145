"""A dense model's answers to all that other models are asked, so that they are compared without it."""

from __future__ import annotations

import gc
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.errors import RecipeError
from dicer.evaluate.answers import TOP, Answers, answers
from dicer.evaluate.dense import Dense, held_dense, open_dense
from dicer.evaluate.greedy import TOKENS, ends_of, prompts_of, write_on
from dicer.evaluate.kept import kept
from dicer.evaluate.questions import Asked, ask, read_questions
from dicer.evaluate.texts import check_texts, text_windows
from dicer.machine import pick_device
from dicer.model.source import ModelSource, tokenize_with
from dicer.progress import Progress, silent


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
