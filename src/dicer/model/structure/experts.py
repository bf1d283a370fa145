"""Experts found by difference: whole ones by the key that counts them, neurons inside by the width of their maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from typing import Any

import torch

from dicer.errors import UnknownFamily
from dicer.model.structure.layers import Layers
from dicer.model.structure.neurons import Group, expert_of, factor
from dicer.model.structure.probe import stepped
from dicer.model.structure.skeleton import Shape, Skeleton, build, changed, flat_values, on_disk
from dicer.model.units import Axis, Slice

# Names of one key in turns; where a config has several of them, they say the same.
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN_GROUPS = ("topk_group", "num_limited_groups")
_INPUTS = ("gate_up_proj", "up_proj")
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attn|attention)\.")
EXPERT_NEURONS = "mlp.experts"  # what the neurons inside all experts are called together
Rename = Callable[[str], str]
Roles = Callable[[Group, Mapping[str, Shape], Rename], tuple[Slice, ...]]


@dataclass(frozen=True)
class ExpertKeys:
    """What a config says of experts.

    Attributes:
        counts: paths of the keys that count them; all say the same.
        count: how many there are.
        chosen: path of the key that says to how many a token is sent (or what the router calls it).
        top_k: how many that is.
        groups: experts lie in so many groups, of which a token takes some; each keeps the same number.
        chosen_groups: how many a token takes.
    """

    counts: tuple[str, ...]
    count: int
    chosen: str
    top_k: int
    groups: int = 1
    chosen_groups: int = 1

    @property
    def least(self) -> int:
        """The fewest that may stay: those that a token is sent to must be there, in the groups that it takes.

        Routers that score a group look at its best two.
        """
        in_group = max(-(-self.top_k // self.chosen_groups), 2 if self.groups > 1 else 1)
        return max(self.top_k, in_group * self.groups)


def expert_keys(sample: Skeleton) -> ExpertKeys | None:
    """The keys that speak of experts, or None where there are none.

    Raises:
        UnknownFamily: it is not said to how many a token is sent.
    """
    values = flat_values(sample.config)
    counts = [path for path in values if path.rpartition(".")[2] in COUNT_KEYS and _number(values[path]) > 1]
    if not counts:
        return None
    outer = counts[-1].rpartition(".")[0]  # the text part of a multimodal model
    prefix = f"{outer}." if outer else ""
    counts = [path for path in counts if path.rpartition(".")[0] == outer]
    chosen = next((prefix + key for key in _CHOSEN if _number(values.get(prefix + key))), "")
    top_k = _number(values[chosen]) if chosen else _router_top_k(sample)
    if not top_k:
        raise UnknownFamily(f"it has {counts[0]}, and nothing says to how many of them a token is sent.")
    groups = next((n for key in _GROUPS if (n := _number(values.get(prefix + key)))), 1)
    taken = next((n for key in _CHOSEN_GROUPS if (n := _number(values.get(prefix + key)))), groups)
    return ExpertKeys(tuple(counts), _number(values[counts[0]]), chosen or "top_k", top_k, groups, min(taken, groups))


def _number(value: Any) -> int:
    """A number that a config says, the largest of a list, 0 where there is none."""
    if isinstance(value, list | tuple):
        return max(map(_number, value), default=0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _router_top_k(sample: Skeleton) -> int:
    found = (getattr(module, "top_k", None) for name, module in sample.model.named_modules() if "." in name)
    return max(map(_number, found), default=0)


def _changes(sample: Skeleton, kind: Any, keys: ExpertKeys) -> tuple[dict[str, tuple[int, Fraction]], list[str]]:
    """(name -> (dim, rows an expert), names that appear) when there are more experts.

    Raises:
        UnknownFamily: the class takes no other number, or a tensor is otherwise than by one dimension.
    """
    values = flat_values(sample.config)
    more = {path: stepped(values[path], keys.groups) for path in keys.counts}
    try:
        other = build(changed(sample.config, more), kind).shapes
    except Exception as error:  # whatever a class raises of a config that it does not take
        raise UnknownFamily(f"its class takes no other {keys.counts[0]}: {type(error).__name__}.") from None
    if gone := [name for name in sample.shapes if name not in other]:
        raise UnknownFamily(f"'{gone[0]}' is gone when there are more experts.")
    found = {}
    for name, before in sample.shapes.items():
        after = other[name]
        dims = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(dims) > 1 or len(before) != len(after):
            raise UnknownFamily(f"'{name}' changes in several dimensions with the number of experts.")
        if dims:
            found[name] = dims[0], Fraction(after[dims[0]] - before[dims[0]], keys.groups)
    return found, [name for name in other if name not in sample.shapes]


def inputs_of(module: Any) -> str:
    """The tensor that maps into the neurons of all experts of a module; empty where it has no such, or none out."""
    held = [name for name in (*_INPUTS, "down_proj") if isinstance(getattr(module, name, None), torch.Tensor)]
    return held[0] if len(held) > 1 and held[-1] == "down_proj" else ""


def find_experts(sample: Skeleton, kind: Any, layers: Layers, keys: ExpertKeys) -> dict[int, list[Slice]]:
    """Layer of the sample -> every tensor in it that has something of each expert.

    A tensor with rows of all of them has its dimension; the tensors of one's own have ``{}`` for the number, and -1.

    Raises:
        UnknownFamily: with the reason why whole experts cannot be told apart from the rest.
    """
    rows, new = _changes(sample, kind, keys)
    placed: dict[int, dict[str, Slice]] = {}
    for name in [*rows, *new]:
        place = layers.locate(name)
        if place is None:
            raise UnknownFamily(f"'{name}' has a row for each expert, and lies outside the decoder layers.")
        if _ATTENTION.search(place[1]):
            raise UnknownFamily(f"attention has experts as well ('{name}').")
        piece = (
            _own(place[1], keys.count) if name in new else _row(name, place[1], sample.shapes[name], *rows[name], keys)
        )
        placed.setdefault(place[0], {})[piece.name] = piece
    for name in sample.whole_numbers:
        if (place := layers.locate(name)) and place[0] in placed:
            raise UnknownFamily(
                f"'{name}' is a table of whole numbers, in which tokens may have experts by their number."
            )
    for layer, pieces in placed.items():
        if not any(piece.roles[0].startswith("router") for piece in pieces.values()):
            raise UnknownFamily(f"no router has a row for each expert of layer {layer}.")
    return {layer: list(pieces.values()) for layer, pieces in placed.items()}


def _own(name: str, experts: int) -> Slice:
    """A tensor that an expert has for itself, from the name of the first one that was not there."""
    for match in reversed([*_NUMBER.finditer(name)]):
        if int(match[1]) >= experts:
            role = "expert_bias" if name.endswith("bias") else "expert"
            return Slice(f"{name[: match.start()]}{{}}{name[match.end() :]}", -1, (role,))
    raise UnknownFamily(f"'{name}' appears with more experts, and has none's number.")


def _row(full: str, name: str, shape: Shape, dim: int, rate: Fraction, keys: ExpertKeys) -> Slice:
    if rate.denominator != 1 or shape[dim] != rate * keys.count:
        raise UnknownFamily(
            f"'{full}' has {shape[dim]} rows for {keys.count} experts: others that are none (zero or skip experts) "
            "share the router."
        )
    if len(shape) - (1 in shape) > 2 or rate > 1:
        return Slice(name, dim, ("expert",), (int(rate),))
    ending = "_bias" if name.endswith("bias") else ""
    role = "expert" if "experts" in name.split(".") else "router"
    return Slice(name, dim, (role + ending,), (int(rate),))


def units_in(piece: Slice, tensors: Mapping[str, Shape]) -> Fraction:
    """How many units a layer's tensors have of a slice; 0 where it is not there."""
    if piece.dim == -1:
        first = next((i for i in count() if piece.name.format(i) not in tensors), 0)
        return Fraction(first)
    return Fraction(tensors[piece.name][piece.dim], sum(piece.blocks)) if piece.name in tensors else Fraction(0)


