"""The proof of a family that was found: on a small twin of the user's own model, cut and masked must be the same."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import DicerError, UnknownFamily
from dicer.model.families import Family
from dicer.model.source import ModelSource
from dicer.model.structure.find import find_family
from dicer.model.structure.layers import Layers, kinds_of_layers, with_layers
from dicer.model.structure.skeleton import Shape, build, changed, flat_values, on_disk, quiet, stock_config
from dicer.model.tensors import MemorySource
from dicer.model.units import Axis, Slice
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

TOKENS = (2, 12)
_VOCABULARY = 256
_WIDTH = 64  # neurons of a twin's MLPs at most
_EXPERTS = 16  # experts of a twin's layers at most, but for what a token is sent to
EXPERT_NEURONS = "mlp.experts"  # what the neurons inside all experts are called where they are proven together
_GROUPS = 4  # key-value groups of a twin's attention at most
_SAME = 1e-4  # of the logits' standard deviation
_APART = 20.0  # a cut must move the logits by this many times what separates it from the masked model


@dataclass(frozen=True)
class Proof:
    """What came of one axis.

    Attributes:
        axis: ``mlp``, ``attention`` ..., or ``block``.
        error: largest difference of the logits of the cut and of the masked model, of their standard deviation.
        moved: largest difference of the logits of the cut and of the dense model, likewise.
        why_not: the reason where it is not proven; empty where it is.
        differing: why layers cannot differ in width; empty where they can.
        but_first: why the first layer has to stay, where whole layers can go; empty where it can go, too.
    """

    axis: str
    error: float = 0.0
    moved: float = 0.0
    why_not: str = ""
    differing: str = ""
    but_first: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is proven."""
        return not self.why_not

    def __str__(self) -> str:
        if not self.holds:
            return f"{self.axis}: not proven, {self.why_not}"
        apart = "" if not self.differing else f"; the same width in every layer only: {self.differing}"
        apart += "" if not self.but_first else f"; all but the first layer: {self.but_first}"
        return (
            f"{self.axis}: proven (cut and masked differ by {self.error:.1e}, the cut moves by {self.moved:.1e}){apart}"
        )

    def record(self) -> dict[str, Any]:
        """As it stands in a plan."""
        found = {"axis": self.axis, "error": self.error, "moved": self.moved, "differing": not self.differing}
        return found | ({"first_layer_stays": True} if self.but_first else {})

    def check_plan(self, plan: PrunePlan) -> None:
        """Refuse what of a plan is not proven though the axis is.

        Raises:
            UnknownFamily: the first layer would go, or layers would differ, and neither is proven.
        """
        if self.axis == "block" and self.but_first and 0 in plan.blocks:
            raise UnknownFamily(
                f"the first layer cannot go whole: {self.but_first}. Leave it out with --layers 1-, or prune another --axis."
            )
        kept = {len(layer.keep) / layer.units for layer in plan.axes.get(self.axis, {}).values()}
        if self.differing and len(kept) > 1:
            raise UnknownFamily(
                f"layers of this model cannot differ in width along {self.axis}: {self.differing}. Use --allocate uniform "
                "on all layers, or another --axis."
            )


