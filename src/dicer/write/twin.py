"""A small model with one layer of each kind and the user's own settings in all else, whole or with units at zero."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.families import Family
from dicer.model.find import no_bars
from dicer.model.source import ModelSource
from dicer.model.structure.find import find_family
from dicer.model.structure.layers import Layers, kinds_of_layers, with_layers
from dicer.model.structure.skeleton import Shape, build, changed, flat_values, on_disk, quiet, stock_config
from dicer.model.tensors import MemorySource
from dicer.model.units import Slice

TOKENS = (2, 12)
_VOCABULARY = 256
_WIDTH = 64  # neurons of a twin's MLPs at most
_EXPERTS = 16  # experts of a twin's layers at most, but for what a token is sent to
_GROUPS = 4  # key-value groups of a twin's attention at most


class Twin:
    """A small model with one layer of each kind, and the user's own settings in all else.

    Args:
        source: the user's model.
        each: how many layers of each kind; two where layers are to go whole.
    """

    def __init__(self, source: ModelSource, each: int = 1) -> None:
        family = source.family
        self.kind: Any = family.stock_class
        config, kept = _small(source, family, self.kind, each)
        torch.manual_seed(0)
        with quiet():
            self.model: Any = self.kind._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        _fill(self.model)
        self.family = find_family(config, self.kind, row=family.said, where=replace(family.where, count=len(kept)))
        self.tensors = {name: tensor.clone() for name, tensor in on_disk(self.model).items()}
        raw = json.loads(json.dumps(config.to_dict(), default=str)) | {"architectures": [self.kind.__name__]}
        self.source = ModelSource("twin", None, config, raw, self.family, MemorySource(self.tensors))
        vocabulary = min(int(self.source.text_config.vocab_size), _VOCABULARY)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(vocabulary // 4, vocabulary - 8, TOKENS, generator=generator)
        self.dense = self.logits(self.loaded(self.tensors))

    def loaded(self, tensors: Mapping[str, Tensor]) -> Any:
        """The stock class with other tensors, by their names on disk."""
        with quiet(), no_bars():
            return self.kind.from_pretrained(
                None, config=copy.deepcopy(self.source.config), state_dict=dict(tensors), dtype=torch.float32
            ).eval()

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """[B, T, V] of the fixed tokens, float64."""
        found: Tensor = model(input_ids=self.ids, use_cache=False).logits
        return found.double()

    @property
    def spread(self) -> float:
        """What differences are measured by."""
        return max(float(self.dense.std()), 1e-6)

    def apart(self, first: Tensor, second: Tensor) -> float:
        """The largest difference of two logits."""
        if not first.isfinite().all() or not second.isfinite().all():
            return math.inf
        return float((first - second).abs().max()) / self.spread


def masked_logits(twin: Twin, plan: PrunePlan) -> Tensor:
    """Of the dense twin in which what goes is zero; tokens are sent to no expert that goes."""
    model = twin.loaded(masked(twin.source, plan))
    whole = {axis: layers for axis, layers in plan.axes.items() if twin.family.axes[axis].kind.routed}
    if not whole:
        return twin.logits(model)
    with _WithoutExperts(model, twin.family, whole):
        return twin.logits(model)


class _WithoutExperts(TorchFunctionMode):
    """The router's logit of every expert that goes is minus infinity, and no correction brings it back."""

    def __init__(self, model: Any, family: Family, axes: Mapping[str, Mapping[int, LayerPlan]]) -> None:
        super().__init__()
        self._gone: dict[int, Tensor] = {}
        for axis, layers in axes.items():
            for index, own in layers.items():
                lost = torch.tensor(sorted({*range(own.units)} - {*own.keep.tolist()}))
                layer = model.get_submodule(f"{family.layers}.{index}")
                state = dict(layer.named_parameters()) | dict(layer.named_buffers())
                for piece in family.axes[axis].slices:
                    tensor = state.get(piece.memory or piece.name)
                    if tensor is None:
                        continue
                    if piece.roles == ("router",) and tensor.ndim == 2:
                        self._gone[tensor.data_ptr()] = lost
                    elif "correction" in (piece.memory or piece.name):  # Laguna writes it beside its experts
                        tensor.data[..., lost] = -1e9

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and mask what a router's map gives."""
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].data_ptr() in self._gone:
            return output.index_fill(-1, self._gone[args[1].data_ptr()], -math.inf)
        return output


def masked(source: ModelSource, plan: PrunePlan) -> dict[str, Tensor]:
    """The dense model's tensors in which the rows of all units that go are zero; whole experts stay as they are.

    Of a sub-layer of which nothing stays the bias is zero, too.
    """
    axes = source.family.axes
    found = {}
    for name in source.tensors.infos():
        tensor, place = source.tensors.read(name), source.family.locate(name)
        for axis, layers in plan.axes.items():
            layer = layers.get(place[0]) if place else None
            if layer is None or place is None or axes[axis].kind.routed:
                continue
            for piece in axes[axis].slices:
                if piece.name == place[1]:
                    tensor = tensor * _stays(tensor, piece, layer)
            if place[1] == axes[axis].output_bias and not len(layer.keep):
                tensor = torch.zeros_like(tensor)
        found[name] = tensor
    return found


