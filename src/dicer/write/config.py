"""What config a pruned model gets: the stock one where the family can hold it, else one with a say for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dicer.model.families import Family, head_size
from dicer.model.shapes import LayerShape, fits_stock
from dicer.model.source import ModelSource

MODELING_FILE = "modeling_pruned.py"
_OWN_KEYS = (
    *("auto_map", "per_layer_config", "allow_global_per_layer_attribute_access", "output_bias"),
    *("_name_or_path", "architectures", "model_type"),
)


def _is_taken(config: Mapping[str, Any]) -> bool:
    """Whether transformers takes a stock config; Phi-3's wants rope factors for hidden size / heads, however large."""
    from transformers import AutoConfig

    values = dict(config)
    try:
        AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception:  # whatever a config class raises of what it does not like
        return False
    return True


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
    neurons = family.axes["mlp"].width_keys[-1]
    config = {key: value for key, value in source.raw_config.items() if key not in _OWN_KEYS}
    config.update(model_type=family.model_type, architectures=[family.causal_lm])
    if len(kept) < len(values.get("layer_types") or ()):
        config["layer_types"] = [values["layer_types"][i] for i in kept]
    config[family.layers_key] = len(kept)
    config[neurons] = max(shape.units["mlp"] for shape in shapes) or source.widest
    if fits_stock(family, source.config, shapes):
        stock = config | _stock_keys(family, values, shapes)
        if _is_taken(stock):
            return stock
    said = values | {neurons: config[neurons]}
    per_layer = {f"{i:03d}": own for i, shape in enumerate(shapes) if (own := _differs(family, said, shape))}
    if any(shape.output_bias for shape in shapes):
        config["output_bias"] = []
    for axis in family.axes.values():
        if axis.size_key is not None and any(axis.width_keys[-1] in own for own in per_layer.values()):
            config[axis.size_key] = head_size(values, int(values[axis.width_keys[0]]))
    module = MODELING_FILE.removesuffix(".py")
    config.update(
        model_type=family.pruned_type,
        architectures=[family.pruned_classes["AutoModelForCausalLM"]],
        auto_map={auto: f"{module}.{name}" for auto, name in family.pruned_classes.items()},
        per_layer_config=per_layer,
        allow_global_per_layer_attribute_access=True,
        num_hidden_layers=len(kept),  # also where the family has its own word: AutoTokenizer may know no other
    )
    return config


def _stock_keys(family: Family, values: dict[str, Any], shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """Keys of a stock config that say widths and biases; the size of a unit by name where their number is another."""
    axes = family.axes
    biased = {option for shape in shapes for axis in shape.output_bias if (option := axes[axis].bias_option)}
    keys: dict[str, Any] = dict.fromkeys(biased, True)
    for name, axis in axes.items():
        if axis.size_key is not None and shapes[0].units[name] != axis.width(values.get):
            keys |= axis.keys(values, shapes[0].units[name])
            keys[axis.size_key] = head_size(values, int(values[axis.width_keys[0]]))
    return keys


def _differs(family: Family, values: dict[str, Any], shape: LayerShape) -> dict[str, Any]:
    """What a layer has that the global config does not say."""
    said: dict[str, Any] = {}
    for name, axis in family.axes.items():
        if shape.units[name] not in (0, axis.width(values.get)):
            said |= axis.keys(values, shape.units[name])
    if gone := [name for name in family.axes if not shape.units[name]]:
        said["skip"] = gone
    if shape.output_bias:
        said["output_bias"] = sorted(shape.output_bias)
    return said