def expert_axes(
    sample: Skeleton,
    kind: Any,
    layers: Layers,
    groups: Mapping[int, Sequence[Group]],
    roles: Roles,
    memory: Callable[[int], Rename],
) -> tuple[list[tuple[Axis, Fraction]], dict[str, str]]:
    """The axes of a model's experts, with what each has for one of its key, and why there are none of whole ones.

    Args:
        sample: a model with one layer of each kind.
        kind: its class.
        layers: where they are in the sample.
        groups: its MLPs, those of experts among them.
        roles: makes slices of an MLP's tensors, as for MLPs that are none's.
        memory: layer -> (name on disk inside it -> name in memory, empty where they are one).
    """
    inside = layers.inside(sample.shapes)
    neurons: dict[int, list[tuple[Axis, Fraction]]] = {}
    refused: dict[str, str] = {}
    for layer, found in groups.items():
        own = [g for g in found if expert_of(g.down, inside[layer][g.down]) is not None and "shared" not in g.down]
        for group in own:
            slices = roles(group, inside[layer], memory(layer))
            if why := _unreadable(sample, f"{layers.module}.{layer}", slices):
                refused[EXPERT_NEURONS] = why
                continue
            neurons.setdefault(layer, []).extend(_inside_experts(sample, layers, layer, group, slices, inside[layer]))
    found_axes = [pair for pairs in neurons.values() for pair in pairs]
    try:
        keys = expert_keys(sample)
        whole = find_experts(sample, kind, layers, keys) if keys else {}
    except UnknownFamily as error:
        return _named(found_axes), refused | {"experts": str(error)}
    for layer, pieces in whole.items():
        routed = next((axis.routed for axis, _ in neurons.get(layer, ())), None)
        if routed is not None and keys is not None:
            known = [piece for axis, _ in neurons[layer] for piece in axis.slices]
            found_axes.append((_whole(pieces, keys, routed, known, memory(layer)), Fraction(1)))
    return _named(found_axes), refused


