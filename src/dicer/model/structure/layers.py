"""The decoder layers of a model: where they are, what kinds there are, and what a config says of each by its number."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dicer.errors import UnknownFamily
from dicer.model.structure.skeleton import Shape, Skeleton, build, changed, flat_values

# Keys that count layers from the front, and from the back.
_FROM_FRONT = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers")
_FROM_BACK = ("num_kv_shared_layers",)
_MORE_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_COUNTS = re.compile(r"layer|(^|\.)(num_blocks|n_blocks|depth)$")
_INDEX_LIST = re.compile(r"layer|idx|indices|_ids$|indexes")


@dataclass(frozen=True)
class Layers:
    """Where the decoder layers are.

    Attributes:
        key: path of the config key that counts them (``num_hidden_layers``, ``text_config.num_hidden_layers``).
        count: how many there are.
        module: path of the list inside the class.
        disk: what their tensors' names begin with in the files, without the number.
        lists: keys beside ``key`` whose value has an item for every layer.
    """

    key: str
    count: int
    module: str
    disk: str
    lists: tuple[str, ...] = ()

    def locate(self, name: str) -> tuple[int, str] | None:
        """(layer, name inside it) of a tensor on disk, or None for one outside the decoder layers."""
        match = re.fullmatch(rf"{re.escape(self.disk)}\.(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def inside(self, shapes: Mapping[str, Shape]) -> list[dict[str, Shape]]:
        """The tensors of each layer: name inside it -> shape."""
        found: list[dict[str, Shape]] = [{} for _ in range(self.count)]
        for name, shape in shapes.items():
            if (place := self.locate(name)) and place[0] < self.count:
                found[place[0]][place[1]] = shape
        return found


def find_layers(whole: Skeleton, kind: Any) -> Layers:
    """The list of modules whose length follows a key of the config.

    Raises:
        UnknownFamily: no key changes the length of one list alone.
    """
    values = flat_values(whole.config)
    for key, count in sorted(values.items(), key=lambda item: _likely(item[0])):
        if isinstance(count, list):  # Nemotron-H counts its layers by the list of their kinds alone
            count = len(count)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1 or not _COUNTS.search(key):
            continue
        lists = [n for n, size in whole.lists.items() if size == count and not re.search(r"\.\d+\.|vision|audio", n)]
        if not lists:
            continue
        try:
            longer = build(
                changed(whole.config, companions(whole.config, key, count, [*range(count), count - 1])), kind
            )
        except Exception:  # whatever a class raises of a config that it does not take
            continue
        follow = [name for name in lists if longer.lists.get(name) == count + 1]
        if follow:
            return replace(_placed(whole, longer, key, count, follow), lists=item_a_layer(whole.config, key, count))
    raise UnknownFamily(
        f"no list of decoder layers is found in a {kind.__name__}: no key of its config changes the length of one. "
        "Say it in a file, and give that with --family FILE.toml."
    )


def _likely(key: str) -> tuple[bool, bool, str]:
    last = key.rpartition(".")[2]
    return (
        "encoder" in last or last.endswith("s_block_type"),
        last not in ("num_hidden_layers", "n_layer", "decoder_layers", "num_layers"),
        key,
    )


def _placed(whole: Skeleton, longer: Skeleton, key: str, count: int, follow: Sequence[str]) -> Layers:
    """The list among several that holds most of the new tensors, and the name that these have on disk."""
    new = [name for name in longer.shapes if name not in whole.shapes]
    prefixes: dict[str, int] = {}
    for name in new:
        for match in re.finditer(rf"\.{count}\.", name):
            prefixes[name[: match.start()]] = prefixes.get(name[: match.start()], 0) + 1
    if not prefixes:
        raise UnknownFamily(
            f"no tensor of a {type(whole.model).__name__} has the number of a decoder layer in its name."
        )
    disk = max(prefixes, key=lambda name: prefixes[name])
    module = max(follow, key=lambda path: (_overlap(path, disk), -len(path)))
    return Layers(key, count, module, disk)


def _overlap(first: str, second: str) -> int:
    """How many of the last segments of two paths are the same."""
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    same = 0
    for a, b in pairs:
        if a != b:
            break
        same += 1
    return same


def _beside(config: Any, key: str) -> dict[str, Any]:
    """The values of the config that a key is in."""
    outer, said = key.rpartition(".")[0], config.to_dict()
    return dict(said[outer] if outer else said)


def item_a_layer(config: Any, key: str, count: int) -> tuple[str, ...]:
    """Keys whose value has an item for every layer; one that lists the layers' numbers has not."""
    found = []
    for name, value in _beside(config, key).items():
        an_item_each = isinstance(value, list | tuple) and len(value) == count
        if an_item_each and not ("layer" in name and list(value) == list(range(count))):
            found.append(name)
    return tuple(found)


