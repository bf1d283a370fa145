"""PrunePlan: which units stay, and everything needed to do it again; the only intermediate file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dicer.errors import PlanError
from dicer.files import as_output_error, write_whole
from dicer.model.units import AXES

PLAN_JSON = "dicer_plan.json"
PLAN_TENSORS = "dicer_plan.safetensors"
FORMAT = 2  # 1 knew neurons alone; it is still read

_MERGE_FIELDS = ("row", "weight_in", "weight_out")
_FIELDS = (*_MERGE_FIELDS, "means")


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer along one axis.

    Attributes:
        units: N, before.
        keep: int64 [K], sorted; empty where the whole sub-layer goes.
        scores: float32 [N], what the criterion said; kept for whoever wants to know which units mattered.
        row: int64 [N], the survivor that a unit is merged into, -1 for none; None where nothing is merged.
        weight_in: float32 [N], entries of M_in.
        weight_out: float32 [N], entries of M_out.
        means: float32 [N * C], the dense model's mean inputs of the output projection, C for each unit; a bias makes up
            for what the cut takes of them. None where nothing is compensated.
    """

    units: int
    keep: Tensor
    scores: Tensor
    row: Tensor | None = None
    weight_in: Tensor | None = None
    weight_out: Tensor | None = None
    means: Tensor | None = None

    def explain(self) -> str:
        """How much stays and goes."""
        return f"{self.units} -> {len(self.keep)} ({1 - len(self.keep) / self.units:.1%} removed)"

    def explain_scores(self) -> str:
        """How scores of kept and dropped units compare."""
        kept = torch.zeros(self.units, dtype=torch.bool)
        kept[self.keep] = True
        sides = (("kept", self.scores[kept]), ("dropped", self.scores[~kept]))
        return "score: " + ", ".join(f"{name} median {scores.median():.4g}" for name, scores in sides if len(scores))

    def merge_matrices(self) -> tuple[Tensor, Tensor] | None:
        """(M_in, M_out), each a sparse float32 [K, N]; None where nothing is merged."""
        if self.row is None or self.weight_in is None or self.weight_out is None:
            return None
        unit = torch.nonzero(self.row >= 0).flatten()  # [M]
        place = torch.stack([self.row[unit], unit])  # [2, M]
        shape = (len(self.keep), self.units)
        make = torch.sparse_coo_tensor
        return (
            make(place, self.weight_in[unit], shape, check_invariants=True),
            make(place, self.weight_out[unit], shape, check_invariants=True),
        )


