"""What config a pruned model gets: that of its own class where it fits, else a list of layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from dicer.errors import PlanError
from dicer.model.shapes import LayerShape
from dicer.model.source import ModelSource
from dicer.model.structure.heads import head_keys
from dicer.model.structure.layers import companions
from dicer.model.structure.skeleton import (
    Skeleton,
    as_values,
    build,
    flat_values,
    quiet,
    stock_config,
    stock_config_class,
)
from dicer.model.tensors import TensorInfo
from dicer.write.listed import listed_layers

MODELING_FILE = "modeling_pruned.py"
IN_VLLM = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "opt")  # seen to serve
_OWN_KEYS = ("auto_map", "pruned", "_name_or_path", "architectures", "model_type")
_HEADS_OF_LAYERS = ("per_layer_config", "allow_global_per_layer_attribute_access")  # where we said them
Widths = Mapping[str, Sequence[Fraction | None]]


def pruned_config(
    source: ModelSource,
    infos: Mapping[str, TensorInfo],
    shapes: Sequence[LayerShape],
    kept: Sequence[int],
    *,
    stock: bool = True,
) -> dict[str, Any]:
    """``config.json`` of a model with the given layers.

    The config of the stock class where a model built from it has exactly the tensors that there will be. Otherwise
    ``pruned`` lists what each layer has that the class would not give it, and ``auto_map`` names the code that reads
    it.

    Args:
        source: the dense model, or one that was pruned before.
        infos: the tensors that there will be.
        shapes: what stays of each layer that stays.
        kept: which layers of the source those are.
        stock: whether the stock class will do where it can.

    Raises:
        PlanError: neither can hold it.
    """
    family = source.family
    ours = _OWN_KEYS + (_HEADS_OF_LAYERS if family.model_type in IN_VLLM else ())
    raw = {key: copy.deepcopy(value) for key, value in source.raw_config.items() if key not in ours}
    raw.update(model_type=family.model_type, architectures=[family.causal_lm])
    before = as_config(source, raw)
    values = (
        {}
        if len(kept) == family.where.count
        else companions(before, family.where.key, family.where.count, kept, family.where.lists)
    )
    widths = _widths(source, shapes, kept)
    touched = {path: value for name in family.axes if _changes(source, name, shapes, kept)
               for path, value in family.sets.get(name, {}).items()}  # fmt: skip
    said = {key: _said(values.get(key, flat_values(before)[key]), wanted) for key, wanted in widths.items()}
    heads = _heads(source, shapes, kept)
    switches = {family.axes[axis].bias_option for shape in shapes for axis in shape.output_bias}
    if stock and heads is not None and None not in [*said.values(), *switches]:
        biases = {switch: True for switch in switches if switch}
        own = placed(raw, {**values, **touched, **said, **heads, **biases}, before)
        if _is(source, own, {**infos, **zero_biases(source, infos, shapes)}):
            return own
    for each in (True, False):  # the largest width for all, or what it was, where more than what is cut goes by it
        largest = {key: _largest(values.get(key, flat_values(before)[key]), w) for key, w in widths.items() if each}
        config = placed(raw, {**values, **touched, **largest}, before)
        if (skeleton := _built(source, config)) is None:
            continue
        layers = listed_layers(source, skeleton, infos, shapes, kept)
        if layers is None:
            continue
        return _differing(source, config | _heads_of_layers(source, shapes), layers, infos)
    raise PlanError(
        f"no {family.causal_lm} of transformers can be built with the widths that are left, whatever each layer is "
        "given by itself. Choose other units, or another --axis."
    )


def zero_biases(
    source: ModelSource, infos: Mapping[str, TensorInfo], shapes: Sequence[LayerShape]
) -> dict[str, TensorInfo]:
    """What a stock switch for biases turns on besides those that are wanted, which has to be zero.

    Args:
        source: the model.
        infos: the tensors that there will be.
        shapes: of the layers that there will be.
    """
    found, family = {}, source.family
    axes = [family.axes[name] for name in {axis for shape in shapes for axis in shape.output_bias}]
    places = {place: name for name in infos if (place := family.locate(name))}
    for (index, inner), name in places.items():
        for piece in (piece for axis in axes for piece in axis.required if piece.name == inner):
            if (index, piece.bias) not in places:
                info = infos[name]
                found[name.removesuffix("weight") + "bias"] = TensorInfo((info.shape[0],), info.dtype)
    return found


def _differing(
    source: ModelSource, config: dict[str, Any], layers: dict[str, Any], infos: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    from dicer.write.export import modeling_pruned

    family = source.family
    module, names = MODELING_FILE.removesuffix(".py"), family.pruned_classes
    ours = family.model_type in IN_VLLM and "per_layer_config" in config
    aside: dict[str, Any] = {"aside": ["per_layer_config"]} if ours else {}
    own = f"Pruned{family.causal_lm}"
    own = own if own in names.values() else names["AutoModelForCausalLM"]
    new = config | {
        "model_type": family.pruned_type,
        "architectures": [own],
        "auto_map": {auto: f"{module}.{name}" for auto, name in names.items()},
        "pruned": {"layers": family.where.module, "own": layers} | aside,
    }
    kind: Any = getattr(modeling_pruned, own)
    with torch.device("meta"), quiet():
        made = kind.config_class.from_dict(as_values(new))
        skeleton = Skeleton(made, kind(made))
    if name := differs(skeleton, source, infos):
        raise PlanError(f"'{name}' of the result is not what a {own} would have; choose other units.")
    return new


def _heads_of_layers(source: ModelSource, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """Where layers' heads differ, their numbers as vLLM asks for them, which makes room for keys and values by them."""
    keys = source.family.heads or head_keys(stock_config(source.config))
    if source.family.model_type not in IN_VLLM or keys is None:
        return {}
    counts = [shape.units.get("attention", 0) for shape in shapes]
    own = {f"{i:03d}": {key: value for key, value in keys.of(count).items() if key != keys.size}
           for i, count in enumerate(counts) if count not in (0, keys.count)}  # fmt: skip
    said = {"per_layer_config": own, "allow_global_per_layer_attribute_access": True, keys.size: keys.head}
    return said if own else {}


