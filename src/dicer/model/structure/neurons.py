"""Neurons found by difference: keys that, module by module, the outputs of maps follow and the inputs of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dicer.model.structure.layers import Layers
from dicer.model.structure.probe import STEP, Change, by_layer, followers, stepped
from dicer.model.structure.skeleton import Shape, Skeleton, flat_values

# Keys of attention, of state spaces and of the whole, which no MLP's width goes by: they need not be tried.
_OTHERS = re.compile(
    r"(^|_)(heads?|head_dim|kv|rank|groups?|conv|kernel|chunk|window|ctx|vocab|positions?|layers?|topk|top_k|per_tok"
    r"|per_token|experts|embd|embeddings?|emb_dim|d_model|dim_model|qk|state|d_ssm|index|indexer|stacks?|seq_len|rel"
    r"|extent|channels|shape|length|lora|blocks?|cycles?|moe_k)(_|$|\d)|token_id|^hidden_size$"
)
_WIDTH = re.compile(r"intermediate|(^|_)ff(n|_|$)|feed_forward")
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """The tensors of one MLP inside a layer (or of one expert, or of experts that lie in one tensor).

    Attributes:
        key: path of the config key that its width goes by.
        outputs: name inside the layer -> how it follows the key; the maps into the neurons, and their biases.
        down: name of the map out of the neurons.
        change: how that follows the key.
    """

    key: str
    outputs: dict[str, Change]
    down: str
    change: Change

    @property
    def names(self) -> list[str]:
        """All its tensors."""
        return [*self.outputs, self.down]


def width_keys(sample: Skeleton) -> list[str]:
    """Keys that may be widths: numbers, or lists of one number, that no other word speaks of."""
    found = []
    for key, value in flat_values(sample.config).items():
        alike = isinstance(value, list) and value and len({*map(str, value)}) == 1 and len(value) > 1
        number = value[0] if alike else value
        if isinstance(number, int) and not isinstance(number, bool) and number > 1:
            last = key.rpartition(".")[2].lower()
            if _WIDTH.search(last) or not _OTHERS.search(last):
                found.append(key)
    return found


def find_groups(sample: Skeleton, kind: Any, layers: Layers) -> dict[int, list[Group]]:
    """Layer of the sample -> its MLPs.

    Args:
        sample: a model with one layer of each kind.
        kind: its class.
        layers: where they are in the sample.
    """
    inside = layers.inside(sample.shapes)
    values = flat_values(sample.config)
    groups: dict[int, list[Group]] = {}
    for key in width_keys(sample):
        found = followers(sample, kind, {key: stepped(values[key], STEP)}, STEP)
        placed = by_layer(layers, found) if found else None
        for layer, changes in (placed or {}).items():
            groups.setdefault(layer, []).extend(_split(key, changes, inside[layer]))
    return groups


def _split(key: str, changes: Mapping[str, Change], shapes: Mapping[str, Shape]) -> list[Group]:
    """The tensors of one layer, taken apart into MLPs that have one map out of the neurons each."""
    downs = [name for name, change in changes.items() if _is_down(name, change, changes, shapes)]
    parts = {down: _container(down) for down in downs}
    if len({*parts.values()}) < len(downs):
        return []  # two maps out of the neurons in one module
    if len(downs) == 1:
        parts = {downs[0]: ""}
    found = []
    for down, container in parts.items():
        own = {n: c for n, c in changes.items() if n == down or not container or n.startswith(f"{container}.")}
        nested = [other for other in parts.values() if other != container and other.startswith(f"{container}.")]
        own = {n: c for n, c in own.items() if not n.startswith(tuple(f"{other}." for other in nested))}
        outputs = {n: c for n, c in own.items() if n != down}
        weights = [n for n in outputs if len(shapes[n]) == len(shapes[down])]
        even = all((c.rate / own[down].rate).denominator == 1 for c in outputs.values())
        if weights and even:
            found.append(Group(key, outputs, down, own[down]))
    return found


def _container(name: str) -> str:
    """The module that holds a map: ``mlp`` of ``mlp.down_proj.weight``, ``experts`` of ``experts.down_proj``."""
    module = name.removesuffix(".weight")
    return module.rpartition(".")[0]


def _is_down(name: str, change: Change, changes: Mapping[str, Change], shapes: Mapping[str, Shape]) -> bool:
    """Whether the neurons are this tensor's inputs."""
    shape = shapes[name]
    batched = any(len(shapes[n]) == 3 and _container(n) == _container(name) for n in changes)
    if len(shape) < 2 or (len(shape) == 2 and batched):  # a bias of one map, or of all experts'
        return False
    if len(shape) == 2:
        return change.dim == (0 if is_transposed(name, changes, shapes) else 1)
    least = min(c.rate for n, c in changes.items() if len(shapes[n]) == 3 and _container(n) == _container(name))
    most = max(c.rate for n, c in changes.items() if len(shapes[n]) == 3 and _container(n) == _container(name))
    if least != most:  # gate and up lie in one tensor, so twice as many rows of it follow
        return change.rate == least
    return change.dim == 2  # of [E, U, d] and [E, d, U] the second


def is_transposed(name: str, changes: Mapping[str, Change], shapes: Mapping[str, Shape]) -> bool:
    """Whether the maps of a module are [inputs, outputs], as GPT-2's are: a bias is then as long as the second side."""
    for other, change in changes.items():
        weight = other.removesuffix("bias") + "weight"
        beside = _container(weight) == _container(name) or not _container(name)
        pair = (
            other.endswith(".bias")
            and weight in changes
            and (len(shapes[other]), len(shapes.get(weight, ()))) == (1, 2)
        )
        if beside and pair:
            return changes[weight].dim == 1 and changes[weight].rate == change.rate
    return False


def expert_of(name: str, shape: Shape) -> int | None:
    """The number of the expert that a map is one's own, -1 where it holds all of them, None where it is none's."""
    if len(shape) == 3:
        return -1
    match = _ONE_EXPERT.search(name)
    return int(match[1]) if match else None


def segments(group: Group, name: str) -> int:
    """How many maps lie in one tensor, one after the other or in turns."""
    ratio = group.outputs[name].rate / group.change.rate
    return int(ratio)


def units_of(group: Group, shapes: Mapping[str, Shape]) -> int:
    """How many neurons there are: the inputs of the map out of them."""
    return shapes[group.down][group.change.dim]


def factor(group: Group) -> Fraction:
    """Neurons for each one of the key."""
    return group.change.rate
