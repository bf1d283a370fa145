"""Key-value groups found by difference: one group fewer, its queries with it and the size of a head as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dicer.model.structure.layers import Layers
from dicer.model.structure.probe import Change, by_layer, followers
from dicer.model.structure.skeleton import Shape, Skeleton, flat_values

_QUERIES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")


@dataclass(frozen=True)
class HeadKeys:
    """What a config says of heads.

    Attributes:
        queries: path of the key that counts query heads.
        groups: path of the key that counts key-value heads; None where there are as many as query heads.
        size: path of the key that says how large a head is.
        head: that size.
        count: how many groups there are.
        per_group: query heads of one group.
        scaled: the config has rotary factors of its own.
    """

    queries: str
    groups: str | None
    size: str
    head: int
    count: int
    per_group: int
    scaled: bool = False

    def of(self, groups: int) -> dict[str, int]:
        """What a config says of another number of groups."""
        said = {self.queries: groups * self.per_group, self.size: self.head}
        return said | ({self.groups: groups} if self.groups else {})

    def tried(self, groups: int) -> dict[str, Any]:
        """The same for a model that is only built: without rotary factors, which some want for hidden size / heads."""
        outer = self.size.rpartition(".")[0]
        rope = f"{outer}.rope_parameters" if outer else "rope_parameters"
        return self.of(groups) | ({rope: None} if self.scaled else {})


def head_keys(config: Any) -> HeadKeys | None:
    """The keys that speak of heads, or None where there are none, or they do not fit together."""
    values = flat_values(config)

    def first(names: tuple[str, ...]) -> str | None:
        paths = [path for name in names for path in (f"text_config.{name}", name) if isinstance(values.get(path), int)]
        return paths[0] if paths else None

    queries, groups = first(_QUERIES), first(_GROUPS)
    if queries is None:
        return None
    outer = queries.rpartition(".")[0]
    prefix = f"{outer}." if outer else ""
    count = values[groups] if groups else values[queries]
    hidden = values.get(f"{prefix}hidden_size") or values.get(f"{prefix}n_embd") or values.get(f"{prefix}d_model") or 0
    head = values.get(f"{prefix}head_dim") or hidden // max(values[queries], 1)
    if not count or values[queries] % count or not head:
        return None
    rope = values.get(f"{prefix}rope_parameters") or {}
    scaled = any(isinstance(value, list) for value in rope.values())
    return HeadKeys(queries, groups, f"{prefix}head_dim", head, count, values[queries] // count, scaled)


def find_heads(sample: Skeleton, kind: Any, layers: Layers) -> tuple[HeadKeys, dict[int, dict[str, Change]]] | None:
    """The tensors of each layer that groups run through, or None where no shape follows them as it should.

    Args:
        sample: a model with one layer of each kind.
        kind: its class.
        layers: where they are in the sample.
    """
    keys = head_keys(sample.config)
    if keys is None:
        return None
    for more in (1, 2, keys.count):  # some classes ask for an even number, or for a multiple
        found = followers(sample, kind, keys.tried(keys.count + more), more)
        placed = by_layer(layers, found) if found else None
        if placed and all(_fits(changes, layers.inside(sample.shapes)[i], keys) for i, changes in placed.items()):
            return keys, placed
    return None


def _fits(changes: Mapping[str, Change], shapes: Mapping[str, Shape], keys: HeadKeys) -> bool:
    """Whether each tensor holds a whole number of rows for each of the groups, and one of them is the output's map."""
    whole = all(
        change.rate.denominator == 1 and change.rate > 0 and shapes[name][change.dim] == change.rate * keys.count
        for name, change in changes.items()
    )
    return whole and sum(is_output(name, change, changes, shapes) for name, change in changes.items()) == 1


def is_output(name: str, change: Change, changes: Mapping[str, Change], shapes: Mapping[str, Shape]) -> bool:
    """Whether the heads' values are this tensor's inputs."""
    from dicer.model.structure.neurons import is_transposed

    if len(shapes[name]) != 2:
        return False
    return change.dim == (0 if is_transposed(name, changes, shapes) else 1)
