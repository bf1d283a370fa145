"""The same questions twice: as a choice among given answers, and as an open answer in the model's own words."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dicer.errors import EvaluationError
from dicer.evaluate.shares import share_of
from dicer.measure.rows import ROWS, Row, ending_of, read_rows
from dicer.measure.stores.resident import evaluating
from dicer.model.source import tokenize_with

QUESTIONS = 100  # the first of a file, behind the examples
_EXAMPLES = 3  # its first rows, answered, stand before every question: they say what form an answer has
_ANSWER = 24  # most tokens of an open answer

Step = Callable[[int, int], None]


class _Question(NamedTuple):
    text: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Questions:
    """Questions as tokens.

    Attributes:
        name: of the file.
        prompts: of each, its token ids.
        choices: of each, the token ids of every given answer.
        texts: of each, the given answers.
        right: of each, which one is right.
        digest: of all tokens.
        tokenizer: made them.
    """

    name: str
    prompts: list[list[int]]
    choices: list[list[list[int]]]
    texts: list[tuple[str, ...]]
    right: list[int]
    digest: str
    tokenizer: Any


class Asked(NamedTuple):
    """Questions with a model's answers, as :func:`ask` gives them."""

    questions: Questions
    found: dict[str, Tensor]


def read_questions(path: Path, tokenizer: Any, most: int | None = None) -> Questions:
    """The questions of a file: the first three rows are examples, the next ``most`` (100) are asked.

    A row has ``question`` or ``question_stem``, ``choices`` (texts, or texts and labels), and ``answerKey`` (a label)
    or ``answer`` (an index from 0), as ARC, OpenBookQA and MMLU have them.

    Raises:
        EvaluationError: a row is no such question, or there are too few.
        CalibrationError: the file cannot be read.
    """
    if ending_of(path) not in ROWS or not path.is_file():
        raise EvaluationError(f"questions: there is no file {path} of rows ({', '.join(ROWS)}).")
    most = most or QUESTIONS
    found = []
    for row in read_rows(path):
        found.append(_question(row))
        if len(found) == _EXAMPLES + most:
            break
    if len(found) <= _EXAMPLES:
        raise EvaluationError(
            f"{path} holds {len(found)} questions; there must be {_EXAMPLES} examples and at least one to be asked."
        )
    return _as_tokens(path.name, found[:_EXAMPLES], found[_EXAMPLES:], tokenizer)


def _question(row: Row) -> _Question:
    values, labels = row.values, None
    text: Any = values.get("question", values.get("question_stem"))
    choices: Any = values.get("choices")
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    right = values.get("answer", values.get("answerKey"))
    if isinstance(labels, list) and right in labels:
        right = labels.index(right)
    lists = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c.strip() for c in choices)
    if not isinstance(text, str) or not lists or type(right) is not int or not 0 <= right < len(choices or ()):
        raise EvaluationError(
            f"{row.where}: no question with choices and the right one (question, choices, answerKey or answer), as "
            "ARC, OpenBookQA and MMLU have them."
        )
    return _Question(text.strip(), tuple(choice.strip() for choice in choices or ()), right)


def _as_tokens(name: str, examples: Sequence[_Question], asked: Sequence[_Question], tokenizer: Any) -> Questions:
    tokenize = tokenize_with(tokenizer)
    assert tokenize is not None
    before = "".join(f"{_prompt(example)} {example.choices[example.right]}\n\n" for example in examples)
    prompts, choices = [], []
    for one in asked:
        prompts.append(tokenize(before + _prompt(one)))
        # What follows the prompt is what both together have more, as the harness cuts them.
        choices.append([tokenize(f"{before}{_prompt(one)} {text}")[len(prompts[-1]) :] for text in one.choices])
    digest = hashlib.sha256(json.dumps([prompts, choices]).encode()).hexdigest()
    texts, right = [one.choices for one in asked], [one.right for one in asked]
    return Questions(name, prompts, choices, texts, right, digest, tokenizer)


def _prompt(one: _Question) -> str:
    return f"Question: {one.text}\nAnswer:"


