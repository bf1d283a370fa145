"""PrunePlan: which units stay, and everything needed to do it again; the only intermediate file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dicer.ask.axes import kind_of
from dicer.decide.layer_plan import LEARNED, MERGE, REPAIR, Repair
from dicer.decide.layer_plan import LayerPlan as LayerPlan
from dicer.decide.layer_plan import Merge as Merge
from dicer.decide.plan_file import FORMAT, WITHOUT_LEARNED, WITHOUT_REPAIR, PlanFile, Widths, first_fault
from dicer.decide.plan_file import TENSORS as TENSORS
from dicer.errors import PlanError
from dicer.files import as_output_error, write_whole
from dicer.machine import free_memory
from dicer.reading import TABLES, check_plain, read_bytes

PLAN_JSON = "dicer_plan.json"


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
        proof: of each axis, where the model's structure was found: how far the cut of a small twin was from the masked
            one, and how far the cut moved it.
    """

    model: dict[str, str]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    axes: dict[str, dict[int, LayerPlan]] = field(default_factory=dict)
    blocks: tuple[int, ...] = ()
    allocation: dict[str, Any] = field(default_factory=dict)
    proof: list[dict[str, Any]] = field(default_factory=list)

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
        tensors: dict[str, Tensor] = {}
        axes: dict[str, dict[str, Any]] = {}
        for axis, layers in self.axes.items():
            for index, layer in sorted(layers.items()):
                axes.setdefault(axis, {})[str(index)] = layer.widths()
                tensors |= {f"{axis}.{index}.{name}": tensor for name, tensor in layer.tensors().items()}
        repairs = [layer.repair for part in self.axes.values() for layer in part.values() if layer.repair]
        learned = any(repair.learned for repair in repairs)
        record = {
            "format": FORMAT if learned else WITHOUT_LEARNED if repairs else WITHOUT_REPAIR,
            "model": self.model,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "versions": self.versions,
            "axes": axes,
            "blocks": list(self.blocks),
            "allocation": self.allocation,
            **({"proof": self.proof} if self.proof else {}),
        }
        text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return {PLAN_JSON: text.encode(), TENSORS: save(tensors)}

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
                elif not _same_tensors(mine[index], theirs[index], MERGE):
                    lines.append(f"layer {index} {axis}: the same kept, others merged into them differently")
                elif not _same_tensors(mine[index], theirs[index], (*REPAIR, LEARNED)):
                    lines.append(f"layer {index} {axis}: the same kept, repaired differently")
                elif not _same_tensors(mine[index], theirs[index], ("means",)):
                    lines.append(f"layer {index} {axis}: the same kept, compensated differently")
        return lines


def _te(entropy: Mapping[str, list[float]], name: str, index: int) -> str:
    values = entropy.get(name, ())
    return f"transfer entropy {values[index]:.4g}" if index < len(values) else ""


def _same_tensors(first: LayerPlan, second: LayerPlan, names: tuple[str, ...]) -> bool:
    a, b = ({n: t for n, t in layer.tensors().items() if n.startswith(names)} for layer in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load_plan(path: Path) -> PrunePlan:
    """Read a plan from its folder, its JSON file, or a checkpoint that carries it.

    Raises:
        PlanError: a file is missing, broken, of another format, or the two do not agree.
    """
    folder = path.parent if path.name == PLAN_JSON else path
    if folder.is_file():
        raise PlanError(f"{path} is no plan: give the folder of one, or its {PLAN_JSON}.")
    try:
        file = PlanFile.model_validate_json(read_bytes(folder / PLAN_JSON, TABLES))
        tensors = _tensors(folder / file.tensors)
        axes = {
            axis: {int(i): _layer(tensors, axis, i, layers[i]) for i in sorted(layers, key=int)}
            for axis, layers in file.axes.items()
        }
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name if error.filename else TENSORS
        raise PlanError(f"no plan at {path}: {name} is missing. 'dicer plan' writes one.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise PlanError(f"the plan at {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        reason = first_fault(error)
        raise PlanError(f"the plan at {path} is broken: {reason}. Make it again with 'dicer plan'.") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanError(f"the plan at {path} is broken: {why}. Make it again with 'dicer plan'.") from None
    allocation = {} if file.allocation is None else file.allocation.model_dump()
    return PrunePlan(
        file.model.model_dump(),
        file.recipe,
        file.calibration,
        file.versions,
        axes,
        tuple(file.blocks),
        allocation,
        file.proof,
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a plan, all at once: what has no room in memory is none, whatever its file says."""
    check_plain(path)
    size, free = path.stat().st_size, free_memory(torch.device("cpu"))
    if free is not None and size > free:
        raise ValueError(f"{path.name} has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
    return load_file(path)


def _layer(tensors: Mapping[str, Tensor], axis: str, index: str, said: Widths) -> LayerPlan:
    def fault(what: str) -> ValueError:
        return ValueError(f"layer {index} {what}")

    own = {name: tensors.get(f"{axis}.{index}.{name}") for name in ("keep", "scores", *MERGE, "means", *REPAIR)}
    keep, scores, means, units = own["keep"], own["scores"], own["means"], said.units
    if keep is None or scores is None:
        raise fault(f"has no '{'scores' if keep is not None else 'keep'}' among its tensors")
    ordered = keep.ndim == 1 and keep.dtype == torch.int64 and bool((keep.diff() > 0).all())
    outside = ordered and len(keep) and (int(keep[0]) < 0 or int(keep[-1]) >= units)
    if not ordered or outside or scores.shape != (units,):
        raise fault(f"does not keep a sorted selection of its {units} units")
    if len(keep) != said.keep:
        raise fault(f"keeps {len(keep)} units in one file and {said.keep} in the other")
    if means is not None and (means.ndim != 1 or not len(means) or len(means) % units or not means.isfinite().all()):
        raise fault(f"has means that do not fit its {units} units")
    found = [tensor for name in MERGE if (tensor := own[name]) is not None]
    merge = Merge(*found) if len(found) == len(MERGE) else None
    if found and merge is None:
        raise fault("has a part of a merge only")
    if merge is not None and not (kind_of(axis).can_merge and merge.fits(units, len(keep))):
        raise fault(f"has a merge that does not fit its {units} units")
    prefix = f"{axis}.{index}.{LEARNED}"
    learned = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    layer = LayerPlan(units, keep, scores, merge, means, _repair(own, said, learned))
    if layer.repair is not None and not layer.repair.fits(len(keep)):
        raise fault("has a repaired output projection that does not fit its units")
    if layer.repair is not None and layer.repair.digest() != (said.repair or {}).get("sha256"):
        raise fault("has another repaired output projection than its JSON file says")
    return layer


def _repair(own: Mapping[str, Tensor | None], said: Widths, learned: dict[str, Tensor]) -> Repair | None:
    weight, bias = (own[name] for name in REPAIR)
    if (weight is None) != (said.repair is None) or (weight is None and learned):
        raise ValueError("a repaired output projection stands in one of its files only")
    if weight is None or said.repair is None:
        return None
    about = {name: value for name, value in said.repair.items() if name != "sha256"}
    return Repair(weight, bias, about, learned)
