"""A config -> its family, found: layers, neurons, heads, the last norm, and their names on disk and in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from torch import nn

from dicer.model.families import Family, Named
from dicer.model.structure.experts import expert_axes, units_in
from dicer.model.structure.family_file import FamilyRow, exception_for
from dicer.model.structure.heads import HeadKeys, find_heads, head_keys, is_output
from dicer.model.structure.layers import Layers, find_layers, sample
from dicer.model.structure.neurons import Group, expert_of, factor, find_groups, segments
from dicer.model.structure.probe import Change
from dicer.model.structure.skeleton import Shape, Skeleton, build, changed, flat_values
from dicer.model.structure.trace import Call, activation, final_norm, returned, trace
from dicer.model.units import Axis, Slice

_GATE = re.compile(r"gate|(^|\.)w1($|\.|_)|w_0$")


def find_family(
    config: Any,
    kind: Any,
    shapes: Mapping[str, Shape] | None = None,
    *,
    row: FamilyRow | None = None,
    where: Layers | None = None,
    whole: Skeleton | None = None,
) -> Family:
    """Find a family by building its class without weights, once for each key that may be a width.

    Args:
        config: a transformers config.
        kind: the class of transformers.
        shapes: of the tensors, by the names that transformers writes; by default those that the class would write.
        row: what a file of the user's says, which goes before what is found.
        where: the layers, where they are known already.
        whole: the class without weights, where it was built already.

    Raises:
        UnknownFamily: it has no list of decoder layers.
        ModelError: the file names a tensor that is not there.
    """
    whole, said = whole or build(config, kind), row
    row = row or exception_for(config.model_type)
    text = config.get_text_config()
    layers = where or decoder_layers(whole, kind, row)
    some, chosen = sample(whole, kind, layers)
    inner = replace(layers, count=len(chosen))
    calls = trace(some)
    rows: dict[str, tuple[Axis, Fraction]] = {}
    heads = find_heads(some, kind, inner)
    for axis in _head_axes(some, inner, heads):
        rows[axis.name] = axis, Fraction(1)
    groups = find_groups(some, kind, inner)
    for axis, share in _neuron_axes(some, inner, groups, calls):
        rows[axis.name] = axis, share
    memory = cache(partial(_inner_memory, some, inner))
    of_experts, no_experts = expert_axes(some, kind, inner, groups, _neuron_slices, memory)
    rows |= {axis.name: (axis, share) for axis, share in of_experts}
    stock = layers.inside(whole.shapes)
    inside = stock if shapes is None else layers.inside(shapes)
    if row is not None:
        row.check([*inside, *stock], config)  # of what was pruned, all of an axis may be gone
        rows |= {
            name: (_sized(own.axis(name), config), Fraction(own.factor)) for name, own in row.axes.items() if own.slices
        }
    rows = dict(sorted(rows.items(), key=lambda item: not item[0].startswith("attention")))  # as a layer runs them
    options = _bias_options(some, kind, inner, [axis for axis, _ in rows.values()])
    rows |= {name: (replace(rows[name][0], bias_option=key), rows[name][1]) for name, key in options.items()}
    own_keys = heads[0] if heads else None
    counts = {
        name: tuple(
            _count(axis, now) if _fits(axis, before, own_keys) else 0 for now, before in zip(inside, stock, strict=True)
        )
        for name, (axis, _) in rows.items()
    }
    learned = any(
        isinstance(part, nn.Embedding)
        and abs(part.num_embeddings - (getattr(text, "max_position_embeddings", 0) or -9)) <= 2
        for name, part in whole.model.named_modules()
        if not re.search(r"vision|visual|audio", name) and part is not whole.model.get_input_embeddings()
    )
    return Family(
        **asdict(Named.of(config, kind)),
        layers=layers.module,
        final_norm=final_norm(some, calls, inner.module, inner.count) or "",
        axes=MappingProxyType({name: axis for name, (axis, _) in rows.items()}),
        learned_positions=learned,
        returned=returned(some, f"{inner.module}.0"),
        where=layers,
        counts=counts,
        biases=tuple(
            frozenset(n for n, (axis, _) in rows.items() if axis.output_bias in now and axis.output_bias not in before)
            for now, before in zip(inside, stock, strict=True)
        ),
        factors={name: share for name, (_, share) in rows.items()},
        heads=heads[0] if heads else None,
        sets={name: own.set for name, own in row.axes.items()} if row else {},
        refused=no_experts | (_refused(row) if row else {}),
        said=said,
    )


def decoder_layers(whole: Skeleton, kind: Any, row: FamilyRow | None) -> Layers:
    """Where the decoder layers are, as a file says, or else as they are found.

    Raises:
        UnknownFamily: neither is so.
    """
    return (row.where(whole.config) if row else None) or find_layers(whole, kind)


def _sized(axis: Axis, config: Any) -> Axis:
    """An axis of a file with as many rows for each head as the config says, where heads have no say of their own."""
    keys = head_keys(config) if axis.fixed else None
    return axis if keys is None else axis.sized(keys.per_group * keys.head, keys.head)


def _bias_options(some: Skeleton, kind: Any, layers: Layers, axes: list[Axis]) -> dict[str, str]:
    """Axis -> the switch that gives its output projection a bias, and other tensors nothing but its own maps'."""
    found = {}
    for key, value in flat_values(some.config).items():
        if value is not False or "bias" not in key.rpartition(".")[2]:
            continue
        try:
            other = build(changed(some.config, {key: True}), kind)
        except Exception:  # whatever a class raises of a config that it does not take
            continue
        new = {place[1] if (place := layers.locate(n)) else n for n in other.shapes.keys() - some.shapes.keys()}
        for axis in axes:
            if axis.output_bias in new <= {piece.bias for piece in axis.required}:
                found[axis.name] = key
    return found