@torch.no_grad()
def ask(model: Any, questions: Questions, ends: Sequence[int], step: Step = lambda *_: None) -> dict[str, Tensor]:
    """Ask a model all questions in both ways.

    Args:
        model: a causal language model.
        questions: from :func:`read_questions`.
        ends: tokens that end a text.
        step: called with (questions done, questions).

    Returns:
        ``choice``: the given answer of the greatest log-probability (summed over its tokens), int64 [Q]; ``open``: the
        model's own answer, greedily, int64 [Q, N], -1 behind its end.
    """
    chosen, written = [], torch.full((len(questions.prompts), _ANSWER), -1)
    alike = itertools.takewhile(lambda column: len({*column}) == 1, zip(*questions.prompts, strict=False))
    shared = [column[0] for column in alike][: min(map(len, questions.prompts)) - 1]  # the examples, read once
    with evaluating(model):
        before = _read_on(model, shared, None).past_key_values if shared else None
        for place, (prompt, choices) in enumerate(zip(questions.prompts, questions.choices, strict=True)):
            read = _read_on(model, prompt[len(shared) :], copy.deepcopy(before))
            first, seen = read.logits[0, -1].float().log_softmax(0), read.past_key_values
            scores = _scores(model, choices, first, copy.deepcopy(seen))
            chosen.append(int(scores.argmax()))
            answer = _own_words(model, int(first.argmax()), seen, ends)
            written[place, : len(answer)] = torch.tensor(answer)
            step(place + 1, len(questions.prompts))
    return {"choice": torch.tensor(chosen), "open": written}


def _read_on(model: Any, ids: Sequence[int], seen: Any) -> Any:
    """What a model makes of tokens behind those that it has seen, with its cache."""
    return model(input_ids=torch.tensor([ids]).to(model.device), past_key_values=seen, use_cache=True)


def _scores(model: Any, choices: Sequence[Sequence[int]], first: Tensor, seen: Any) -> Tensor:
    """Log-probability of each given answer, [C]: they are padded behind their ends, where no other token sees."""
    longest = max(map(len, choices))
    ids = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices]).to(first.device)  # [C, N]
    counts = torch.tensor([[i < len(choice) for i in range(1, longest)] for choice in choices]).to(first.device)
    scores = first[ids[:, 0]]
    if longest > 1:
        seen.batch_repeat_interleave(len(choices))
        logs = model(input_ids=ids[:, :-1], past_key_values=seen, use_cache=True).logits.float().log_softmax(2)
        following = logs.gather(2, ids[:, 1:, None])[:, :, 0]  # [C, N-1]
        scores = scores + following.masked_fill(~counts, 0).sum(1)
    return scores


def _own_words(model: Any, token: int, seen: Any, ends: Sequence[int]) -> list[int]:
    """The most likely token each time, until an end or as many as an answer may have."""
    found = [token]
    while found[-1] not in ends and len(found) < _ANSWER:
        found.append(int(_read_on(model, [found[-1]], seen).logits[0, -1].argmax()))
    return [token for token in found if token not in ends]


def judge_questions(own: dict[str, Tensor], asked: Asked) -> dict[str, Any]:
    """Both shares of right answers beside the dense model's, with standard errors and what no knowledge would give.

    Returns:
        ``file``, ``n``, and for ``choice`` and ``open``: ``value``, ``stderr``, ``dense``, ``dense_stderr`` and
        ``floor``. The floor of choices is the best that one place of the list for all questions gives, that of open
        answers the best that one answer for all gives; ``chance`` is that of a blind choice.
    """
    questions, dense = asked
    golden = [normalised(texts[i]) for texts, i in zip(questions.texts, questions.right, strict=True)]
    return {
        "file": questions.name,
        "n": len(golden),
        "choice": {**_beside(_chosen(own, questions), _chosen(dense, questions)), "floor": _floor(questions.right)},
        "open": {
            **_beside(_said(own, golden, questions), _said(dense, golden, questions)),
            "floor": _floor(golden),
        },
        "chance": sum(1 / len(texts) for texts in questions.texts) / len(golden),
    }


def _beside(own: Sequence[bool], dense: Sequence[bool]) -> dict[str, float]:
    other = share_of(dense)
    return {**share_of(own), "dense": other["value"], "dense_stderr": other["stderr"]}


def _chosen(found: dict[str, Tensor], questions: Questions) -> list[bool]:
    return [choice == right for choice, right in zip(found["choice"].tolist(), questions.right, strict=True)]


def _said(found: dict[str, Tensor], golden: Sequence[str], questions: Questions) -> list[bool]:
    texts = [questions.tokenizer.decode([i for i in ids if i >= 0]) for ids in found["open"].tolist()]
    firsts = [text.strip().split("\n")[0] for text in texts]
    return [normalised(text) == right for text, right in zip(firsts, golden, strict=True)]


def _floor(answers: Sequence[object]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def normalised(text: str) -> str:
    """Small letters, without punctuation, articles and spare blanks: the rule of SQuAD (Rajpurkar et al. 2016)."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())
