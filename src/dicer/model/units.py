"""What an axis of pruning is: units, the tensors that they run through, one view of their weights for all criteria."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dicer.ask.axes import AxisKind, kind_of


class SubLayer(NamedTuple):
    """The attention or the MLP of one layer; they sort as a model runs them.

    Attributes:
        layer: its number in the model.
        axis: ``attention`` or ``mlp``; for what can be bypassed also ``block``, the whole layer.
    """

    layer: int
    axis: str

    @property
    def key(self) -> str:
        """As in ``mlp.3``."""
        return f"{self.axis}.{self.layer}"

    def __str__(self) -> str:
        return f"{self.axis} of layer {self.layer}"


@dataclass(frozen=True)
class Slice:
    """Where the units of an axis lie in one tensor of a layer.

    Attributes:
        name: the tensor's name inside its layer, as on disk (``mlp.gate_proj.weight``).
        dim: the dimension that the units run along.
        roles: what each consecutive segment along ``dim`` is (``gate``, ``up``, ``down``; ``query``, ``key``,
            ``value``, ``output``; with ``_bias`` behind it for a bias); Phi-3's ``gate_up_proj`` has two segments.
        blocks: how many consecutive rows one unit owns in each segment: 1 for neurons; for heads
            :meth:`Axis.sized` says it.
        interleaved: the segments' rows take turns (gpt-oss has gate and up so) and do not follow each other.
        memory: the tensor's name inside the layer in memory, where that is another than on disk.
        expert: whose units these are, where one tensor holds all experts side by side along dimension 0; None else.
    """

    name: str
    dim: int
    roles: tuple[str, ...]
    blocks: tuple[int, ...] = (1,)
    interleaved: bool = False
    memory: str = ""
    expert: int | None = None

    @property
    def optional(self) -> bool:
        """Biases are there or not, by config; weights must be there."""
        return all(role.endswith("_bias") for role in self.roles)

    @property
    def bias(self) -> str:
        """The name of the bias that belongs to a weight."""
        return self.name.removesuffix("weight") + "bias"

    @property
    def is_output(self) -> bool:
        """Whether the units are this tensor's inputs (the output projection) and not its outputs."""
        return self.roles in (("down",), ("output",))

    def rows(self, units: Tensor, count: int) -> Tensor:
        """Indices along ``dim`` that the given units own.

        Args:
            units: int64 [K], unit numbers in 0..count-1.
            count: how many units the tensor holds.

        Returns:
            int64 [K * sum(blocks)], segment after segment, or unit after unit where they take turns.
        """
        if self.interleaved:
            return (units[:, None] * sum(self.blocks) + torch.arange(sum(self.blocks))).reshape(-1)
        parts, start = [], 0
        for block in self.blocks:
            parts.append((start + units[:, None] * block + torch.arange(block)).reshape(-1))  # [K*block]
            start += count * block
        return torch.cat(parts)


