"""Heads as units, by loops over what each owns: written down apart from the library's own table."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from tiny import FAMILIES, HIDDEN, LAYERS, PLACES, tiny_model
from torch import Tensor

HEADS, SIZE = 4, 8  # of the tiny models
# (family, key-value heads): grouped queries where a family has them, and single ones where rows lie otherwise.
CASES = [(family, HEADS if family in ("gpt2", "opt") else 2) for family in FAMILIES] + [
    ("llama", HEADS),
    ("phi3", HEADS),
]


def make(family: str, groups: int, **options: Any) -> Any:
    """A tiny model with so many key-value heads."""
    return tiny_model(family, kv_heads=groups, **options)


def layers_of(model: Any, family: str) -> Any:
    """The decoder layers."""
    return attrgetter(PLACES[family][0])(model)


def query_rows(group: int, groups: int) -> list[int]:
    """Rows of the query projection (columns of the output projection) that belong to a key-value head."""
    heads = HEADS // groups
    return [head * SIZE + row for head in range(group * heads, (group + 1) * heads) for row in range(SIZE)]


def matrices(layer: Any, family: str, groups: int, take: Any = lambda parameter: parameter.detach()) -> list[Tensor]:
    """Query, key, value [rows, d] and output [d, columns], cut out of whatever the family has."""
    if family == "gpt2":
        return [*take(layer.attn.c_attn.weight).T.split(HIDDEN), take(layer.attn.c_proj.weight).T]
    attention, output = layer.self_attn, layer.get_submodule(PLACES[family][1])
    if family == "phi3":
        parts = take(attention.qkv_proj.weight).split([HEADS * SIZE, groups * SIZE, groups * SIZE])
        return [*parts, take(output.weight)]
    return [take(part.weight) for part in (attention.q_proj, attention.k_proj, attention.v_proj, output)]


def owned(parts: list[Tensor], group: int, groups: int) -> list[list[Tensor]]:
    """All that a unit owns, by row: queries, keys, values, columns of the output."""
    query, key, value, output = parts
    mine, keys = query_rows(group, groups), range(group * SIZE, (group + 1) * SIZE)
    return [
        [query[row] for row in mine],
        [key[row] for row in keys],
        [value[row] for row in keys],
        [output[:, column] for column in mine],
    ]


@torch.no_grad()
def heads_outputs(model: Any, family: str, batches: Any) -> list[Tensor]:
    """What goes into each layer's output projection in the ordinary forward, float64 [T, channels] for each layer."""
    seen: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    handles = [
        layer.get_submodule(PLACES[family][1]).register_forward_pre_hook(
            lambda _, inputs, index=index: seen[index].append(inputs[0].flatten(0, -2).double())
        )
        for index, layer in enumerate(layers_of(model, family))
    ]
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(found) for found in seen]


def by_unit(values: Tensor, groups: int) -> list[Tensor]:
    """The channels of each unit, [T, C] each."""
    return [values[:, query_rows(group, groups)] for group in range(groups)]