def check_proofs(source: ModelSource, proofs: Sequence[Proof]) -> None:
    """Refuse what is not proven.

    Raises:
        UnknownFamily: with the axis, and the number.
    """
    for proof in proofs:
        if not proof.holds:
            raise UnknownFamily(
                f"{source.name}: the structure that was found for {proof.axis} of a '{source.family.model_type}' does not "
                f"hold: {proof.why_not}. Choose another --axis, or say the structure with --family FILE.toml."
            )


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
        self.family = find_family(config, self.kind, where=replace(family.where, count=len(kept)))
        self.tensors = {name: tensor.clone() for name, tensor in on_disk(self.model).items()}
        raw = json.loads(json.dumps(config.to_dict(), default=str)) | {"architectures": [self.kind.__name__]}
        self.source = ModelSource("twin", None, config, raw, self.family, MemorySource(self.tensors))
        vocabulary = min(int(self.source.text_config.vocab_size), _VOCABULARY)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(vocabulary // 4, vocabulary - 8, TOKENS, generator=generator)
        self.dense = self.logits(self.loaded(self.tensors))

    def loaded(self, tensors: Mapping[str, Tensor]) -> Any:
        """The stock class with other tensors, by their names on disk."""
        with quiet():
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


def prove(source: ModelSource, axes: Collection[str]) -> list[Proof]:
    """Prove axes of a family.

    (a) A model made anew from the twin's tensors is the twin. (b) A cut through the whole path - surgery, config, the
    class of transformers, its loading - is the twin with the removed units' tensors zero. (c) It is not the dense twin.
    (d) With the units of one tensor taken for others it would not be the same, so the comparison can fail.

    Args:
        source: the model.
        axes: by their names; ``block`` for whole layers.
    """
    try:
        twin = Twin(source)
        reload = twin.apart(twin.logits(twin.model), twin.dense)
    except Exception as error:  # whatever a class raises of a model that it does not take
        why = f"no small twin of it can be built and run ({_line(error)})"
        return [Proof(axis, why_not=why) for axis in axes]
    if not reload <= _SAME:
        why = f"a twin of it, saved and loaded uncut, is another model (logits off by {reload:.2g})"
        return [Proof(axis, why_not=why) for axis in axes]
    return [
        _blocks(source) if name == "block" else _axis(twin, source.family, name, members)
        for name, members in _together(source.family, axes).items()
    ]


def _together(family: Family, axes: Collection[str]) -> dict[str, list[str]]:
    """Axes by what is proven at once: the neurons of all experts are cut together, as one tensor holds them."""
    found: dict[str, list[str]] = {}
    for name in axes:
        axis = family.axes.get(name)
        inside = axis is not None and axis.routed is not None and not axis.kind.routed
        found.setdefault(EXPERT_NEURONS if inside else name, []).append(name)
    return found


def _axis(twin: Twin, family: Family, name: str, members: Sequence[str]) -> Proof:
    own = twin.family.axes
    members = [axis for axis in members if axis in own] if len(members) > 1 else members  # a twin has fewer experts
    if any(axis not in own or not _same_tensors(own[axis], family.axes[axis]) for axis in members) or not members:
        return Proof(name, why_not="a small twin of it has other tensors there")
    tensor = own[members[0]].slices[0].name
    try:
        plan = _plan(twin, members, differ=False)
        cut = twin.logits(build_model(plan_cut(twin.source, plan), torch.float32))
        error, moved = twin.apart(cut, _masked_logits(twin, plan)), twin.apart(cut, twin.dense)
        other = twin.apart(cut, _masked_logits(twin, _others(plan)))
    except Exception as fault:
        return Proof(name, why_not=f"what is cut cannot be built ({_line(fault)})")
    if not _agrees(error, moved):
        return Proof(name, error, moved, why_not=_numbers(name, tensor, error, moved))
    if not other > max(1e-5, _APART * error):
        why = f"units of {tensor} taken for others change nothing, so no comparison can tell them apart"
        return Proof(name, error, moved, why_not=why)
    return Proof(name, error, moved, differing=_differing(twin, name, members, tensor))


def _same_tensors(first: Axis, second: Axis) -> bool:
    return [piece.name for piece in first.slices] == [piece.name for piece in second.slices]


def _differing(twin: Twin, name: str, members: Sequence[str], tensor: str) -> str:
    """Why layers cannot differ in width; empty where they can."""
    if twin.family.axes[members[0]].routed is not None:
        return "experts are the same number in every layer, and of one width"
    try:
        plan = _plan(twin, members, differ=True)
        cut = twin.logits(build_model(plan_cut(twin.source, plan), torch.float32))
        error, moved = twin.apart(cut, _masked_logits(twin, plan)), twin.apart(cut, twin.dense)
    except Exception as fault:
        return _line(fault)
    return "" if _agrees(error, moved) else _numbers(name, tensor, error, moved)


def _numbers(axis: str, tensor: str, error: float, moved: float) -> str:
    if moved < 1e-6:
        return f"its units do nothing: without them the logits are the same ({tensor})"
    return (
        f"the model with units of {axis} cut out (of {tensor} and what belongs to it) differs from the one in which they "
        f"are zero by {error:.2g} standard deviations of the logits"
    )


def _agrees(error: float, moved: float) -> bool:
    return error <= _SAME and moved > 1e-6 and moved > _APART * error


def _plan(twin: Twin, axes: Sequence[str], *, differ: bool) -> PrunePlan:
    """Three fifths of the units stay, others in each layer; or more in one layer than in the next."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, dict[int, LayerPlan]] = {}
    for axis in axes:
        for index, units in enumerate(twin.family.counts[axis]):
            if not units:
                continue
            least = _step(twin, axis, units)
            keep = max(units * 3 // 5 // least, 1) * least
            if differ and keep > least:
                keep = max(keep - (index % 2 + 1) * least, least)
            row = twin.family.axes[axis]
            keep = max(keep, row.least)
            if keep >= units:
                keep = max(units - least, 1)
            size, parts = units // row.parts, row.parts
            chosen = [torch.randperm(size, generator=generator)[: keep // parts] + part * size for part in range(parts)]
            found.setdefault(axis, {})[index] = LayerPlan(units, torch.cat(chosen).sort().values, torch.zeros(units))
    return PrunePlan({}, {}, {}, {}, found)


def _others(plan: PrunePlan) -> PrunePlan:
    """As many of the units, and each the next one."""
    layers = {
        axis: {i: replace(own, keep=((own.keep + 1) % own.units).sort().values) for i, own in layers.items()}
        for axis, layers in plan.axes.items()
    }
    return PrunePlan({}, {}, {}, {}, layers)


def _step(twin: Twin, axis: str, units: int) -> int:
    """What widths of the twin are multiples of: 8, as grouped kernels ask, where that leaves a choice; heads: 1."""
    row = twin.family.axes[axis]
    if not row.kind.can_merge:  # heads, experts
        return row.parts
    share = twin.family.factors[axis]
    whole = max(1, share.numerator)
    return whole * 8 if units >= whole * 24 else whole if units > whole else 1


def _masked_logits(twin: Twin, plan: PrunePlan) -> Tensor:
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
                    elif piece.roles == ("router_bias",) and "correction" in (piece.memory or piece.name):
                        tensor.data[..., lost] = -1e9

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and mask what a router's map gives."""
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].data_ptr() in self._gone:
            return output.index_fill(-1, self._gone[args[1].data_ptr()], -math.inf)
        return output


