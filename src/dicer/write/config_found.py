"""What config a pruned model of a family gets that was found: the stock one where that builds it, else a record."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dicer.errors import PlanError
from dicer.model.shapes import LayerShape
from dicer.model.source import ModelSource
from dicer.model.structure.find import FoundFamily
from dicer.model.structure.layers import companions
from dicer.model.structure.skeleton import Shape, Skeleton, build, flat_values, quiet
from dicer.model.tensors import TensorInfo
from dicer.write.config import MODELING_FILE

_COUNTS = re.compile(
    r"^(num_|n_)?(attention_|key_value_|kv_)?(heads|head|num_heads)$|^(num|n)_(key_value|kv|attention)_heads$"
)


def found_config(
    source: ModelSource, after: Sequence[LayerShape], kept: Sequence[int], infos: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """``config.json`` of a cut model whose family was found.

    It is the stock one where the class of transformers, built from it, has exactly the tensors of the cut. Else
    ``pruned`` in it says which tensors of which layer have which shape, by their names in memory, and ``auto_map``
    names the code that reads it.

    Args:
        source: the model.
        after: what stays of each layer that stays.
        kept: which layers of the source those are.
        infos: the tensors of the cut.

    Raises:
        PlanError: a sub-layer would go whole, which no class of such a family can hold.
    """
    family = source.family
    if not isinstance(family, FoundFamily):
        raise TypeError("a family with a row has its config from write.config")
    _refuse_whole(family, after, kept)
    layers = _layer_values(source, family, kept)
    attempts = [layers | _widths(source, family, after, kept, layers), layers]
    fault = "transformers does not take the config that it would have"
    for values in attempts:
        stock = _with_values(source, family, values)
        stock.update(model_type=family.model_type, architectures=[family.causal_lm])
        skeleton = _built(stock, family)
        if skeleton is None:
            continue
        if not any(shape.output_bias for shape in after) and _same(skeleton, infos):
            return stock
        config = _recorded(stock, family, after, skeleton, infos)
        strange = _unsaid(family, after, skeleton, infos)
        if strange is None:
            return config
        fault = f"'{strange}' would be {infos[strange].shape}, and its class has {skeleton.shapes[strange]}"
    raise PlanError(f"this cut of a {family.causal_lm} cannot be loaded: {fault}. Choose other units or ratios.")


def _refuse_whole(family: FoundFamily, after: Sequence[LayerShape], kept: Sequence[int]) -> None:
    for shape, old in zip(after, kept, strict=True):
        for axis, units in shape.units.items():
            if not units and family.counts[axis][old]:
                raise PlanError(
                    f"the plan removes {axis} of layer {old} whole, and of a '{family.model_type}' only units of it or "
                    "whole layers can go. Ask for less, or set --max-ratio below 1."
                )


def _layer_values(source: ModelSource, family: FoundFamily, kept: Sequence[int]) -> dict[str, Any]:
    """Path -> what the config says of layers, where some go."""
    if len(kept) == family.where.count:
        return {}
    return companions(source.config, family.where.key, family.where.count, kept, family.where.lists)


def _widths(
    source: ModelSource,
    family: FoundFamily,
    after: Sequence[LayerShape],
    kept: Sequence[int],
    layers: Mapping[str, Any],
) -> dict[str, Any]:
    """Path -> what the config says of widths and heads: the largest of each."""
    values: dict[str, Any] = {}
    known = flat_values(source.config)
    widths: dict[str, dict[int, Fraction]] = {}
    for axis, row in family.axes.items():
        if not axis.startswith("mlp") or not row.width_keys[-1]:
            continue
        if any(shape.units[axis] != family.counts[axis][old] for shape, old in zip(after, kept, strict=True)):
            values |= family.sets.get(axis, {})
        for i, shape in enumerate(after):
            if shape.units[axis]:
                own = widths.setdefault(row.width_keys[-1], {})
                own[i] = max(own.get(i, Fraction(0)), shape.units[axis] / family.factors[axis])
    for key, own in widths.items():
        said = layers.get(key, known.get(key))
        if isinstance(said, list | tuple):
            values[key] = [int(own[i]) if i in own else width for i, width in enumerate(said)]
        else:
            values[key] = int(max(own.values()))
    heads = [shape.units["attention"] for shape in after if shape.units.get("attention")]
    if family.heads is not None and heads and max(heads) != family.heads.count:
        values |= family.heads.of(max(heads))
    return values


def _with_values(source: ModelSource, family: FoundFamily, values: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` as it stands, with other values at their places; of a key and its other name one stays."""
    config: dict[str, Any] = copy.deepcopy(dict(source.raw_config))
    for key in ("auto_map", "pruned", "_name_or_path"):
        config.pop(key, None)
    aliases = getattr(source.text_config, "attribute_map", {})
    for path, value in values.items():
        outer, _, key = path.rpartition(".")
        inner = config[outer] if outer and isinstance(config.get(outer), dict) else config
        for other in {key, aliases.get(key), *(a for a, b in aliases.items() if b == key)} - {None}:
            if other != key and other in inner:
                del inner[other]
                key = key if key in inner or path in flat_values(source.config) else other
        inner[key] = value
        if outer and key in config and inner is not config:
            config[key] = value  # a config that was written flat, read as a nested one
    return config


