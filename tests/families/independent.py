"""What a pruned folder should compute, found without dicer's own account of where units lie.

The dense and the pruned folder are compared tensor by tensor: the weights are random, so every row of what was cut is
found again in one place of the dense tensor, and the rows that are not are what went. These are set to zero in the
dense model, which transformers then runs. What the plan says is held against the same rows. Whole experts: the
router's logits of those that went are minus infinity; whole layers: the layer hands on what it is given.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicer.decide.plan import PrunePlan
from families.tiny import auto_class, tiny_input

Keeps = Mapping[str, tuple[int, list[int]]]  # axis -> (units, which stay), of one layer
_CORRECTION = re.compile(r"correction|expert_bias|balanc")


class Wrong(Exception):  # noqa: N818 - a finding
    """A pruned folder holds something else than rows of the dense one, or others than its plan says."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("dicer_plan")]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """[B, T, V] of the fixed tokens."""
    found: Tensor = model(input_ids=tiny_input(), use_cache=False).logits
    return found.float()


def load(model_type: str, folder: Path) -> Any:
    """The stock model of a folder."""
    return auto_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()


def masked_logits(model_type: str, dense: Path, pruned: Path, plan: PrunePlan) -> Tensor:
    """Of the dense model without what the plan takes.

    Raises:
        Wrong: the pruned folder is not the dense one without it.
    """
    if plan.blocks:
        return logits(passing(load(model_type, dense), plan.blocks))
    if "experts" in plan.axes:
        return _without_experts(model_type, dense, pruned, plan)
    before = tensors_of(dense)
    after = _as_named(tensors_of(pruned), before)
    folder = pruned.with_name(f"{pruned.name}_masked")
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    found = {name: _masked(name, tensor, after[name], _keeps(plan, name)) for name, tensor in before.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return logits(load(model_type, folder))


def _as_named(tensors: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Tensors by names that have one more word before them, where all do (GPT-2's ``transformer.``)."""
    more = {name.partition(".")[2]: name for name in names}
    found = {name if name in names else more.get(name, name): tensor for name, tensor in tensors.items()}
    if found.keys() != {*names}:
        raise Wrong(f"other tensors: {sorted(found.keys() ^ {*names})[:3]}")
    return found


def _keeps(plan: PrunePlan, name: str) -> Keeps:
    """What the plan keeps of the layer that a tensor lies in: that of the first number in its name."""
    number = re.search(r"(?<=\.)\d+(?=\.)", f".{name}")
    layers = {axis: own[int(number[0])] for axis, own in plan.axes.items() if number and int(number[0]) in own}
    return {axis: (own.units, own.keep.tolist()) for axis, own in layers.items()}


def _masked(name: str, dense: Tensor, cut: Tensor, keeps: Keeps) -> Tensor:
    """The dense tensor with zeros for the rows that are not in the cut one."""
    shrunk = [dim for dim in range(dense.dim()) if dense.shape[dim] != cut.shape[dim]]
    if not shrunk:
        if not torch.equal(dense, cut):
            raise Wrong(f"{name} is of the same shape and has other values")
        return dense
    if shrunk[0] and (dense.dim() == 3 or (dense.dim() == 2 and re.search(r"experts.*bias", name))):  # one an expert
        parts = [_masked(f"{name}[{i}]", dense[i], cut[i], keeps) for i in range(len(dense))]
        return torch.stack(parts)
    if len(shrunk) > 1:
        raise Wrong(f"{name} has shrunk along {len(shrunk)} dimensions")
    rows = kept_rows(name, dense, cut, shrunk[0])
    if rows is None:
        return dense
    _as_planned(name, dense.shape[shrunk[0]], rows, keeps)
    mask = torch.zeros(dense.shape[shrunk[0]])
    mask[rows] = 1
    return dense * mask.reshape([-1 if dim == shrunk[0] else 1 for dim in range(dense.dim())])