@dataclass(frozen=True)
class PrunePlan:
    """A decision about a model, before any weight is written.

    Attributes:
        model: ``name``, ``model_type``, ``fingerprint`` of the model that it was made for.
        recipe: what was asked, without paths of the machine.
        calibration: provenance of the tokens; empty when none were needed.
        versions: of dicer, torch and transformers.
        axes: axis name -> layer -> what stays.
        blocks: layers that go whole, sorted; no axis names them.
        allocation: how the ratio was shared out: ``target``, ``whole``, what importances led to it, and ``notes`` on
            how far these can be trusted.
    """

    model: dict[str, str]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    axes: dict[str, dict[int, LayerPlan]] = field(default_factory=dict)
    blocks: tuple[int, ...] = ()
    allocation: dict[str, Any] = field(default_factory=dict)

    @property
    def mlp(self) -> dict[int, LayerPlan]:
        """The MLP axis."""
        return self.axes.get("mlp", {})

    @property
    def notes(self) -> list[str]:
        """What the user should know of the importances that led to it."""
        return list(self.allocation.get("notes", ()))

    def check_model(self, model_type: str, fingerprint: str) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: with what differs.
        """
        if self.model["model_type"] != model_type:
            raise PlanError(
                f"the plan was made for a '{self.model['model_type']}' model ({self.model['name']}), and this is a "
                f"'{model_type}'. Make a plan for this model with 'dicer plan'."
            )
        if self.model["fingerprint"] != fingerprint:
            raise PlanError(
                f"the plan was made for other weights ({self.model['name']}, fingerprint "
                f"{self.model['fingerprint'][:12]}; this model has {fingerprint[:12]}). Make a plan for this model "
                "with 'dicer plan'."
            )

    def files(self) -> dict[str, bytes]:
        """The plan as file name -> content; the same plan gives the same bytes."""
        tensors = {}
        axes: dict[str, dict[str, Any]] = {}
        for axis, layers in self.axes.items():
            for index, layer in sorted(layers.items()):
                axes.setdefault(axis, {})[str(index)] = {"units": layer.units, "keep": len(layer.keep)}
                for name in ("keep", "scores", *_FIELDS):
                    value = getattr(layer, name)
                    if value is not None:
                        tensors[f"{axis}.{index}.{name}"] = value.contiguous()
        record = {
            "format": FORMAT,
            "model": self.model,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "versions": self.versions,
            "axes": axes,
            "blocks": list(self.blocks),
            "allocation": self.allocation,
        }
        text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return {PLAN_JSON: text.encode(), PLAN_TENSORS: save(tensors)}

    def save(self, folder: Path) -> None:
        """Write the two files into a folder, which is made if needed.

        Raises:
            OutputError: they cannot be written.
        """
        with as_output_error(f"the plan to {folder}"):
            for name, content in self.files().items():
                write_whole(folder / name, content)

    def explain(self) -> list[str]:
        """One line for each block and module: how much goes, its transfer entropy if that decided, and its scores."""
        entropy = self.allocation.get("transfer_entropy", {})
        lines: dict[int, list[str]] = {}
        for index in sorted({*self.blocks, *range(len(entropy.get("blocks", ())))}):
            whole = "removed whole" if index in self.blocks else ""
            told = ", ".join(part for part in (whole, _te(entropy, "blocks", index)) if part)
            lines[index] = [f"layer {index:>3} block: {told}"]
        for axis, layers in self.axes.items():
            for index, layer in layers.items():
                told = ", ".join(part for part in (layer.explain(), _te(entropy, axis, index)) if part)
                lines.setdefault(index, []).append(f"layer {index:>3} {axis}: {told}; {layer.explain_scores()}")
        return [line for _, found in sorted(lines.items()) for line in found]

    def diff(self, other: PrunePlan) -> list[str]:
        """One line for each layer in which two plans keep different units, or merge others into them differently."""
        lines = [
            f"layer {index}: removed whole in the {'first' if index in self.blocks else 'second'} plan only"
            for index in sorted({*self.blocks} ^ {*other.blocks})
        ]
        for axis in sorted({*self.axes, *other.axes}):
            mine, theirs = self.axes.get(axis, {}), other.axes.get(axis, {})
            for index in sorted({*mine, *theirs}):
                a = set(mine[index].keep.tolist()) if index in mine else None
                b = set(theirs[index].keep.tolist()) if index in theirs else None
                if a is None or b is None:
                    lines.append(f"layer {index} {axis}: only in the {'second' if a is None else 'first'} plan")
                elif a != b:
                    both = len(a & b)
                    lines.append(
                        f"layer {index} {axis}: {both} kept by both, {len(a) - both} and {len(b) - both} by one"
                    )
                elif not _same_tensors(mine[index], theirs[index], _MERGE_FIELDS):
                    lines.append(f"layer {index} {axis}: the same kept, others merged into them differently")
                elif not _same_tensors(mine[index], theirs[index], ("means",)):
                    lines.append(f"layer {index} {axis}: the same kept, compensated differently")
        return lines


def _te(entropy: Mapping[str, list[float]], name: str, index: int) -> str:
    values = entropy.get(name, ())
    return f"transfer entropy {values[index]:.4g}" if index < len(values) else ""


def _same_tensors(first: LayerPlan, second: LayerPlan, names: tuple[str, ...]) -> bool:
    for name in names:
        a, b = getattr(first, name), getattr(second, name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
            return False
    return True


def load_plan(path: Path) -> PrunePlan:
    """Read a plan from its folder, its JSON file, or a checkpoint that carries it.

    Raises:
        PlanError: a file is missing, broken, of another format, or the two do not agree.
    """
    folder = path.parent if path.name == PLAN_JSON else path
    if folder.is_file():
        raise PlanError(f"{path} is no plan: give the folder of one, or its {PLAN_JSON}.")
    try:
        record = json.loads((folder / PLAN_JSON).read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
        if record.get("format") not in (1, FORMAT):
            raise PlanError(
                f"{folder / PLAN_JSON} has format {record.get('format')}; this version of dicer reads 1 to {FORMAT}."
            )
        record.setdefault("allocation", {})
        for part in ("model", "recipe", "calibration", "versions", "axes", "allocation"):
            if not isinstance(record.get(part), dict):
                raise ValueError(f"'{part}' is no table")
        _check_told(record)
        if "method" not in record["recipe"]:
            raise ValueError("its recipe does not say 'method'")
        blocks = _blocks(record)
        if not record["axes"].keys() <= set(AXES) or not (blocks or any(record["axes"].values())):
            raise ValueError(f"its axes are {sorted(record['axes'])}, expected layers of {' or '.join(AXES)}")
        tensors = load_file(folder / PLAN_TENSORS)
        axes = {
            str(axis): {
                int(i): _layer(tensors, axis, int(i), entry)
                for i, entry in sorted(layers.items(), key=lambda item: int(item[0]))
            }
            for axis, layers in record["axes"].items()
        }
        model = {key: str(record["model"][key]) for key in ("name", "model_type", "fingerprint")}
        if any(index in layers for index in blocks for layers in axes.values()):
            raise ValueError("a layer that goes whole is also cut")
        told = (record["recipe"], record["calibration"], record["versions"])
        return PrunePlan(model, *told, axes, blocks, record["allocation"])
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name if error.filename else PLAN_TENSORS
        raise PlanError(f"no plan at {path}: {name} is missing. 'dicer plan' writes one.") from None
    except PermissionError as error:
        raise PlanError(f"the plan at {path} cannot be read: {error.strerror}.") from None
    except KeyError as error:
        raise PlanError(f"the plan at {path} is broken: {error} is missing. Make it again with 'dicer plan'.") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise PlanError(f"the plan at {path} is broken: {error}. Make it again with 'dicer plan'.") from None


def _check_told(record: Mapping[str, Any]) -> None:
    """What is shown of an allocation: numbers, and what they are a fraction of."""
    told = record["allocation"]
    if not told:
        return
    numbers = [told.get(name) for name in ("target", "whole")]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers) or told["whole"] <= 0:
        raise ValueError("its allocation has no 'target' and 'whole' in parameters")
    if not isinstance(record["recipe"].get("ratio_of"), str):
        raise ValueError("its recipe does not say 'ratio_of'")


def _blocks(record: Mapping[str, Any]) -> tuple[int, ...]:
    blocks = record.get("blocks", [])
    good = isinstance(blocks, list) and all(type(i) is int and i >= 0 for i in blocks)
    if not good or blocks != sorted(set(blocks)):
        raise ValueError("'blocks' is no sorted list of layers")
    return tuple(blocks)


def _layer(tensors: Mapping[str, Tensor], axis: str, index: int, entry: Mapping[str, Any]) -> LayerPlan:
    prefix, units = f"{axis}.{index}.", int(entry["units"])
    keep, scores = tensors[prefix + "keep"], tensors[prefix + "scores"]
    merges = [tensors.get(prefix + name) for name in _MERGE_FIELDS]
    means = tensors.get(prefix + "means")
    ordered = keep.ndim == 1 and keep.dtype == torch.int64 and bool((keep.diff() > 0).all())
    outside = ordered and len(keep) and (int(keep[0]) < 0 or int(keep[-1]) >= units)
    if not ordered or outside or scores.shape != (units,):
        raise ValueError(f"layer {index} does not keep a sorted selection of its {units} units")
    if len(keep) != entry["keep"]:
        raise ValueError(f"layer {index} keeps {len(keep)} units in one file and {entry['keep']} in the other")
    if any(m is None for m in merges) != all(m is None for m in merges):
        raise ValueError(f"layer {index} has a part of a merge only")
    row = merges[0]
    if row is not None and (
        any(m is None or m.shape != (units,) for m in merges)
        or row.dtype != torch.int64
        or int(row.min()) < -1
        or int(row.max()) >= len(keep)
        or any(m.dtype != torch.float32 or not m.isfinite().all() for m in merges[1:] if m is not None)
        or axis != "mlp"
    ):
        raise ValueError(f"layer {index} has a merge that does not fit its {units} units")
    if means is not None and (means.ndim != 1 or not len(means) or len(means) % units or not means.isfinite().all()):
        raise ValueError(f"layer {index} has means that do not fit its {units} units")
    return LayerPlan(units, keep, scores, merges[0], merges[1], merges[2], means)
