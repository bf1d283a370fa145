"""What each layer of a checkpoint has that its class would not give it: the list ``pruned`` in ``config.json``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from dicer.errors import PlanError
from dicer.model.families import Family
from dicer.model.shapes import LayerShape
from dicer.model.source import ModelSource
from dicer.model.structure.find import memory_names
from dicer.model.structure.probe import STEP, stepped
from dicer.model.structure.skeleton import Shape, Skeleton, build, changed, flat_values
from dicer.model.structure.trace import returned
from dicer.model.tensors import TensorInfo
from dicer.model.units import Axis

Listed = dict[str, dict[str, Any]]
_FROM_SHAPES = ("in_features", "out_features", "nx", "nf")  # of linear maps: they follow their weights


def listed_layers(
    source: ModelSource,
    skeleton: Skeleton,
    infos: Mapping[str, TensorInfo],
    shapes: Sequence[LayerShape],
    kept: Sequence[int],
) -> Listed | None:
    """Number of a layer -> what is its own, by names in memory; None where more differs than the plan changes.

    Args:
        source: the model that is cut.
        skeleton: what the stock class makes of the config without the list.
        infos: the tensors that there will be, by their names on disk.
        shapes: what stays of each layer that stays.
        kept: which layers of the source those are.

    Raises:
        PlanError: a sub-layer goes whole that cannot be left out.
    """
    family = source.family
    layers: Listed = {f"{i:03d}": {} for i in range(len(kept))}
    _carry(source, layers, kept)
    for axis in family.axes.values():
        gone = [i for i, old in enumerate(kept) if family.counts[axis.name][old] and not shapes[i].units[axis.name]]
        for i in gone:
            biased = axis.name in shapes[i].output_bias
            layers[f"{i:03d}"].setdefault("skip", {}).update(_skipped(axis, source, skeleton, kept[i], i, biased))
    if not _list_shapes(family, skeleton, infos, layers):
        return None
    _list_idle(source, skeleton, infos, layers, kept)
    for axis in family.axes.values():
        if axis.fixed:
            _list_fixed(family, axis, skeleton, shapes, layers)
        elif axis.width_keys[-1]:
            _list_counts(family, axis, skeleton, shapes, layers)
    return {number: own for number, own in layers.items() if own}


def _carry(source: ModelSource, layers: Listed, kept: Sequence[int]) -> None:
    """What was skipped before stays so."""
    before = (source.raw_config.get("pruned") or {}).get("own", {})
    for i, old in enumerate(kept):
        said = before.get(f"{old:03d}", {})
        layers[f"{i:03d}"].update({key: copy.copy(said[key]) for key in ("skip", "idle") if key in said})


def _list_shapes(family: Family, skeleton: Skeleton, infos: Mapping[str, TensorInfo], layers: Listed) -> bool:
    """Note parameters of other shapes; False where one differs that no unit runs through."""
    memory, state = memory_names(skeleton.model), skeleton.model.state_dict()
    cut = {piece.name for axis in family.axes.values() for piece in axis.slices}
    prefix = f"{family.where.module}."
    for name, info in infos.items():
        place, built = family.locate(name), skeleton.shapes.get(name)
        if place is None or built == info.shape:
            continue
        skipped = layers[f"{place[0]:03d}"].get("skip", {})
        if any(place[1] == f"{module}.bias" for module in skipped):
            continue
        if built is None and not name.endswith(".bias"):
            return False
        if built is not None and place[1] not in cut:
            return False
        if built is None:
            full = memory(name.removesuffix("bias") + "weight").removesuffix("weight") + "bias"
        else:
            full = memory(name)
        inner = full.removeprefix(prefix).partition(".")[2]
        wanted = info.shape if built is None else _in_memory(built, info.shape, tuple(state[full].shape))
        layers[f"{place[0]:03d}"].setdefault("shapes", {})[inner] = list(wanted)
    return True


def _list_idle(
    source: ModelSource, skeleton: Skeleton, infos: Mapping[str, TensorInfo], layers: Listed, kept: Sequence[int]
) -> None:
    """Note the norms that go with a sub-layer."""
    family, memory, before = source.family, memory_names(skeleton.model), source.tensors.infos()
    for name in skeleton.shapes:
        place = family.locate(name)
        if place is None or name in infos or family.renumbered(name, kept[place[0]]) not in before:
            continue
        own = layers[f"{place[0]:03d}"]
        inner = memory(name).removeprefix(f"{family.where.module}.{place[0]}.").rpartition(".")[0]
        if "skip" in own and not any(f"{inner}.".startswith(f"{module}.") for module in own["skip"]):
            own["idle"] = sorted({*own.get("idle", ()), inner})


def _in_memory(built: Shape, wanted: Shape, memory: Shape) -> Shape:
    """The shape in memory of a tensor that has another one on disk, where it may be one of several side by side."""
    if len(built) == len(memory):
        share = [m // b if b and m % b == 0 else 1 for b, m in zip(built, memory, strict=True)]
        return tuple(w * s if w != b else m for w, s, b, m in zip(wanted, share, built, memory, strict=True))
    inner = _in_memory(built, wanted, memory[1:])
    return (memory[0], *inner)


def _list_counts(family: Family, axis: Axis, skeleton: Skeleton, shapes: Sequence[LayerShape], layers: Listed) -> None:
    """Note numbers that modules keep beside their weights: heads, widths by which they split."""
    values = flat_values(skeleton.config)
    if axis.size_key is not None:
        if family.heads is None:
            return
        wanted = {i: Fraction(shape.units[axis.name]) for i, shape in enumerate(shapes) if shape.units[axis.name]}
        base = dict.fromkeys(wanted, Fraction(family.heads.count))
        steps = [(family.heads.tried(family.heads.count + more), more) for more in (1, 2, family.heads.count)]
    else:
        key = axis.width_keys[-1]
        if values[key] is None:  # GPT-2's, of a width that is not cut
            return
        wanted = {
            i: Fraction(shape.units[axis.name]) / family.factors[axis.name]
            for i, shape in enumerate(shapes)
            if shape.units[axis.name]
        }
        base = {i: Fraction(values[key][i] if isinstance(values[key], list) else values[key]) for i in wanted}
        steps = [({key: stepped(values[key], STEP)}, STEP)]
    other = {i: value - base[i] for i, value in wanted.items() if value != base[i]}
    if not other:
        return
    rates = _rates(family, axis, skeleton, steps)
    for i, by in other.items():
        for (layer, name), (before, rate) in rates.items():
            if layer == i:
                place, _, attribute = name.rpartition(".")
                said = layers[f"{i:03d}"].setdefault("attributes", {}).setdefault(place, {})
                said[attribute] = _moved(name, before, rate, by)
        if axis.size_key is not None and family.heads is not None:
            _list_configs(family, axis, skeleton, layers[f"{i:03d}"], i, int(wanted[i]))


def _list_fixed(family: Family, axis: Axis, skeleton: Skeleton, shapes: Sequence[LayerShape], layers: Listed) -> None:
    """Note the numbers of heads whose size the class takes from their number."""
    place = axis.modules[-1]
    for i, shape in enumerate(shapes):
        if not (units := shape.units[axis.name]):
            continue
        module = skeleton.model.get_submodule(f"{family.where.module}.{i}.{place}")
        wanted = {name: units * (axis.channels if of == "channels" else 1) for name, of in axis.fixed}
        if any(getattr(module, name) != value for name, value in wanted.items()):
            layers[f"{i:03d}"].setdefault("attributes", {}).setdefault(place, {}).update(wanted)


def _rates(
    family: Family, axis: Axis, skeleton: Skeleton, steps: Sequence[tuple[Mapping[str, Any], int]]
) -> dict[tuple[int, str], tuple[Any, Any]]:
    """(layer, attribute's path inside it) -> its value and by how much it follows one more of the key."""
    before = dict(_numbers(family, axis, skeleton))
    for values, by in steps:
        try:
            other = build(changed(skeleton.config, values), family.stock_class)
        except Exception:  # whatever a class raises of a config that it does not take
            continue
        after = dict(_numbers(family, axis, other))
        return {
            place: (value, _difference(value, after[place], by))
            for place, value in before.items()
            if place in after and after[place] != value
        }
    return {}


def _numbers(family: Family, axis: Axis, skeleton: Skeleton) -> Iterator[tuple[tuple[int, str], Any]]:
    modules = dict(skeleton.model.named_modules())
    count = len(modules[family.where.module])
    for i in range(count):
        prefix = f"{family.where.module}.{i}"
        for place in _places(axis, [n.removeprefix(f"{prefix}.") for n in modules if n.startswith(f"{prefix}.")]):
            for name, value in vars(modules[f"{prefix}.{place}" if place else prefix]).items():
                whole = isinstance(value, list | tuple) and value and all(type(v) is int for v in value)
                if (type(value) is int or whole) and name not in _FROM_SHAPES and not name.startswith("_"):
                    yield (i, f"{place}.{name}" if place else name), value


def _places(axis: Axis, modules: Sequence[str]) -> list[str]:
    """The modules that an axis's numbers may be kept in: what holds its maps, and all inside that."""
    maps = {(piece.memory or piece.name).removesuffix(".weight").removesuffix(".bias") for piece in axis.slices}
    holders = {name.rpartition(".")[0] for name in maps}
    if "" in holders:
        return ["", *(name for name in modules if name in maps)]
    return [name for name in modules if any(name == holder or name.startswith(f"{holder}.") for holder in holders)]


def _difference(before: Any, after: Any, by: int) -> Any:
    if isinstance(before, list | tuple):
        return [Fraction(b - a, by) for a, b in zip(before, after, strict=True)]
    return Fraction(after - before, by)


def _moved(name: str, before: Any, rate: Any, by: Fraction) -> Any:
    if isinstance(before, list | tuple):
        return [_moved(name, a, r, by) for a, r in zip(before, rate, strict=True)]
    value = before + rate * by
    if value.denominator != 1:
        raise PlanError(f"'{name}' would be {value}, which is no whole number. Choose other units.")
    return int(value)


def _list_configs(family: Family, axis: Axis, skeleton: Skeleton, own: dict[str, Any], layer: int, groups: int) -> None:
    """Note what modules of attention must find in their config, where they have one: some read it as they run."""
    assert family.heads is not None
    counts = {path.rpartition(".")[2]: n for path, n in family.heads.of(groups).items() if path != family.heads.size}
    modules = dict(skeleton.model.named_modules())
    prefix = f"{family.where.module}.{layer}."
    for place in _places(axis, [n.removeprefix(prefix) for n in modules if n.startswith(prefix)]):
        if "config" in vars(modules[prefix + place]):
            own.setdefault("config", {})[place] = counts


def _skipped(axis: Axis, source: ModelSource, skeleton: Skeleton, old: int, new: int, biased: bool) -> dict[str, Any]:
    """What stands for a sub-layer that goes whole.

    Raises:
        PlanError: it is not one module whose output joins the residual stream.
    """
    family, module = source.family, axis.modules[-1]
    known = {piece.name for piece in axis.slices}
    inside = [place[1] for n in source.tensors.infos() if (place := family.locate(n)) and place[0] == old]
    infos = source.tensors.infos()
    others = [n for n in inside if n.startswith(f"{module}.") and n not in known and axis.size_key is None]
    others = [n for n in others if len(infos[family.tensor_name(old, n)].shape) > 1]  # a router, or experts
    *before, _ = axis.modules
    maps = {piece.name.removesuffix(".weight") for piece in axis.required}
    if not {*before} <= maps or not module or others:
        more = f"'{others[0]}' is in it, too" if others else f"it is several modules ({', '.join(axis.modules)})"
        raise PlanError(f"{axis.name} of layer {old} cannot go whole: {more}. Leave some units, or remove the block.")
    size = skeleton.shapes[family.tensor_name(new, axis.output_slice.name)][1 - axis.output_slice.dim]
    returns = returned(skeleton, f"{family.where.module}.{new}.{module}")
    if returns is None:
        raise PlanError(
            f"{axis.name} of layer {old} cannot go whole: what '{module}' returns cannot be seen without weights. "
            "Leave some units."
        )
    # Of maps that the layer itself holds the last one's output joins the stream; what goes into it does not matter.
    return {**{name: {} for name in before}, module: {"size": size, "returns": max(returns, 1), "bias": biased}}
