"""What config a pruned model gets: the stock one where the family can hold it, else one with a say for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicer.model.families import Family, head_size
from dicer.model.source import ModelSource
from dicer.model.units import AXES

MODELING_FILE = "modeling_pruned.py"
_OWN_KEYS = (
    *("auto_map", "per_layer_config", "allow_global_per_layer_attribute_access", "output_bias"),
    *("_name_or_path", "architectures", "model_type"),
)


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer is made of.

    Attributes:
        units: axis -> how many, 0 where the sub-layer is gone.
        output_bias: axes whose output projection (or what is left of a sub-layer that is gone) has a bias that the
            stock class would not give it.
    """

    units: dict[str, int]
    output_bias: frozenset[str] = frozenset()


def layer_shapes(family: Family, config: Any) -> list[LayerShape]:
    """Every layer of a model, from its transformers config (stock or pruned)."""
    units = {axis: family.units(config, axis) for axis in AXES}
    return [
        LayerShape({axis: units[axis][i] for axis in AXES}, frozenset(getattr(layer, "output_bias", ())))
        for i, layer in enumerate(config.per_layer_config)
    ]


def fits_stock(source: ModelSource, shapes: Sequence[LayerShape]) -> bool:
    """Whether the family's own class can be all these layers."""
    family, first = source.family, shapes[0].units
    if any(shape.units != first for shape in shapes) or not all(first.values()):
        return False
    biased = frozenset().union(*(shape.output_bias for shape in shapes))
    if any(getattr(family, axis).bias_option is None for axis in biased):
        return False
    values = source.config.to_dict()
    heads, groups = _heads(family, values)
    if first["attention"] == groups:
        return True
    ours = first["attention"] * heads // groups
    return not family.fixed_heads and not (family.even_heads and values["hidden_size"] % ours)


def pruned_config(source: ModelSource, shapes: Sequence[LayerShape], kept: Sequence[int]) -> dict[str, Any]:
    """``config.json`` of a model with the given layers.

    Layers that are all alike give a stock config. Otherwise ``per_layer_config`` says what each is, and ``auto_map``
    names the code that reads it; the global width is the largest.

    Args:
        source: the dense model, or one that was pruned before.
        shapes: what stays of each layer that stays.
        kept: which layers of the source those are.
    """
    family, values = source.family, source.config.to_dict()
    config = {key: value for key, value in source.raw_config.items() if key not in _OWN_KEYS}
    config.update(model_type=family.model_type, architectures=[family.causal_lm])
    if len(kept) < len(values.get("layer_types") or ()):
        config["layer_types"] = [values["layer_types"][i] for i in kept]
    config[family.layers_key] = len(kept)
    config[family.mlp.width_keys[0]] = max(shape.units["mlp"] for shape in shapes) or source.widest
    if fits_stock(source, shapes):
        return config | _stock_heads(family, values, shapes)
    module, per_layer = MODELING_FILE.removesuffix(".py"), {}
    for i, shape in enumerate(shapes):
        if said := _differs(family, values, config, shape):
            per_layer[f"{i:03d}"] = said
    if any(shape.output_bias for shape in shapes):
        config["output_bias"] = []
    config.update(
        model_type=family.pruned_type,
        architectures=[family.pruned_classes["AutoModelForCausalLM"]],
        auto_map={auto: f"{module}.{name}" for auto, name in family.pruned_classes.items()},
        per_layer_config=per_layer,
        allow_global_per_layer_attribute_access=True,
    )
    return config


def _heads(family: Family, values: dict[str, Any]) -> tuple[int, int]:
    """(query heads, key-value heads) that the config names for all layers."""
    heads = int(values[family.attention.width_keys[0]])
    return heads, int(values.get(family.attention.width_keys[-1]) or heads)


def _stock_heads(family: Family, values: dict[str, Any], shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """Keys of a stock config that say heads and biases; the head size by name, as hidden / heads is no longer it."""
    keys: dict[str, Any] = {getattr(family, axis).bias_option: True for shape in shapes for axis in shape.output_bias}
    heads, groups = _heads(family, values)
    ours = shapes[0].units["attention"]
    if ours != groups:
        numbers = (ours * heads // groups, ours)
        keys |= dict(zip(family.attention.width_keys, numbers, strict=True))
        keys["head_dim"] = head_size(values, heads)
    return keys


def _differs(family: Family, values: dict[str, Any], config: dict[str, Any], shape: LayerShape) -> dict[str, Any]:
    """What a layer has that the global config does not say."""
    heads, groups = _heads(family, values)
    attention, neurons = shape.units["attention"], shape.units["mlp"]
    said: dict[str, Any] = {}
    if neurons not in (0, config[family.mlp.width_keys[0]]):
        said[family.mlp.width_keys[0]] = neurons
    if attention not in (0, groups):
        numbers = (attention * heads // groups, attention)
        said |= dict(zip(family.attention.width_keys, numbers, strict=False))
    if gone := [axis for axis in AXES if not shape.units[axis]]:
        said["skip"] = gone
    if shape.output_bias:
        said["output_bias"] = sorted(shape.output_bias)
    return said
