"""What a dense model says to a text, kept small: the likeliest tokens of every place, and one bucket for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dicer.errors import EvaluationError
from dicer.measure.stores.resident import evaluating

TOP = 64  # tokens of a place that are kept one by one
# Logits at a time, 64 MiB of float32: all of a long window would be gigabytes, and what is smaller than 32 MiB the C
# library takes from its heap, where small tensors that stay leave holes (4.4 GB instead of 1.9 for SmolLM2).
_LOGITS = 2**24

Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Answers:
    """A model's answers to W windows of T tokens: the T - 1 last tokens of each are predicted.

    Attributes:
        best: the most likely token, int32 [W, T-1].
        top: the K likeliest tokens, int32 [W, T-1, K].
        logs: their log-probabilities in nats, float32 [W, T-1, K].
        rest: log of what all others have together, float32 [W, T-1]; -inf where there are none.
        losses: minus the log-probability of the token that comes, float32 [W, T-1].
        vocabulary: int64 [1], how many tokens the model tells apart.
    """

    best: Tensor
    top: Tensor
    logs: Tensor
    rest: Tensor
    losses: Tensor
    vocabulary: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Compared:
    """Another model beside a dense one, place by place.

    Attributes:
        divergence: KL(dense || other) in nats over the kept tokens and the rest, float64 [W, T-1].
        same: whether the most likely token is the same, bool [W, T-1].
        losses: the other model's, float32 [W, T-1].
    """

    divergence: Tensor
    same: Tensor
    losses: Tensor


def answers(model: Any, windows: Tensor, *, name: str, batch_size: int = 1, step: Step = lambda *_: None) -> Answers:
    """Ask a model about every place of a text.

    Args:
        model: a causal language model.
        windows: int64 [W, T], each seen on its own.
        name: the model's, for people.
        batch_size: windows in a forward pass.
        step: called with (windows done, windows).

    Raises:
        EvaluationError: a logit is not finite.
    """
    parts: list[list[Tensor]] = []
    vocabulary = 0
    for logs, following in _log_probabilities(model, windows, name, batch_size, step):  # [N, V], [N]
        vocabulary = logs.shape[1]
        top = logs.topk(min(TOP, vocabulary), dim=1).indices  # [N, K]
        kept, rest = _split(logs, top)
        parts.append([logs.argmax(1).int(), top.int(), kept, rest, _losses(logs, following)])
    best, ids, values, rest, losses = (torch.cat([part.cpu() for part in own]) for own in zip(*parts, strict=True))
    shape = (windows.shape[0], windows.shape[1] - 1)
    flat = (best, rest, losses)
    best, rest, losses = (tensor.view(shape) for tensor in flat)
    ids, values = (tensor.view(*shape, -1) for tensor in (ids, values))
    return Answers(best, ids, values, rest, losses, torch.tensor([vocabulary]))


def compare(
    model: Any,
    windows: Tensor,
    dense: Answers,
    *,
    name: str,
    batch_size: int = 1,
    step: Step = lambda *_: None,
) -> Compared:
    """Hold a model against a dense one's answers to the same windows.

    The divergence is sum p (log p - log q) over the dense model's likeliest tokens, plus the same of the rest as if
    that were one token. By the log-sum inequality (Cover and Thomas, Theorem 2.7.1) it is never more than the whole
    KL(p || q): what the two disagree on within the rest is not seen.

    Args:
        model: the other model.
        windows: those of ``dense``, int64 [W, T].
        dense: its answers.
        name: the other model's, for people.
        batch_size: windows in a forward pass.
        step: called with (windows done, windows).

    Raises:
        EvaluationError: a logit is not finite, or the models tell different numbers of tokens apart.
    """
    top, logs = dense.top.flatten(0, 1).long(), dense.logs.flatten(0, 1)
    rest, best = dense.rest.flatten(), dense.best.flatten()
    parts: list[list[Tensor]] = []
    place = 0
    for own, following in _log_probabilities(model, windows, name, batch_size, step):
        if own.shape[1] != (known := int(dense.vocabulary)):
            raise EvaluationError(
                f"{name} tells {own.shape[1]:,} tokens apart and the dense model {known:,}; only models of one "
                "vocabulary can be compared token by token."
            )
        here = slice(place, place := place + len(own))
        kept, other = (tensor.cpu() for tensor in _split(own, top[here].to(own.device)))
        same = own.argmax(1).cpu() == best[here]
        parts.append([_divergence(logs[here], rest[here], kept, other), same, _losses(own, following).cpu()])
    shape = (windows.shape[0], windows.shape[1] - 1)
    found = (torch.cat(own).view(shape) for own in zip(*parts, strict=True))
    return Compared(*found)


def _divergence(logs: Tensor, rest: Tensor, own: Tensor, own_rest: Tensor) -> Tensor:
    """KL over K + 1 buckets, float64 [N], of log-probabilities [N, K] and [N]; rounding may not make it negative."""
    p = torch.cat((logs, rest[:, None]), 1).double()
    q = torch.cat((own, own_rest[:, None]), 1).double()
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))  # 0 log 0 is 0
    return terms.sum(1).clamp(min=0)


def _split(logs: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, V] -> those of some tokens [N, K], and the log of what all others have together [N]."""
    return logs.gather(1, top), logs.scatter(1, top, -torch.inf).logsumexp(1)


def _losses(logs: Tensor, following: Tensor) -> Tensor:
    return -logs.gather(1, following[:, None])[:, 0]  # [N]


@torch.no_grad()
def _log_probabilities(
    model: Any, windows: Tensor, name: str, batch_size: int, step: Step
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [N, V] and the token that comes [N], in the order of the places of all windows."""
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size].to(model.device)  # [B, T]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T-1, V]
            if not bool(logits.isfinite().all()):
                raise EvaluationError(
                    f"{name} gives logits that are not finite (NaN or infinite) in window {start + 1} of "
                    f"{len(windows)}; load it with --dtype float32, and check its weights."
                )
            for own, following in zip(logits, ids[:, 1:], strict=True):
                places = max(1, _LOGITS // own.shape[1])
                for part, tokens in zip(own.split(places), following.split(places), strict=True):
                    yield part.float().log_softmax(1), tokens
            step(min(start + batch_size, len(windows)), len(windows))