@dataclass(frozen=True)
class Axis:
    """One kind of unit that can be pruned, and where a layer of this family keeps it.

    A unit of ``mlp`` is a neuron. A unit of ``attention`` is a head, or with grouped queries a key-value head with all
    its query heads.

    Attributes:
        name: ``mlp`` or ``attention``.
        width_keys: config attributes that hold the number of units (for attention also of query heads), units last.
        slices: every tensor of a layer that the units run through.
        modules: submodules of a layer in memory that make up the sub-layer; the last one's output joins the residual
            stream.
        activation: submodule whose input is the pre-activation and whose output is the post-activation; None where
            there is only the output projection's input.
        output: submodule whose input is the modulated activation (for attention: the heads' outputs side by side).
        bias_option: config switch of the stock family that gives the output projection a bias, if it has one.
        returns: how many values the last module returns, of which the first joins the residual stream; the others are
            None where the sub-layer is bypassed.
        size_key: config key that says how large a unit is; it must be said as soon as their number is another.
        fixed: where the stock class takes the size of a unit from their number, so that fewer need own code: what its
            module keeps of their number, as attribute and ``units`` or ``channels``.
        divides: config key whose value the first of ``width_keys`` must divide in the stock class, if it must.
        default: (other config key, factor): how many units there are where the config does not say it.
        routed: the module in memory that sends tokens to experts and runs them, where the units are experts or lie in
            one; None else.
        parts: the units lie in so many equal parts, of which each keeps the same number (groups of experts).
        least: units that stay in every layer at least.
    """

    name: str
    width_keys: tuple[str, ...]
    slices: tuple[Slice, ...]
    modules: tuple[str, ...]
    activation: str | None
    output: str
    bias_option: str | None = None
    returns: int = 1
    size_key: str | None = None
    fixed: tuple[tuple[str, str], ...] = ()
    divides: str | None = None
    default: tuple[str, int] | None = None
    routed: str | None = None
    parts: int = 1
    least: int = 1

    def width(self, read: Callable[[str], Any]) -> int:
        """How many units there are, from a function that gives a config's value by its key (or None)."""
        said = read(self.width_keys[-1])
        if said is None and self.default is not None:
            key, factor = self.default
            return factor * int(read(key))
        return int(said)

    def keys(self, values: Mapping[str, Any], units: int) -> dict[str, int]:
        """What a config says of a number of units; heads also say their queries, as many for each unit as before."""
        before = self.width(values.get)
        *more, own = self.width_keys
        return {**{key: units * int(values[key]) // before for key in more}, own: units}

    def head_size(self, values: Mapping[str, Any]) -> int:
        """Width of one head, from a config's values by their paths."""
        queries = self.width_keys[0]
        outer = queries.rpartition(".")[0]
        prefix = f"{outer}." if outer else ""
        hidden = next(values[prefix + key] for key in ("hidden_size", "n_embd", "d_model") if values.get(prefix + key))
        return int(values.get(f"{prefix}head_dim") or hidden // values[queries])

    @property
    def kind(self) -> AxisKind:
        """What can be done with its units, whatever the family."""
        return kind_of(self.name)

    @property
    def output_slice(self) -> Slice:
        """The output projection."""
        return next(piece for piece in self.slices if piece.is_output)

    @property
    def output_bias(self) -> str:
        """The name of the output projection's bias, which is there or not."""
        return self.output_slice.bias

    def sized(self, query: int, head: int) -> Axis:
        """The axis with the number of rows that a unit owns in each tensor.

        Args:
            query: rows of a key-value head's queries: heads of a group times head size.
            head: head size.
        """
        rows = {"query": query, "output": query, "key": head, "value": head}
        blocks = [tuple(rows.get(role.removesuffix("_bias"), 1) for role in piece.roles) for piece in self.slices]
        return replace(
            self, slices=tuple(replace(piece, blocks=b) for piece, b in zip(self.slices, blocks, strict=True))
        )

    @property
    def required(self) -> tuple[Slice, ...]:
        """The weight matrices, which every checkpoint has."""
        return tuple(piece for piece in self.slices if not piece.optional)

    @property
    def channels(self) -> int:
        """How many inputs of the output projection one unit owns."""
        return self.output_slice.blocks[0]

    def owns(self, name: str) -> bool:
        """Whether a tensor (by its name inside the layer) lies in this sub-layer."""
        places = {*self.modules}
        if len(places) == 1 and self.routed is None:  # in the files it may be called otherwise
            places |= {piece.name.removesuffix(".weight").rpartition(".")[0] for piece in self.required} - {""}
        return name.startswith(tuple(f"{place}." for place in places))


def templates(inner: str) -> list[tuple[int | None, str]]:
    """The names by which a slice may speak of a tensor: its own, and with ``{}`` for each number in it (and which).

    Args:
        inner: the tensor's name inside its layer.
    """
    found: list[tuple[int | None, str]] = [(None, inner)]
    for match in re.finditer(r"(?<=\.)\d+(?=\.)", inner):
        found.append((int(match[0]), f"{inner[: match.start()]}{{}}{inner[match.end() :]}"))
    return found


@dataclass(frozen=True)
class UnitWeights:
    """One sub-layer's weights in the same unfused, untransposed form for every family.

    For attention, where one unit owns many rows, its rows lie flat in one: ``gate`` holds queries, ``up`` keys and
    values, ``down`` the output projection's columns.

    Attributes:
        gate: [U, d], or None for an MLP without gate.
        up: [U, d]; without gate, the input projection.
        down: [d, U].
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor

    @property
    def units(self) -> int:
        """U."""
        return self.up.shape[0]


_PLACES = {"query": "gate", "key": "up", "value": "up", "output": "down"}


def unit_weights(axis: Axis, tensors: Mapping[str, Tensor]) -> UnitWeights:
    """A layer's tensors by their role; views where a unit owns one row, so for neurons nothing is copied.

    Args:
        axis: whose slices say where each role lies.
        tensors: name inside the layer -> tensor.
    """
    parts: dict[str, list[Tensor]] = {}
    for piece in axis.required:
        by_row = tensors[piece.name].movedim(piece.dim, 0)  # [U * sum(blocks), d]
        count = by_row.shape[0] // sum(piece.blocks)
        for role, part in zip(piece.roles, by_row.split([count * b for b in piece.blocks]), strict=True):
            parts.setdefault(_PLACES.get(role, role), []).append(part.reshape(count, -1))  # [U, block*d]
    joined = {role: found[0] if len(found) == 1 else torch.cat(found, 1) for role, found in parts.items()}
    return UnitWeights(joined.get("gate"), joined["up"], joined["down"].T)