def _built(stock: Mapping[str, Any], family: FoundFamily) -> Skeleton | None:
    """The class of transformers as a config calls for it, or None where it does not take the config."""
    kind = family.stock_class
    try:
        with quiet():
            return build(kind.config_class.from_dict(dict(stock)), kind)
    except Exception:  # whatever a class raises of a config that it does not take
        return None


def _same(skeleton: Skeleton | None, infos: Mapping[str, TensorInfo]) -> bool:
    if skeleton is None:
        return False
    return all(infos[name].shape == shape for name, shape in skeleton.shapes.items() if name in infos)


def _unsaid(
    family: FoundFamily, after: Sequence[LayerShape], skeleton: Skeleton, infos: Mapping[str, TensorInfo]
) -> str | None:
    """The first tensor of another shape than the class gives it, that no record can speak of."""
    said = {
        family.tensor_name(i, piece.name)
        for i, shape in enumerate(after)
        for axis, row in family.axes.items()
        if shape.units[axis]
        for piece in row.slices
    }
    wrong = (name for name, shape in skeleton.shapes.items() if name in infos and infos[name].shape != shape)
    return next((name for name in wrong if name not in said), None)


def _recorded(
    config: dict[str, Any],
    family: FoundFamily,
    after: Sequence[LayerShape],
    skeleton: Skeleton,
    infos: Mapping[str, TensorInfo],
) -> dict[str, Any]:
    config = dict(config)
    state = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    own: dict[str, Any] = {}
    for i, shape in enumerate(after):
        said = _layer_record(family, i, shape, state, skeleton, infos)
        if said:
            own[f"{i:03d}"] = said
    module = MODELING_FILE.removesuffix(".py")
    config.update(
        model_type=family.pruned_type,
        architectures=[f"Pruned{family.causal_lm}"],
        auto_map={auto: f"{module}.{name}" for auto, name in family.pruned_classes.items()},
        pruned={"layers": family.layers, "own": own},
    )
    return config


def _layer_record(
    family: FoundFamily,
    index: int,
    shape: LayerShape,
    state: Mapping[str, Shape],
    skeleton: Skeleton,
    infos: Mapping[str, TensorInfo],
) -> dict[str, Any]:
    """What of one layer differs from what the stock class would make of the config."""
    shapes: dict[str, list[int]] = {}
    said: dict[str, Any] = {}
    for axis, row in family.axes.items():
        if not shape.units[axis]:
            continue
        for piece in row.slices:
            info = infos.get(family.tensor_name(index, piece.name))
            name = piece.memory or piece.name
            stock = state.get(f"{family.layers}.{index}.{name}")
            if info is not None and stock is not None and stock != info.shape:
                shapes[name] = list(info.shape)
        if axis in shape.output_bias:
            down = infos[family.tensor_name(index, row.output_slice.name)]
            if f"{family.layers}.{index}.{row.output}.bias" not in state:
                shapes[f"{row.output}.bias"] = [down.shape[1 - row.output_slice.dim]]
        if axis.startswith("attention") and family.heads is not None:
            said |= _heads_record(family, index, row.modules[0], shape.units[axis], skeleton)
    return said | ({"shapes": shapes} if shapes else {})


def _heads_record(family: FoundFamily, index: int, path: str, groups: int, skeleton: Skeleton) -> dict[str, Any]:
    """Attributes of the attention's module that count heads, and its config, where the layer's number is its own."""
    heads, text = family.heads, skeleton.config.get_text_config()
    if heads is None:
        return {}
    whole = int(getattr(text, (heads.groups or heads.queries).rpartition(".")[2]))
    if groups == whole:
        return {}
    module = skeleton.model.get_submodule(f"{family.layers}.{index}.{path}")
    counts = {whole * heads.per_group: groups * heads.per_group, whole: groups}
    attributes = {
        name: counts[value]
        for name, value in vars(module).items()
        if isinstance(value, int) and value in counts and _COUNTS.search(name)
    }
    own = {key.rpartition(".")[2]: value for key, value in heads.of(groups).items() if key != heads.size}
    said: dict[str, Any] = {"attributes": {path: attributes}} if attributes else {}
    return said | ({"config": {path: own}} if hasattr(module, "config") else {})
