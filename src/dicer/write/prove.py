"""The proof of a family that was found: on a small twin of the user's own model, cut and masked must be the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import DicerError
from dicer.model.families import Family
from dicer.model.source import ModelSource
from dicer.model.structure.experts import EXPERT_NEURONS
from dicer.model.units import Axis
from dicer.write.checkpoint import build_model
from dicer.write.proof import Proof, check_proofs
from dicer.write.surgery import plan_cut
from dicer.write.twin import Twin, masked_logits

WHOLE = " whole"  # behind an axis: its sub-layers, of which nothing stays
_SAME = 1e-4  # of the logits' standard deviation
_APART = 20.0  # a cut must move the logits by this many times what separates it from the masked model


def prove(source: ModelSource, axes: Collection[str]) -> list[Proof]:
    """Prove axes of a family.

    (a) A model made anew from the twin's tensors is the twin. (b) A cut through the whole path - surgery, config, the
    class of transformers, its loading - is the twin with the removed units' tensors zero. (c) It is not the dense twin.
    (d) With the units of one tensor taken for others it would not be the same, so the comparison can fail.

    Args:
        source: the model.
        axes: by their names; ``block`` for whole layers, ``mlp whole`` for sub-layers of which nothing stays.
    """
    if not axes:
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
    return [
        _blocks(source)
        if name == "block"
        else _whole(twin, name)
        if name.endswith(WHOLE)
        else _axis(twin, source.family, name, members)
        for name, members in _together(source.family, axes).items()
    ]


def proofs_for(source: ModelSource, plan: PrunePlan, proofs: Sequence[Proof]) -> list[Proof]:
    """Proofs of all that a plan does: also that layers and sub-layers can go whole, where nothing of them stays.

    Args:
        source: the model.
        plan: what stays.
        proofs: what was proven already.

    Raises:
        UnknownFamily: something cannot be proven.
    """
    needed = {f"{axis}{WHOLE}" for axis, layers in plan.axes.items() if any(not len(i.keep) for i in layers.values())}
    needed |= {"block"} if plan.blocks else set()
    check_proofs(source, more := prove(source, sorted(needed - {proof.axis for proof in proofs})))
    for proof in (found := [*proofs, *more]):
        proof.check_plan(plan)
    return found


def proven(source: ModelSource, plan: PrunePlan, proofs: Sequence[Proof]) -> PrunePlan:
    """The same plan with its proofs in it.

    Raises:
        UnknownFamily: it holds what cannot be proven.
    """
    return replace(plan, proof=[proof.record() for proof in proofs_for(source, plan, proofs)])


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
        error, moved = twin.apart(cut, masked_logits(twin, plan)), twin.apart(cut, twin.dense)
        other = twin.apart(cut, masked_logits(twin, _others(plan)))
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
        error, moved = twin.apart(cut, masked_logits(twin, plan)), twin.apart(cut, twin.dense)
    except Exception as fault:
        return _line(fault)
    return "" if _agrees(error, moved) else _numbers(name, tensor, error, moved)


def _numbers(axis: str, tensor: str, error: float, moved: float) -> str:
    if moved < 1e-6:
        return f"its units do nothing: without them the logits are the same ({tensor})"
    return (
        f"the model with units of {axis} cut out (of {tensor} and what belongs to it) differs from the one in which "
        f"they are zero by {error:.2g} standard deviations of the logits"
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


def _whole(twin: Twin, name: str) -> Proof:
    """A sub-layer goes whole, in each layer in turn: it adds nothing, as if its units and its bias were zero."""
    axis = name.removesuffix(WHOLE)
    found = []
    for index, units in enumerate(twin.family.counts.get(axis, ())):
        if not units:
            continue
        plan = PrunePlan({}, {}, {}, {}, {axis: {index: LayerPlan(units, torch.arange(0), torch.zeros(units))}})
        try:
            cut = twin.logits(build_model(plan_cut(twin.source, plan), torch.float32))
        except DicerError as fault:
            return Proof(name, why_not=str(fault))
        except Exception as fault:
            return Proof(name, why_not=f"what is cut cannot be built ({_line(fault)})")
        error, moved = twin.apart(cut, masked_logits(twin, plan)), twin.apart(cut, twin.dense)
        if not _agrees(error, moved):
            return Proof(name, error, moved, why_not=_numbers(axis, twin.family.axes[axis].output, error, moved))
        found.append(Proof(name, error, moved))
    return max(found, key=lambda own: own.error, default=Proof(name, why_not="a small twin of it has none"))


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


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
