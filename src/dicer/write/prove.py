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

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import DicerError, UnknownFamily
from dicer.model.source import ModelSource
from dicer.model.structure.find import FoundFamily, find_family
from dicer.model.structure.layers import Layers, kinds_of_layers, with_layers
from dicer.model.structure.skeleton import Shape, build, changed, flat_values, on_disk, quiet, stock_config
from dicer.model.tensors import MemorySource
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

TOKENS = (2, 12)
_VOCABULARY = 256
_WIDTH = 64  # neurons of a twin's MLPs at most
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
    """

    axis: str
    error: float = 0.0
    moved: float = 0.0
    why_not: str = ""
    differing: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is proven."""
        return not self.why_not

    def __str__(self) -> str:
        if not self.holds:
            return f"{self.axis}: not proven, {self.why_not}"
        apart = "" if not self.differing else f"; the same width in every layer only: {self.differing}"
        return (
            f"{self.axis}: proven (cut and masked differ by {self.error:.1e}, the cut moves by {self.moved:.1e}){apart}"
        )

    def record(self) -> dict[str, Any]:
        """As it stands in a plan."""
        return {"axis": self.axis, "error": self.error, "moved": self.moved, "differing": not self.differing}


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
        if not isinstance(family, FoundFamily):
            raise TypeError("only a family that was found has to be proven")
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
    """Prove axes of a family that was found; one with a row needs no proof.

    (a) A model made anew from the twin's tensors is the twin. (b) A cut through the whole path - surgery, config, the
    class of transformers, its loading - is the twin with the removed units' tensors zero. (c) It is not the dense twin.
    (d) With the units of one tensor taken for others it would not be the same, so the comparison can fail.

    Args:
        source: the model.
        axes: by their names; ``block`` for whole layers.
    """
    if not isinstance(source.family, FoundFamily):
        return []
    try:
        twin = Twin(source)
        reload = twin.apart(twin.logits(twin.model), twin.dense)
    except Exception as error:  # whatever a class raises of a model that it does not take
        why = f"no small twin of it can be built and run ({_line(error)})"
        return [Proof(axis, why_not=why) for axis in axes]
    if not reload <= _SAME:
        why = f"a twin of it, saved and loaded uncut, is another model (logits off by {reload:.2g})"
        return [Proof(axis, why_not=why) for axis in axes]
    return [_blocks(source) if axis == "block" else _axis(twin, source.family, axis) for axis in axes]


def _axis(twin: Twin, family: FoundFamily, axis: str) -> Proof:
    own = twin.family.axes.get(axis)
    if own is None or [p.name for p in own.slices] != [p.name for p in family.axes[axis].slices]:
        return Proof(axis, why_not="a small twin of it has other tensors there")
    try:
        error, moved = _compared(twin, _plan(twin, axis, differ=False))
    except Exception as fault:
        return Proof(axis, why_not=f"what is cut cannot be built ({_line(fault)})")
    if not _agrees(error, moved):
        return Proof(axis, error, moved, why_not=_numbers(axis, own.slices[0].name, error, moved))
    if reason := _blind(twin, axis):
        return Proof(axis, error, moved, why_not=reason)
    differing = ""
    if sum(count > 0 for count in twin.family.counts[axis]) > 0:
        try:
            apart, moved_apart = _compared(twin, _plan(twin, axis, differ=True))
            if not _agrees(apart, moved_apart):
                differing = _numbers(axis, own.slices[0].name, apart, moved_apart)
        except Exception as fault:
            differing = _line(fault)
    return Proof(axis, error, moved, differing=differing)


def _numbers(axis: str, tensor: str, error: float, moved: float) -> str:
    if moved < 1e-6:
        return f"its units do nothing: without them the logits are the same ({tensor})"
    return (
        f"the model with units of {axis} cut out (of {tensor} and what belongs to it) differs from the one in which they "
        f"are zero by {error:.2g} standard deviations of the logits"
    )


def _agrees(error: float, moved: float) -> bool:
    return error <= _SAME and moved > 1e-6 and moved > _APART * error


