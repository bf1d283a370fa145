"""What transformers makes of a checkpoint in float32, held against what llama.cpp makes of its GGUF."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dicer  # noqa: F401 - teaches transformers the folders whose layers differ

WORKER = Path(__file__).with_name("run_llama_cpp.py")
TIE = 0.01  # a smaller difference between the two best log-probabilities may go either way
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first man",
    "To be or not to be, that is",
    "My favourite season is autumn because",
    "1, 2, 3, 4, 5,",
    "The opposite of hot is",
)


def python() -> str | None:
    """A Python that has xllamacpp: $DICER_LLAMA_CPP_PYTHON, or this one; None without."""
    named = os.environ.get("DICER_LLAMA_CPP_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("xllamacpp") else None)


@dataclass
class Outcome:
    """How far both agree.

    Attributes:
        prompts: how many there were.
        same: whose continuation is the same to its end.
        margins: where a continuation splits: transformers' difference between its two best log-probabilities there.
        agreed: tokens before a split, of ``tokens``.
        difference: largest one of a chosen token's log-probability, before a split, of the ``compared`` that
            llama.cpp tells.
        spread: largest difference of any token's log-probability after a prompt, where that was asked.
        ends: last tokens of continuations that llama.cpp stopped before the end.
        seconds: of CPU that llama.cpp took to load and to generate.
        answers: all that llama.cpp said.
    """

    prompts: int
    same: int = 0
    margins: list[float] = field(default_factory=list)
    agreed: int = 0
    tokens: int = 0
    difference: float = 0.0
    compared: int = 0
    spread: float | None = None
    ends: set[int] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def ties_only(self) -> bool:
        """Whether every continuation is the same, or splits where it may go either way."""
        return all(margin < TIE for margin in self.margins)

    def row(self) -> str:
        """Cells of a Markdown table."""
        margins = ", ".join(f"{margin:.1e}" for margin in self.margins) or "-"
        difference = f"{self.difference:.1e}" if self.compared else "not told"
        spread = "" if self.spread is None else f" | {self.spread:.1e}"
        return f"{self.same}/{self.prompts} | {margins} | {self.agreed}/{self.tokens} | {difference}{spread}"


def llama_cpp(gguf: Path, questions: dict[str, Any]) -> dict[str, Any]:
    """Ask the worker, in a process of its own: a model that llama.cpp dislikes may take it down."""
    done = subprocess.run(
        [str(python()), str(WORKER), str(gguf)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(folder: Path, gguf: Path, prompts: list[list[int]], count: int = 24, **more: Any) -> Outcome:
    """Greedy continuations of both."""
    answers = llama_cpp(gguf, {"prompts": prompts, "count": count, **more})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outcome = Outcome(len(prompts), seconds=answers["seconds"], answers=answers)
    for ids, theirs in zip(prompts, answers["completions"], strict=True):
        with torch.inference_mode():
            output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)[0]
            logits = model(output[None, :-1]).logits[0, len(ids) - 1 :].log_softmax(-1)  # [T, V]
        _count(outcome, output[len(ids) :].tolist(), logits, theirs)
        if "banned" in more:
            told = answers["distributions"].pop(0)
            after = torch.tensor([told[str(i)] for i in range(logits.shape[1])])  # [V]
            outcome.spread = max(outcome.spread or 0.0, (after - logits[0]).abs().max().item())
    return outcome


def _count(outcome: Outcome, ours: list[int], logits: torch.Tensor, theirs: dict[str, Any]) -> None:
    length = len(theirs["ids"])  # llama.cpp stops at an end of text, and transformers was told to go on
    split = next((i for i in range(length) if ours[i] != theirs["ids"][i]), length)
    outcome.same += split == length
    if split == length < len(ours):
        outcome.ends.update(theirs["ids"][-1:])
    outcome.agreed, outcome.tokens = outcome.agreed + split, outcome.tokens + length
    for i, logprob in enumerate((theirs["logprobs"] or [])[:split]):
        outcome.difference = max(outcome.difference, abs(logits[i, ours[i]].item() - logprob))
        outcome.compared += 1
    if split < length:
        best = logits[split].topk(2).values
        outcome.margins.append((best[0] - best[1]).item())


def prompt_ids(folder: Path) -> list[list[int]]:
    """The prompts, tokenized."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]