def companions(
    config: Any, key: str, count: int, keep: Sequence[int], lists: Collection[str] | None = None
) -> dict[str, Any]:
    """What a config has to say of layers when only some of them stay: path -> value.

    Every list as long as the model is cut, lists of layers' numbers are renumbered, counts from the front or the back
    are lowered, own configs of layers are renumbered. Numbers may repeat, as they do where a layer is added.

    Args:
        config: a transformers config.
        key: the path of the key that counts layers.
        count: how many layers there are.
        keep: which of them stay, ascending.
        lists: keys whose value has an item for every layer; by default those that are as long as the model.
    """
    outer = key.rpartition(".")[0]
    prefix = f"{outer}." if outer else ""
    inside = _beside(config, key)
    lists = item_a_layer(config, key, count) if lists is None else lists
    new: dict[str, Any] = {} if isinstance(inside[key.rpartition(".")[2]], list) else {key: len(keep)}
    for name, value in inside.items():
        if name == "per_layer_config" and isinstance(value, dict):
            own = {int(number): said for number, said in value.items()}
            new[prefix + name] = {f"{i:03d}": own[old] for i, old in enumerate(keep) if old in own}
        elif isinstance(value, list | tuple) and value:
            numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
            distinct = numbers and sorted({*value}) == list(value) and value[-1] < count
            if name in lists and len(value) == count:
                new[prefix + name] = [value[i] for i in keep]
            elif distinct and _INDEX_LIST.search(name):
                new[prefix + name] = [i for i, old in enumerate(keep) if old in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in _FROM_FRONT:
                new[prefix + name] = sum(i < value for i in keep)
            elif name in _FROM_BACK and value:
                new[prefix + name] = sum(i >= count - value for i in keep)
    return new


def with_layers(config: Any, layers: Layers, keep: Sequence[int]) -> Any:
    """A config of a model that has only some of the layers (see :func:`companions`)."""
    return changed(config, companions(config, layers.key, layers.count, keep, layers.lists))


def kinds_of_layers(config: Any, layers: Layers, shapes: Mapping[str, Shape]) -> list[int]:
    """The first layer of every kind: those alike have the same tensors, and the config says the same of them.

    Args:
        config: a transformers config.
        layers: where they are.
        shapes: of the tensors on disk.
    """
    said = _beside(config, layers.key)
    lists = [said[name] for name in layers.lists if len(said[name]) == layers.count]
    indices = [
        {*v}
        for name, v in said.items()
        if isinstance(v, list | tuple) and v and _INDEX_LIST.search(name) and all(isinstance(i, int) for i in v)
    ]
    front = [said[name] for name in _FROM_FRONT if isinstance(said.get(name), int)]
    back = [layers.count - said[name] for name in _FROM_BACK if said.get(name)]
    first: dict[Any, int] = {}
    for i, inside in enumerate(layers.inside(shapes)):
        listed = tuple(str(values[i]) for values in lists)
        kind = (frozenset(inside.items()), listed, tuple(i in found for found in indices))
        first.setdefault((*kind, tuple(i < n for n in front), tuple(i >= n for n in back)), i)
    return sorted(first.values())


def sample(whole: Skeleton, kind: Any, layers: Layers) -> tuple[Skeleton, list[int]]:
    """A model with one layer of each kind, and which layers of the whole these are.

    Where the class makes a layer by its number (a period, say), as many as hold all kinds; else all of them.
    """
    first = kinds_of_layers(whole.config, layers, whole.shapes)
    inside = layers.inside(whole.shapes)
    for keep in (first, [*range(first[-1] + 1)]):
        try:
            fewer = build(with_layers(whole.config, layers, keep), kind)
        except Exception:  # whatever a class raises of a config that it does not take
            continue
        found = replace(layers, count=len(keep)).inside(fewer.shapes)
        if found == [inside[i] for i in keep]:
            return fewer, keep
    return whole, [*range(layers.count)]