def _unreadable(sample: Skeleton, layer: str, slices: Sequence[Slice]) -> str:
    """Why nothing can be read of experts where their tensors lie; empty where it can."""
    module = sample.model.get_submodule(f"{layer}.{_routed(slices)}")
    if inputs_of(module):
        return ""
    return f"its experts (a {type(module).__name__}) do not lie side by side in gate_up_proj and down_proj"


def _routed(slices: Sequence[Slice]) -> str:
    """The module, inside a layer, that holds the maps of an MLP's experts."""
    return (slices[-1].memory or slices[-1].name).removesuffix(".weight").rpartition(".")[0]


def _named(pairs: Sequence[tuple[Axis, Fraction]]) -> list[tuple[Axis, Fraction]]:
    """Without those that are the same in several layers; where others are of one name, it says which kind of layer."""
    found: list[tuple[Axis, Fraction]] = []
    for axis, share in pairs:
        alike = [other for other, _ in found if re.fullmatch(rf"{re.escape(axis.name)}(\.\d+)?", other.name)]
        if not any(replace(other, name=axis.name) == axis for other in alike):
            found.append((replace(axis, name=f"{axis.name}.{len(alike) + 1}") if alike else axis, share))
    return found


def _inside_experts(
    sample: Skeleton, layers: Layers, layer: int, group: Group, slices: tuple[Slice, ...], shapes: Mapping[str, Shape]
) -> list[tuple[Axis, Fraction]]:
    """An axis for the neurons of one expert, or for those of each where one tensor holds them all."""
    number = expert_of(group.down, shapes[group.down])
    down, routed = slices[-1].memory or slices[-1].name, _routed(slices)
    module = sample.model.get_submodule(f"{layers.module}.{layer}.{routed}")
    activation = next(
        (f"{routed}.{name}" for name in ("act_fn", "activation_fn", "act") if hasattr(module, name)), None
    )
    output = down.removesuffix(".weight")

    def axis(expert: int, own: tuple[Slice, ...]) -> Axis:
        name = f"mlp.expert{expert}"
        return Axis(name, (group.key,), own, (routed,), activation, output, routed=routed)

    if number != -1:
        return [(axis(int(number or 0), slices), factor(group))]
    path = f"{layers.module}.{layer}"
    turned = [replace(s, interleaved=len(s.roles) > 1 and _in_turns(sample.model, module, path, s)) for s in slices]
    experts = range(shapes[group.down][0])
    return [(axis(e, tuple(replace(s, expert=e) for s in turned)), factor(group)) for e in experts]


def _in_turns(model: Any, module: Any, layer: str, piece: Slice) -> bool:
    """Whether rows of gate and up take turns on disk: the class says so of memory, and a conversion may change it."""
    turns = not getattr(module, "is_concatenated", True)
    if not piece.memory:
        return turns
    name = f"{layer}.{piece.memory}"
    shape = [1, *model.get_parameter(name).shape[1:]] if not piece.optional else []
    for dim in range(1, len(shape)):
        marks = torch.arange(shape[dim]).reshape([-1 if i == dim else 1 for i in range(len(shape))])
        try:
            (found,) = on_disk(model, {name: marks}).values()
        except Exception:  # whatever a conversion raises of a tensor that is thinner than it should be
            continue
        order = found.flatten().tolist()
        if order == list(range(len(order))):
            continue
        return order[:2] == [0, len(order) // 2]
    return turns


def _whole(pieces: Sequence[Slice], keys: ExpertKeys, routed: str, known: Sequence[Slice], memory: Rename) -> Axis:
    """The axis whose units are experts; their maps have the roles that their neurons gave them."""
    roles = {_NUMBER.sub("{}", piece.name) if piece.expert is None else piece.name: piece.roles for piece in known}
    slices = []
    for piece in pieces:
        found = roles.get(piece.name)
        joined = "up" if found and len(found) > 1 else found[0].removesuffix("_bias") if found else "expert"
        bias = "_bias" if piece.optional else ""
        role = piece.roles[0] if piece.roles[0].startswith("router") else joined + bias
        name = memory(piece.name.replace("{}", "0"))
        slices.append(replace(piece, roles=(role,), memory=name))
    return Axis(
        "experts",
        keys.counts,
        tuple(slices),
        (routed,),
        None,
        routed,
        routed=routed,
        parts=keys.groups,
        least=keys.least,
    )