def _stays(tensor: Tensor, piece: Slice, layer: LayerPlan) -> Tensor:
    """One where a row stays and zero where it goes, in the shape of a tensor."""
    rows = torch.zeros(tensor.shape[piece.dim], dtype=tensor.dtype)
    rows[piece.rows(layer.keep, layer.units)] = 1
    shape = [1] * tensor.dim()
    shape[piece.dim] = -1
    mask = rows.reshape(shape)
    if piece.expert is None:
        return mask
    of_one = torch.ones_like(tensor)
    of_one[piece.expert] = mask.expand_as(tensor)[piece.expert]
    return of_one


def _small(source: ModelSource, family: Family, kind: Any, each: int) -> tuple[Any, list[int]]:
    """The config of a twin: layers of each kind, few tokens, narrow MLPs, few heads; the rest is the user's own."""
    config = family_config(source)
    layers = family.where
    shapes = {name: info.shape for name, info in source.tensors.infos().items()}
    keep = kinds_of_layers(config, layers, shapes) if each == 1 else _several(config, family, shapes, each)
    shorter = _if_it_builds(kind, config, lambda own: with_layers(own, layers, keep))
    if shorter is config or not _alike(shorter, kind, layers, keep, shapes):
        keep = [*range(max(keep) + 1)]  # the class makes a layer by its number
        shorter = _if_it_builds(kind, config, lambda own: with_layers(own, layers, keep))
    if shorter is config or not _alike(shorter, kind, layers, keep, shapes):
        keep, shorter = [*range(layers.count)], config
    config = shorter
    for values in _shrunk(config, family):
        config = _if_it_builds(kind, config, partial(changed, values=values))
    return config, keep


def _alike(shorter: Any, kind: Any, layers: Layers, keep: Sequence[int], shapes: Mapping[str, Shape]) -> bool:
    """Whether the layers of a shorter model have the tensors of those that they stand for."""
    found = replace(layers, count=len(keep)).inside(build(shorter, kind).shapes)
    names = layers.inside(shapes)
    return [set(tensors) for tensors in found] == [set(names[i]) for i in keep]


def _several(config: Any, family: Family, shapes: Mapping[str, Any], each: int) -> list[int]:
    first = kinds_of_layers(config, family.where, shapes)
    inside = family.where.inside(dict(shapes))
    keep = {*first}
    for index in first:
        alike = [i for i in range(index + 1, family.where.count) if inside[i] == inside[index] and i not in keep]
        keep.update(alike[: each - 1])
    return sorted(keep)


def family_config(source: ModelSource) -> Any:
    """The stock config of a model, also of one that was pruned before."""
    return stock_config(source.config)


def _if_it_builds(kind: Any, config: Any, make: Callable[[Any], Any]) -> Any:
    """Another config where the class takes it; else the same."""
    try:
        with quiet():
            other = make(config)
        build(other, kind)
    except Exception:  # whatever a class raises of a config that it does not take
        return config
    return other


def _shrunk(config: Any, family: Family) -> list[dict[str, Any]]:
    """Changes to a config, one after the other, that make a twin small; those that its class does not take are left."""
    values = flat_values(config)
    changes: list[dict[str, Any]] = []
    for key, value in values.items():
        if re.search(r"(^|\.)vocab_size$", key) and isinstance(value, int) and value > 4 * _VOCABULARY:
            outer = key.rpartition(".")[0]
            ids = {
                name: 0
                for name, number in values.items()
                if name.endswith(("token_id", "token_index")) and isinstance(number, int) and number >= _VOCABULARY
            }
            changes.append(
                {key: _VOCABULARY, **{n: v for n, v in ids.items() if not outer or outer in n or "." not in n}}
            )
    for axis, share in family.factors.items():
        key = family.axes[axis].width_keys[-1]
        value = values.get(key)
        if axis.startswith("mlp") and isinstance(value, int) and value * share > _WIDTH:
            changes.append({key: max(2, int(_WIDTH / share))})
    if family.heads is not None and family.heads.count > _GROUPS:
        changes.append(family.heads.of(_GROUPS))
    if (experts := family.axes.get("experts")) is not None:
        count = values.get(experts.width_keys[-1])
        fewer = math.lcm(experts.parts, 1) * max(1, math.ceil(max(_EXPERTS, 2 * experts.least) / experts.parts))
        if isinstance(count, int) and count > fewer:
            changes.append(dict.fromkeys(experts.width_keys, fewer))
    vision = config.to_dict().get("vision_config")
    if isinstance(vision, dict):
        for key in ("num_hidden_layers", "depth"):
            if isinstance(vision.get(key), int) and vision[key] > 1:
                changes.append({f"vision_config.{key}": 1})
    return changes


def _fill(model: nn.Module) -> None:
    """Random weights that keep activations of the size of one, whatever the widths; norms near one, no bias of zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point() or (name.endswith(("inv_freq", "A_log", "dt_bias", ".D"))):
                continue
            if tensor.dim() > 1:
                tensor.normal_(0, 1.5 / math.sqrt(tensor.shape[-1]), generator=generator)
            elif "norm" in name or "ln_" in name or name.endswith("layernorm.weight"):
                tensor.normal_(1.0, 0.1, generator=generator)
            elif isinstance(tensor, nn.Parameter) or "bias" in name:
                tensor.normal_(0, 0.1, generator=generator)
