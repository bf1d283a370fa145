"""How much each layer turns the direction of the hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dicer.errors import RecipeError
from dicer.measure.batches import counted_of
from dicer.measure.stores.store import LayerStore
from dicer.processes import all_reduce, sum_of
from dicer.progress import Progress, silent


@torch.no_grad()
def turning(store: LayerStore, last: int, batches: Sequence[Tensor], progress: Progress = silent) -> list[float]:
    """Mean of ``1 - cos(input, output)`` over the tokens, for every layer up to ``last``; one pass, no logits.

    Args:
        store: where the layers come from.
        last: the last layer to look at.
        batches: int64 [B, T] each.
        progress: called with (stage, done, total).

    Raises:
        RecipeError: hidden states that are not finite.
    """
    recording, counted, found = store.record(batches), counted_of(batches), []
    for index in range(last + 1):
        total, tokens = torch.zeros(1), 0
        with store.layer(index, then=index + 1 if index < last else None) as layer:
            for number, (hidden, counts) in enumerate(zip(recording.hidden, counted, strict=True)):
                args, kwargs = recording.arguments_of(hidden)[index]
                output = recording.hidden[number] = layer(hidden, *args, **kwargs)
                turned = 1 - cosine_similarity(hidden.float(), output.float(), dim=-1)  # [B, T]
                turned = turned.flatten() if counts is None else turned[counts.to(turned.device)]
                total, tokens = total.to(turned.device) + turned.sum(), tokens + len(turned)
        all_reduce(total)
        found.append(float(total) / max(sum_of(tokens), 1))
        if not found[-1] < float("inf"):
            raise RecipeError(
                f"the hidden states behind layer {index} are not finite on this text: try --dtype float32."
            )
        progress("cosine", index + 1, last + 1)
    return found
