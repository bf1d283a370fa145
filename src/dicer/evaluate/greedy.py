"""Greedy text: how long two models write the same, and which answers have come apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dicer.evaluate.speed import plain_generation
from dicer.measure.stores.resident import evaluating

PROMPTS, TOKENS = 32, 64  # how many, and how many tokens follow each
PROMPT_LENGTH = 64  # tokens
_TOGETHER = 8  # prompts in a forward pass
_LONGEST = 16  # tokens of what is taken for one turn of a loop
_TURNS, _COVERED = 3, 16  # so often it must come, and so many tokens the turns must fill

Step = Callable[[int, int], None]


class Judged(NamedTuple):
    """Another model's greedy text beside the dense one's, one value a prompt.

    Attributes:
        agreed: tokens until the first that differs, the end token included; int64 [P].
        whole: whether all are the same, bool [P].
        loops: whether the text goes round to its last token, bool [P].
        cut_off: whether it finds no end within the limit where the dense model does, bool [P].
    """

    agreed: Tensor
    whole: Tensor
    loops: Tensor
    cut_off: Tensor


def prompts_of(windows: Sequence[Tensor], positions: int) -> Tensor:
    """Prompts out of several texts, as many of each, evenly spread, int64 [P, L].

    Args:
        windows: of each text, int64 [W, T].
        positions: of the model; prompt and answer fit into them.

    Returns:
        ``PROMPTS`` prompts of ``PROMPT_LENGTH`` tokens; fewer where the texts are short, and shorter ones where windows
        or the model are.
    """
    length = max(1, min(PROMPT_LENGTH, positions - TOKENS, *(own.shape[1] for own in windows)))
    share = -(-PROMPTS // len(windows))
    found = []
    for own in windows:
        pieces = own[:, : own.shape[1] // length * length].reshape(-1, length)  # [W * T / L, L]
        places = torch.linspace(0, len(pieces) - 1, min(share, len(pieces))).long()
        found.append(pieces[places])
    return torch.cat(found)[:PROMPTS]


def ends_of(model: Any) -> list[int]:
    """The tokens with which a model ends a text, as its generation config says, else its config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]
    return []


@torch.no_grad()
def write_on(
    model: Any, prompts: Tensor, ends: Sequence[int], *, tokens: int = TOKENS, step: Step = lambda *_: None
) -> Tensor:
    """Let a model write on, the most likely token each time.

    Args:
        model: a causal language model.
        prompts: int64 [P, L].
        ends: tokens that end a text.
        tokens: most that follow.
        step: called with (prompts done, prompts).

    Returns:
        int64 [P, tokens]; -1 behind an end token.
    """
    found = torch.full((len(prompts), tokens), -1)
    with evaluating(model), plain_generation(model, ends):
        for start in range(0, len(prompts), _TOGETHER):
            batch = prompts[start : start + _TOGETHER].to(model.device)
            made = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens)
            made = made[:, batch.shape[1] :].cpu()  # [B, at most tokens]
            found[start : start + len(batch), : made.shape[1]] = _until_end(made, ends)
            step(start + len(batch), len(prompts))
    return found


def _until_end(made: Tensor, ends: Sequence[int]) -> Tensor:
    """Texts [B, N] with -1 behind their first end token, where generate pads."""
    ended = torch.isin(made, torch.tensor(list(ends), dtype=made.dtype))
    behind = ended.cumsum(1) - ended.long() > 0
    return made.masked_fill(behind, -1)


def judge(dense: Tensor, own: Tensor, ends: Sequence[int]) -> Judged:
    """Hold greedy texts against the dense model's, int64 [P, N] each, as :func:`write_on` gives them."""
    differs = dense != own
    first = torch.where(differs.any(1), differs.int().argmax(1), (dense >= 0).sum(1))
    ended, dense_ended = (torch.isin(text, torch.tensor(list(ends))).any(1) for text in (own, dense))
    loops = torch.tensor([looping(text) for text in own.tolist()])
    return Judged(first, ~differs.any(1), loops, dense_ended & ~ended)


def looping(text: Sequence[int]) -> bool:
    """Whether a text, to its last token, repeats one stretch: three times or more, over 16 tokens or more.

    Args:
        text: token ids; one that has ended (-1 behind its end) goes round no more.
    """
    if not text or text[-1] < 0:
        return False
    return any(_same_tail(text, size) >= max(_TURNS * size, _COVERED) for size in range(1, _LONGEST + 1))


def _same_tail(text: Sequence[int], size: int) -> int:
    """How many of the last tokens repeat with this period."""
    same = 0
    while same + size < len(text) and text[-1 - same] == text[-1 - same - size]:
        same += 1
    return same + size
