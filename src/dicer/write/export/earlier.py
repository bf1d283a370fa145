"""Checkpoints of dicer 0.1, whose config says ``per_layer_config``: it is read as what ``pruned`` lists today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.families import PRUNED_PREFIX, Family
from dicer.model.source import ModelSource
from dicer.model.structure.find import find_family
from dicer.model.structure.skeleton import as_values, build, changed, flat_values, model_class
from dicer.model.tensors import MemorySource

_EARLIER = ("per_layer_config", "allow_global_per_layer_attribute_access", "output_bias")
_OWN = ("model_type", "architectures", "auto_map")


def is_earlier(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of those."""
    ours = str(values.get("model_type")).startswith(PRUNED_PREFIX) and values.get("pruned") is None
    return ours and values.get("per_layer_config") is not None  # which is a key of Gemma 4's own, too


def as_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same ``config.json`` with ``pruned``: what a cut of the stock model to these layers would come to.

    Args:
        values: with ``per_layer_config``: number of a layer -> widths by their keys, sub-layers to ``skip``, and those
            with an ``output_bias`` that the stock class would not give them.
    """
    from transformers import CONFIG_MAPPING

    from dicer.write.surgery import plan_cut

    said = {key: value for key, value in values.items() if key not in (*_EARLIER, *_OWN)}
    config = CONFIG_MAPPING[str(values["model_type"]).removeprefix(PRUNED_PREFIX)].from_dict(as_values(said))
    kind, own = model_class(config), {int(number): layer for number, layer in values["per_layer_config"].items()}
    key = find_family(config, kind).axes["mlp"].width_keys[-1]
    widest = max((layer.get(key, 0) for layer in own.values()), default=0)
    if widest > (flat_values(config)[key] or widest):
        config = changed(config, {key: widest})
    skeleton = build(config, kind)
    family = find_family(config, kind)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in skeleton.shapes.items()}
    source = ModelSource(kind.__name__, None, config, said, family, MemorySource(tensors))
    cut = plan_cut(source, _plan(family, own), stock=False).config
    return {**said, **cut, **{name: values[name] for name in _OWN if name in values}}


def _plan(family: Family, own: Mapping[int, Mapping[str, Any]]) -> PrunePlan:
    axes: dict[str, dict[int, LayerPlan]] = {name: {} for name in family.axes}
    for name, axis in family.axes.items():
        for index, layer in own.items():
            units = family.counts[name][index]
            keep = 0 if name in layer.get("skip", ()) else layer.get(axis.width_keys[-1], units)
            means = torch.zeros(units * axis.channels) if name in layer.get("output_bias", ()) else None
            axes[name][index] = LayerPlan(units, torch.arange(keep), torch.zeros(units), means=means)
    return PrunePlan({}, {}, {}, {}, axes)
