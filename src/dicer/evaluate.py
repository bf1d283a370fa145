"""What a model says of text: token perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dicer.calibration import load_windows
from dicer.sources import tokenize_with
from dicer.walk import Progress, evaluating, silent


@torch.no_grad()
def perplexity(
    model: Any, windows: Tensor, *, batch_size: int = 1, progress: Callable[[int, int], None] = lambda *_: None
) -> float:
    """Exp of the mean next-token cross-entropy over all windows, each seen on its own (METHODS section 5).

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


class Evaluation(BaseModel):
    """What is measured of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = ()
    protocol: str | None = None
    task_prefix: str = ""
    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int | Literal["auto"] = 8
    include_path: str | None = None
    perplexity: str | None = None
    window: int = 1024
    windows: int | None = None


def evaluate(model: Any, tokenizer: Any, evaluation: Evaluation, *, progress: Progress = silent) -> dict[str, Any]:
    """Token perplexity on a text."""
    found = None
    if evaluation.perplexity is not None:
        tokenize = tokenize_with(tokenizer)
        assert tokenize is not None
        windows = load_windows(evaluation.perplexity, tokenize, evaluation.window, evaluation.windows or 8)
        value = perplexity(model, windows, progress=lambda done, total: progress("perplexity", done, total))
        found = {"text": "", "window": evaluation.window, "windows": len(windows), "value": value}
    return {"perplexity": found, "tasks": {}, "groups": {}, "summary": {}, "versions": {}}