def masked(source: ModelSource, plan: PrunePlan) -> dict[str, Tensor]:
    """The dense model's tensors in which the rows of all units that go are zero; whole experts stay as they are."""
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


def _blocks(source: ModelSource) -> Proof:
    """Whole layers: a twin with two of each kind, without each of them in turn."""
    try:
        twin = Twin(source, each=2)
        found = [_without(twin, index) for index in range(twin.family.where.count)]
    except DicerError as error:
        return Proof("block", why_not=str(error))
    except Exception as error:
        return Proof("block", why_not=f"what is cut cannot be built ({_line(error)})")
    bad = [i for i, proof in enumerate(found) if not proof.holds]
    worst = found[bad[-1]] if bad else max(found, key=lambda proof: proof.error)
    if bad == [0] and len(found) > 2:  # some classes make the first layer otherwise
        worst = max(found[1:], key=lambda proof: proof.error)
        return replace(worst, but_first=found[0].why_not)
    return worst


def _without(twin: Twin, index: int) -> Proof:
    """One layer of a twin goes whole."""
    try:
        cut = build_model(plan_cut(twin.source, PrunePlan({}, {}, {}, {}, {}, (index,))), torch.float32)
        without = twin.logits(cut)
    except Exception as error:
        return Proof("block", why_not=f"what is cut cannot be built ({_line(error)})")
    passed = twin.logits(_passing(twin.loaded(twin.tensors), twin.family.layers, index))
    apart, moved = twin.apart(without, passed), twin.apart(without, twin.dense)
    return Proof("block", apart, moved, why_not="" if _agrees(apart, moved) else _of_blocks(apart, moved))


def _of_blocks(worst: float, least: float) -> str:
    if least < 1e-6:
        return "a layer does nothing: without it the logits are the same"
    return (
        f"a model without a layer differs from the one in which that layer is passed by, by {worst:.2g} standard "
        "deviations of the logits: something goes by the layer's number"
    )


def _passing(model: Any, layers: str, index: int) -> Any:
    """A model in which one layer hands on what it is given, in the form in which it returns it."""
    layer = model.get_submodule(layers)[index]
    forward: Callable[..., Any] = layer.forward

    def passed(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        returned = forward(hidden, *args, **kwargs)
        return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden

    layer.forward = passed
    return model


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


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