def _refused(row: FamilyRow) -> dict[str, str]:
    blocks = {"block": row.refuse_blocks} if row.refuse_blocks else {}
    return blocks | {name: own.refuse for name, own in row.axes.items() if own.refuse}


def _fits(axis: Axis, tensors: Mapping[str, Shape], heads: HeadKeys | None) -> bool:
    """Whether a layer of the stock class has heads of this make: larger ones in other layers have the same names."""
    return not axis.name.startswith("attention") or heads is None or _count(axis, tensors) == heads.count


def _count(axis: Axis, tensors: Mapping[str, Shape]) -> int:
    """Units of an axis in a layer; 0 where one of its maps is not there, or they are of another make."""
    counts = {count for piece in axis.slices if (count := units_in(piece, tensors)) or not piece.optional}
    count = counts.pop()
    return int(count) if not counts and count.denominator == 1 else 0


def memory_names(model: Any) -> Callable[[str], str]:
    """Name on disk -> name in memory of what transformers makes of a tensor, or makes it a part of, in loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]


def _inner_memory(some: Skeleton, layers: Layers, layer: int) -> Callable[[str], str]:
    """The same for names inside a layer; empty where the two are one."""
    rename = memory_names(some.model)

    def inner(name: str) -> str:
        full = rename(f"{layers.disk}.{layer}.{name}")
        found = full.removeprefix(f"{layers.module}.{layer}.")
        return "" if found == name else found

    return inner


def _head_axes(
    some: Skeleton, layers: Layers, found: tuple[HeadKeys, Mapping[int, Mapping[str, Change]]] | None
) -> list[Axis]:
    if found is None:
        return []
    keys, placed = found
    inside, rows = layers.inside(some.shapes), {}
    for layer, changes in placed.items():
        memory = _inner_memory(some, layers, layer)
        output = next(name for name, change in changes.items() if is_output(name, change, changes, inside[layer]))
        slices = [
            _head_slice(name, change, len(inside[layer][name]), keys, memory(name))
            for name, change in changes.items()
            if name != output
        ]
        blocks = (int(changes[output].rate),)
        slices.append(Slice(output, changes[output].dim, ("output",), blocks, memory=memory(output)))
        module = (memory(output) or output).removesuffix(".weight")
        keys_of = (keys.queries, keys.groups) if keys.groups else (keys.queries,)
        rows[tuple(slices)] = Axis(
            "attention",
            keys_of,
            tuple(slices),
            (module.rpartition(".")[0],),
            None,
            module,
            returns=2,
            size_key=keys.size,
        )
    axes = list(rows.values())
    # Layers whose attention is of another kind have an axis of their own.
    return [axis if i == 0 else replace(axis, name=f"attention.{i + 1}") for i, axis in enumerate(axes)]


def _head_slice(name: str, change: Change, dims: int, keys: HeadKeys, memory: str) -> Slice:
    rate, queries = int(change.rate), keys.per_group * keys.head
    suffix = "_bias" if dims == 1 else ""
    letter = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if rate == (keys.per_group + 2) * keys.head and re.search("qkv|query_key_value|c_attn|Wqkv", letter):
        roles = tuple(role + suffix for role in ("query", "key", "value"))
        return Slice(name, change.dim, roles, (queries, keys.head, keys.head), memory=memory)
    role = "query" if re.match(r"q|wq", letter) else "value" if re.match(r"v|wv", letter) else "key"
    return Slice(name, change.dim, (role + suffix,), (rate,), memory=memory)


def _neuron_axes(
    some: Skeleton, layers: Layers, groups: Mapping[int, list[Group]], calls: list[Call]
) -> list[tuple[Axis, Fraction]]:
    inside = layers.inside(some.shapes)
    rows: dict[tuple[Slice, ...], tuple[Axis, Fraction]] = {}
    for layer, found in groups.items():
        memory = _inner_memory(some, layers, layer)
        for group in found:
            if expert_of(group.down, inside[layer][group.down]) is not None:
                continue  # experts have axes of their own
            slices = _neuron_slices(group, inside[layer], memory)
            if slices in rows:
                continue
            down = slices[-1].memory or slices[-1].name
            module = down.removesuffix(".weight")
            parts = _modules([memory(name) or name for name in group.names], down)
            units = inside[layer][group.down][group.change.dim]
            path, owner = f"{layers.module}.{layer}", "" if len(parts) > 1 else f"{module.rpartition('.')[0]}."
            act = activation(some, calls, path, units, owner)
            name = _name(group, {axis.name for axis, _ in rows.values()})
            rows[slices] = Axis(name, (group.key,), slices, parts, act, module), factor(group)
    return list(rows.values())


def _modules(names: Sequence[str], down: str) -> tuple[str, ...]:
    """What makes up an MLP in memory: the module that holds its maps, or the maps where the layer itself does."""
    maps = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names)
    holders = {name.rpartition(".")[0] for name in maps}
    if len(holders) == 1 and "" not in holders:
        return (holders.pop(),)
    last = down.removesuffix(".weight")
    first, *rest = [m for m in maps if m != last] or [""]
    return (first, *rest, last)


def _name(group: Group, taken: set[str]) -> str:
    """``mlp``, ``mlp.shared`` for experts that all tokens see, or with the module's name where there are several."""
    if "shared" in group.down:
        return "mlp.shared"
    if "mlp" not in taken:
        return "mlp"
    return "mlp." + group.down.removesuffix(".weight").rpartition(".")[0].replace(".", "_")


def _neuron_slices(group: Group, shapes: Mapping[str, Shape], memory: Callable[[str], str]) -> tuple[Slice, ...]:
    weights = [name for name in group.outputs if len(shapes[name]) == len(shapes[group.down])]
    slices = []
    for name, change in group.outputs.items():
        count = segments(group, name)
        bias = "" if name in weights else "_bias"
        gated = len(weights) > 1 and _GATE.search(name)
        roles = ("gate", "up") if count == 2 else ("gate",) if gated else ("up",) * count
        slices.append(Slice(name, change.dim, tuple(r + bias for r in roles), (1,) * count, memory=memory(name)))
    slices.sort(key=lambda piece: (piece.roles[0].removesuffix("_bias") != "gate", piece.roles[0]))
    slices.append(Slice(group.down, group.change.dim, ("down",), memory=memory(group.down)))
    return tuple(slices)