def as_config(source: ModelSource, raw: Mapping[str, Any]) -> Any:
    """The stock config that a ``config.json`` is."""
    return stock_config_class(source.config).from_dict(as_values(raw))


def _built(source: ModelSource, raw: Mapping[str, Any]) -> Skeleton | None:
    """The stock class without weights, or None where it does not take a config."""
    try:
        return build(as_config(source, raw), source.family.stock_class)
    except Exception:  # whatever a class raises of a config that it does not take
        return None


def _is(source: ModelSource, raw: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> bool:
    skeleton = _built(source, raw)
    return skeleton is not None and differs(skeleton, source, infos) is None


def differs(skeleton: Skeleton, source: ModelSource, infos: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor in which a model without weights is not what there will be; None where there is none.

    What the source's files lack, too, is no difference: a buffer, or what its class can do without.
    """
    before = source.tensors.infos()
    for name, shape in skeleton.shapes.items():
        found = infos.get(name)
        if found is None and (name in before or (source.family.locate(name) and not skeleton.is_buffer(name))):
            return name
        if found is not None and found.shape != shape:
            return name
    return next((name for name in infos if source.family.locate(name) and name not in skeleton.shapes), None)


def _changes(source: ModelSource, axis: str, shapes: Sequence[LayerShape], kept: Sequence[int]) -> bool:
    """Whether an axis is cut, or was before: then the config says other widths than there are."""
    counts = source.family.counts[axis]
    return not source.is_stock or any(shape.units[axis] != counts[old] for shape, old in zip(shapes, kept, strict=True))


def _widths(source: ModelSource, shapes: Sequence[LayerShape], kept: Sequence[int]) -> dict[str, list[Fraction | None]]:
    """Width key -> what it has to be in each layer; None where it can be anything. Keys that stay are left out."""
    family, found = source.family, dict[str, list[Fraction | None]]()
    for name, axis in family.axes.items():
        if axis.size_key is not None:
            continue
        key = axis.width_keys[-1]
        if not key or not _changes(source, name, shapes, kept):  # Bloom has no key: its class cannot be any other width
            continue
        wanted = found.setdefault(key, [None] * len(shapes))
        for i, shape in enumerate(shapes):
            if shape.units[name]:
                own = Fraction(shape.units[name]) / family.factors[name]
                wanted[i] = own if wanted[i] is None else max(own, wanted[i] or own)
    return found


def _said(before: Any, wanted: Sequence[Fraction | None]) -> Any | None:
    """What a width key says so that all layers have what they want, or None where it cannot."""
    if any(w is not None and w.denominator != 1 for w in wanted):
        return None
    if isinstance(before, list | tuple):
        return [int(old if w is None else w) for old, w in zip(before, wanted, strict=True)]
    different = {int(w) for w in wanted if w is not None}
    return different.pop() if len(different) == 1 else None if different else before


def _largest(before: Any, wanted: Sequence[Fraction | None]) -> Any:
    if isinstance(before, list | tuple):
        return [old if w is None else math.ceil(w) for old, w in zip(before, wanted, strict=True)]
    return max((math.ceil(w) for w in wanted if w is not None), default=before)


def _heads(source: ModelSource, shapes: Sequence[LayerShape], kept: Sequence[int]) -> dict[str, Any] | None:
    """What a stock config says of heads: nothing where they stay; None where no single number is all layers'."""
    family = source.family
    axes = [name for name, axis in family.axes.items() if axis.size_key is not None]
    if family.heads is None or not any(_changes(source, name, shapes, kept) for name in axes):
        return {}
    groups = {shape.units[name] for name in axes for shape, old in zip(shapes, kept, strict=True)
              if family.counts[name][old]}  # fmt: skip
    if len(groups) > 1 or 0 in groups:
        return None
    return dict(family.heads.of(groups.pop()))


def placed(raw: Mapping[str, Any], values: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """``config.json`` with other values, each where the file has it: in a config inside it, at the top, or in both.

    Args:
        raw: the file as it stands.
        values: path -> value, as transformers' config has it.
        config: the transformers config, which knows other words for a key.
    """
    new = copy.deepcopy(dict(raw))
    for path, value in values.items():
        outer, _, key = path.rpartition(".")
        nested = new.get(outer) if outer else new
        homes = [home for home in ([nested] if isinstance(nested, dict) else []) if home is not None]
        flat = bool(outer) and any(word in new for word in _words(config, outer, key))
        if flat and not (homes and any(word in homes[0] for word in _words(config, outer, key))):
            homes = []  # a flat file: what is inside is only what is not at the top
        for home in [*homes, *([new] if flat or not homes else [])]:
            _put(home, _words(config, outer, key), key, value)
    return new


def _words(config: Any, outer: str, key: str) -> list[str]:
    inner = getattr(config, outer, config) if outer else config
    other = getattr(inner, "attribute_map", {}) or {}
    return [key, *(word for word, own in other.items() if own == key)]


def _put(home: dict[str, Any], words: Sequence[str], key: str, value: Any) -> None:
    there = [word for word in words if word in home]
    for word in there[1:]:
        del home[word]
    home[there[0] if there else key] = value