def kept_rows(name: str, dense: Tensor, cut: Tensor, dim: int) -> list[int] | None:
    """Where the rows of the cut tensor lie in the dense one; None where rows are alike (rates of a state space)."""
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(dense.movedim(dim, 0).contiguous()):
        places.setdefault(row.contiguous().numpy().tobytes(), []).append(i)
    if any(len(place) > 1 for place in places.values()):
        return None
    rows = [places.get(row.contiguous().numpy().tobytes()) for row in cut.movedim(dim, 0).contiguous()]
    if None in rows:
        raise Wrong(f"{name} has rows that are not the dense model's")
    return [row[0] for row in rows if row is not None]


def _as_planned(name: str, count: int, rows: list[int], keeps: Keeps) -> None:
    """See that as many rows stay as units, and where a row is a unit, that it is the same ones."""
    fitting = [(units, keep) for units, keep in keeps.values() if len(rows) * units == count * len(keep)]
    exact = [keep for units, keep in fitting if units == count]
    if not fitting or (len(exact) == len(fitting) and rows not in exact):
        raise Wrong(f"{name} keeps other rows than its plan says")


def passing(model: Any, blocks: tuple[int, ...]) -> Any:
    """The model in which some layers hand on what they are given, in the form in which they return it."""
    lists = [
        part for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > max(blocks) and not re.search(r"vision|visual|audio", name)
    ]  # fmt: skip
    layers = max(lists, key=lambda part: sum(tensor.numel() for tensor in part.parameters()))
    for index in blocks:
        layers[index].forward = _hands_on(layers[index].forward)
    return model


def _hands_on(forward: Any) -> Any:
    def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        returned = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *returned[1:]) if isinstance(returned, tuple) else hidden_states

    return passed


def _without_experts(model_type: str, dense: Path, pruned: Path, plan: PrunePlan) -> Tensor:
    before, after, model = tensors_of(dense), tensors_of(pruned), load(model_type, dense)
    routers: dict[int, Tensor] = {}
    for name, tensor in before.items():
        cut, (units, keep) = after.get(name), _keeps(plan, name).get("experts", (0, []))
        if cut is None or cut.shape == tensor.shape or re.search(r"experts\.\d+\.", name):
            continue  # experts with numbers in their names have moved up
        dim = next(dim for dim in range(tensor.dim()) if tensor.shape[dim] != cut.shape[dim])
        if tensor.shape[dim] != units or kept_rows(name, tensor, cut, dim) not in (keep, None):
            raise Wrong(f"{name} keeps other rows than its plan says")
        lost = torch.tensor(sorted({*range(units)} - {*keep}))
        memory, own = _same_content(model, tensor)
        if own is not None and tensor.dim() == 2 and "experts" not in name and tensor.shape[0] == units:
            routers[own.data_ptr()] = lost
        elif own is not None and _CORRECTION.search(memory):
            own.data[..., lost] = -1e9
    if len(routers) < len(plan.axes["experts"]):
        raise Wrong("some router has kept all its rows")
    with _NeverChosen(routers) as mode:
        found = logits(model)
    if mode.met != {*routers}:
        raise Wrong("some router is no linear map, so its experts cannot be switched off here")
    return found


def _same_content(model: Any, tensor: Tensor) -> tuple[str, Any]:
    """The parameter or buffer in memory that a tensor on disk is, with its name there."""
    named = [*model.named_parameters(), *model.named_buffers()]
    same = ((name, own) for name, own in named if own.shape == tensor.shape and torch.equal(own.data, tensor))
    return next(same, ("", None))


class _NeverChosen(TorchFunctionMode):
    """Linear maps with these weights give minus infinity in some of their outputs."""

    def __init__(self, routers: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._routers, self.met = routers, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and (place := args[1].data_ptr()) in self._routers:
            self.met.add(place)
            return output.index_fill(-1, self._routers[place], -math.inf)
        return output