def _plan(twin: Twin, axis: str, *, differ: bool) -> PrunePlan:
    """Three fifths of the units stay, others in each layer; or more in one layer than in the next."""
    generator = torch.Generator().manual_seed(7)
    layers = {}
    for index, units in enumerate(twin.family.counts[axis]):
        if not units:
            continue
        least = _step(twin, axis, units)
        keep = max(units * 3 // 5 // least, 1) * least
        if differ:
            keep = max(keep - (index % 2 + 1) * least, least) if keep > least else keep
        if keep >= units:
            keep = max(units - least, 1)
        chosen = torch.randperm(units, generator=generator)[:keep].sort().values
        layers[index] = LayerPlan(units, chosen, torch.zeros(units))
    return PrunePlan({}, {}, {}, {}, {axis: layers})


def _step(twin: Twin, axis: str, units: int) -> int:
    """What widths of the twin are multiples of: 8, as grouped kernels ask, where that leaves a choice; heads: 1."""
    if not axis.startswith("mlp"):
        return 1
    share = twin.family.factors[axis]
    whole = max(1, share.numerator)
    return whole * 8 if units >= whole * 24 else whole if units > whole else 1


def _compared(twin: Twin, plan: PrunePlan) -> tuple[float, float]:
    """How far the cut model is from the masked and from the dense one."""
    cut = twin.logits(build_model(plan_cut(twin.source, plan), torch.float32))
    return twin.apart(cut, twin.logits(twin.loaded(masked(twin.source, plan)))), twin.apart(cut, twin.dense)


def masked(source: ModelSource, plan: PrunePlan) -> dict[str, Tensor]:
    """The dense model's tensors in which the rows of all units that go are zero."""
    axes = source.family.sized(source.config)
    pieces = {(axis.name, piece.name): piece for axis in axes.values() for piece in axis.slices}
    found = {}
    for name in source.tensors.infos():
        tensor, place = source.tensors.read(name), source.family.locate(name)
        for axis, layers in plan.axes.items():
            piece = pieces.get((axis, place[1])) if place else None
            layer = layers.get(place[0]) if place else None
            if piece is not None and layer is not None:
                stays = torch.zeros(tensor.shape[piece.dim], dtype=tensor.dtype)
                stays[piece.rows(layer.keep, layer.units)] = 1
                shape = [1] * tensor.dim()
                shape[piece.dim] = -1
                tensor = tensor * stays.reshape(shape)
        found[name] = tensor
    return found


def _blind(twin: Twin, axis: str) -> str:
    """Why the comparison could not fail, if it could not: the output's units taken for others must make a difference."""
    index = next(i for i, units in enumerate(twin.family.counts[axis]) if units)
    piece = twin.family.axes[axis].output_slice
    name = next(n for n in twin.tensors if twin.family.locate(n) == (index, piece.name))
    units = twin.family.counts[axis][index]
    order = piece.rows(torch.arange(units).roll(1), units)
    wrong = {**twin.tensors, name: twin.tensors[name].index_select(piece.dim, order)}
    moved = twin.apart(twin.logits(twin.loaded(wrong)), twin.dense)
    if moved > 1e-5 or units == 1:
        return ""
    return f"units of {piece.name} put in another order change nothing, so no comparison can tell them apart"


def _blocks(source: ModelSource) -> Proof:
    """Whole layers: a twin with two of each kind, without each of them in turn."""
    try:
        twin, worst, least = Twin(source, each=2), 0.0, math.inf
        count = twin.family.where.count
        for index in range(count if count > 1 else 0):
            cut = build_model(plan_cut(twin.source, PrunePlan({}, {}, {}, {}, {}, (index,))), torch.float32)
            without = twin.logits(cut)
            passed = twin.logits(_passing(twin.loaded(twin.tensors), twin.family.layers, index))
            worst = max(worst, twin.apart(without, passed))
            least = min(least, twin.apart(without, twin.dense))
    except DicerError as error:
        return Proof("block", why_not=str(error))
    except Exception as error:
        return Proof("block", why_not=f"what is cut cannot be built ({_line(error)})")
    if not _agrees(worst, least):
        return Proof("block", worst, least, why_not=_of_blocks(worst, least))
    return Proof("block", worst, least)


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


def _small(source: ModelSource, family: FoundFamily, kind: Any, each: int) -> tuple[Any, list[int]]:
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


def _several(config: Any, family: FoundFamily, shapes: Mapping[str, Any], each: int) -> list[int]:
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


def _shrunk(config: Any, family: FoundFamily) -> list[dict[str, Any]]:
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
            changes.append({key: max(1, int(_WIDTH / share))})
    if family.heads is not None and family.heads.count > _GROUPS:
        changes.append(family.heads.of(_GROUPS))
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
