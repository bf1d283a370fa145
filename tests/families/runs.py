"""The real runs of the matrix: for each cell that is proven, what prunes a folder into another, at random units."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dicer
from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.families import Family
from dicer.model.source import ModelSource


def _passes(row: Mapping[str, str], cell: str) -> bool:
    return row[cell].startswith("PASS")


def runs(
    dense: Path, source: ModelSource, family: Family, by_column: Mapping[str, list[str]], row: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], Callable[[Path], PrunePlan]]]:
    """(cells that it is for, what prunes the dense folder into another) for each run that the proofs allow."""
    inside = bool(by_column["expert neurons"])
    mlp = tuple(f"{c} uniform" for c in ("neurons", "expert neurons") if by_column[c])
    if mlp and all(_passes(row, cell) for cell in mlp):
        yield mlp, _by_recipe(dense, axis="mlp", ratio=0.4)
    else:  # of the two, --axis mlp takes both or none
        for cell in mlp:
            if _passes(row, cell):
                yield (cell,), _by_plan(dense, source, family, by_column[cell.removesuffix(" uniform")], 0.4, 0.4)
    if _passes(row, "neurons differing"):
        yield (
            ("neurons differing",),
            _by_plan(dense, source, family, by_column["neurons"], 0.4, 0.2)
            if inside
            else _by_file(dense, family, by_column["neurons"], "mlp", 0.4, 0.2),
        )
    if _passes(row, "heads uniform"):
        yield ("heads uniform",), _by_recipe(dense, axis="attention", ratio=0.5)
    if _passes(row, "heads differing"):
        yield ("heads differing",), _by_file(dense, family, by_column["heads"], "attention", 0.5, 0.0)
    if _passes(row, "blocks uniform"):
        yield ("blocks uniform",), _without_block(dense, source, family)
    if _passes(row, "experts uniform"):
        yield ("experts uniform",), _by_recipe(dense, axis="experts", ratio=0.25)


def _by_recipe(dense: Path, **recipe: Any) -> Callable[[Path], PrunePlan]:
    def write(out: Path) -> PrunePlan:
        asked = dicer.Recipe(criterion="random", **recipe)
        return dicer.prune(dense, asked, dicer.Compute(device="cpu", dtype="float32"), output=out).plan

    return write


def _by_file(
    dense: Path, family: Family, axes: Sequence[str], kind: str, even: float, odd: float
) -> Callable[[Path], PrunePlan]:
    def write(out: Path) -> PrunePlan:
        there = [i for i in range(family.where.count) if any(family.counts[axis][i] for axis in axes)]
        ratios = {str(layer): even if place % 2 == 0 else odd for place, layer in enumerate(there)}
        out.parent.mkdir(exist_ok=True)
        file = out.with_suffix(".json")
        file.write_text(json.dumps({kind: ratios}))
        return _by_recipe(dense, axis=kind, allocate=str(file))(out)

    return write


def _by_plan(
    dense: Path, source: ModelSource, family: Family, axes: Sequence[str], even: float, odd: float
) -> Callable[[Path], PrunePlan]:
    """For what no recipe says: some of the axes of a kind."""

    def write(out: Path) -> PrunePlan:
        plans: dict[str, dict[int, LayerPlan]] = {}
        for number, axis in enumerate(axes):
            for layer, units in enumerate(family.counts[axis]):
                step = max(family.factors[axis].numerator, 8 if family.axes[axis].routed else 1)
                if units:
                    keep = max(int(units * (1 - (odd if layer % 2 else even))) // step, 1) * step
                    generator = torch.Generator().manual_seed(31 * number + layer)
                    chosen = torch.randperm(units, generator=generator)[:keep].sort().values
                    plans.setdefault(axis, {})[layer] = LayerPlan(units, chosen, torch.zeros(units))
        plan = _plan(source, plans)
        dicer.apply_plan(plan, dense, out)
        return plan

    return write


def _plan(source: ModelSource, axes: dict[str, dict[int, LayerPlan]], blocks: tuple[int, ...] = ()) -> PrunePlan:
    model = {
        "name": source.name,
        "model_type": str(source.config.model_type),
        "fingerprint": source.fingerprint,
    }
    said = {"method": "random", "axis": "block" if blocks else "mlp", "ratio": 0.25}
    return PrunePlan(model, said, {}, {}, axes, blocks)


def _without_block(dense: Path, source: ModelSource, family: Family) -> Callable[[Path], PrunePlan]:
    """Without the last layer but one, as --axis block would take it (which needs a text to choose it by)."""

    def write(out: Path) -> PrunePlan:
        plan = _plan(source, {}, (max(family.where.count - 2, 1),))
        dicer.apply_plan(plan, dense, out)
        return plan

    return write
