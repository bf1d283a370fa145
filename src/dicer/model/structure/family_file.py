"""A family as a file: what ``dicer info --family-row`` prints, ``--family FILE.toml`` reads, and exceptions are."""

from __future__ import annotations

import importlib.resources
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from dicer.ask.axes import AXES, kind_name
from dicer.errors import ModelError, unknown
from dicer.model.structure.layers import Layers, item_a_layer
from dicer.model.structure.skeleton import Shape, flat_values
from dicer.model.units import Axis, Slice
from dicer.reading import read_toml, reason


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SliceRow(_Table):
    """One tensor of a layer; see :class:`dicer.model.units.Slice`."""

    name: str
    dim: int = Field(ge=0, le=2)
    roles: tuple[str, ...] = Field(min_length=1)
    blocks: tuple[int, ...] = ()
    interleaved: bool = False
    memory: str = ""

    def slice(self) -> Slice:
        """What it stands for."""
        return Slice(
            self.name, self.dim, self.roles, self.blocks or (1,) * len(self.roles), self.interleaved, self.memory
        )


class AxisRow(_Table):
    """One axis.

    Attributes:
        key: path of the config key that its width goes by; empty where the class has none.
        factor: units for each one of the key, as in ``"1/2"``.
        set: what the config must say besides, wherever this axis is cut.
        slices: the tensors; the last one is the map out of the units.
        modules: what makes it up in memory; by default what holds the output's map.
        activation: the module whose inputs and outputs are the activation's.
        fixed: of heads whose size the class takes from their number; see :class:`dicer.model.units.Axis`.
        refuse: why it cannot be pruned, where it cannot.
    """

    key: str = ""
    factor: str = "1"
    set: dict[str, Any] = {}
    slices: tuple[SliceRow, ...] = ()
    modules: tuple[str, ...] = ()
    activation: str | None = None
    fixed: dict[str, Literal["units", "channels"]] = {}
    refuse: str = ""

    @field_validator("factor")
    @classmethod
    def _is_fraction(cls, value: str) -> str:
        if not re.fullmatch(r"\d{1,6}(/\d{1,6})?", value) or Fraction(value) <= 0:
            raise ValueError("a factor is a number like 2 or 1/2")
        return value

    def axis(self, name: str) -> Axis:
        """What it stands for."""
        slices = tuple(row.slice() for row in self.slices)
        output = slices[-1].memory or slices[-1].name
        module = output.removesuffix(".weight")
        modules = self.modules or (module.rpartition(".")[0] or module,)
        heads = name.startswith("attention")
        axis = Axis(name, (self.key,), slices, modules, self.activation, module, returns=2 if heads else 1)
        return replace(axis, fixed=tuple(self.fixed.items()), size_key="head_dim") if self.fixed else axis


class FamilyRow(_Table):
    """A family, or what of it cannot be found.

    Attributes:
        model_type: as in ``config.json``.
        layers: what the decoder layers' names begin with on disk; empty where it is found.
        module: path of their list in memory; by default the same.
        layers_key: path of the key that counts them.
        axes: by name.
        refuse_blocks: why no layer can go whole, where none can.
    """

    model_type: str
    layers: str = ""
    module: str = ""
    layers_key: str = "num_hidden_layers"
    axes: dict[str, AxisRow] = {}
    refuse_blocks: str = ""
    _file: str = PrivateAttr("")  # what is said of it in a message

    @field_validator("axes")
    @classmethod
    def _are_axes(cls, value: dict[str, AxisRow]) -> dict[str, AxisRow]:
        for name, row in value.items():
            if kind_name(name) not in AXES:
                raise ValueError(unknown("axis", name, AXES))
            if row.slices and re.fullmatch(r"experts|mlp\.expert\d+.*", name):
                raise ValueError(f"experts are found, and no file can say where they lie; leave '{name}' out")
        return value

    def where(self, config: Any) -> Layers | None:
        """Where the layers of a model with that config are, if it says so.

        Raises:
            ModelError: the key that counts them is none of the config's.
        """
        if not self.layers:
            return None
        known, key = flat_values(config), self.layers_key
        if key not in known:
            raise ModelError(f"{self._file}: layers_key: {unknown('key of the config', key, known)}")
        count = len(known[key]) if isinstance(known[key], list) else int(known[key])
        lists = item_a_layer(config, key, count)
        return Layers(key, count, self.module or self.layers, self.layers, lists)

    def check(self, inside: list[dict[str, Shape]], config: Any) -> None:
        """See to it that each axis is in some layer, and goes by a key that the config has.

        Args:
            inside: the tensors of each layer.
            config: the transformers config.

        Raises:
            ModelError: a tensor that no layer has, or a key that there is not, with the nearest one.
        """
        there = {name for tensors in inside for name in tensors}
        for axis, row in self.axes.items():
            for piece in row.slices:
                if piece.name not in there and not piece.slice().optional:
                    raise ModelError(
                        f"{self._file}: axis '{axis}' names '{piece.name}', and no layer has such a tensor (there are "
                        f"{', '.join(sorted(there)[:6])} ...). 'dicer info MODEL --family-row' prints what was found."
                    )
        known = flat_values(config)
        for axis, row in self.axes.items():
            if row.key and row.key not in known:
                raise ModelError(f"{self._file}: axis '{axis}': {unknown('key of the config', row.key, known)}")


def read_family(path: str | Path) -> FamilyRow:
    """Read a user's file.

    Raises:
        ModelError: it cannot be read, or is no such file.
    """
    try:
        row = FamilyRow.model_validate(read_toml(path))
        row._file = str(path)
        return row
    except OSError as error:
        raise ModelError(f"the family file {path} cannot be read: {reason(error)}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise ModelError(f"the family file {path}: {where}: {said}.") from None
    except (ValueError, ZeroDivisionError) as error:
        raise ModelError(f"the family file {path} is no TOML: {error}.") from None


def exception_for(model_type: str) -> FamilyRow | None:
    """The built-in file for a family of which something cannot be found, or None."""
    file = importlib.resources.files("dicer.model.structure").joinpath("exceptions", f"{model_type}.toml")
    if "/" in model_type or not file.is_file():
        return None
    row = FamilyRow.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    row._file = f"the built-in exception for {model_type}"
    return row


def as_toml(
    model_type: str, where: Layers, axes: Mapping[str, Axis], factors: Mapping[str, Fraction], sets: Mapping[str, Any]
) -> str:
    """A family in the form that :func:`read_family` reads."""
    lines = [
        f"model_type = {json.dumps(model_type)}",
        f"layers = {json.dumps(where.disk)}",
        *([f"module = {json.dumps(where.module)}"] if where.module != where.disk else []),
        f"layers_key = {json.dumps(where.key)}",
    ]
    if any(axis.routed for axis in axes.values()):
        lines += ["", "# Its experts are found, also beside what a file says."]
    for name, axis in axes.items():
        if axis.routed:
            continue
        lines += ["", f'[axes."{name}"]' if "." in name else f"[axes.{name}]"]
        lines.append(f"key = {json.dumps(axis.width_keys[-1])}")
        if factors.get(name, 1) != 1:
            lines.append(f'factor = "{factors[name]}"')
        if sets.get(name):
            pairs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in sets[name].items())
            lines.append(f"set = {{ {pairs} }}")
        lines.append(f"modules = {json.dumps(list(axis.modules))}")
        if axis.activation:
            lines.append(f"activation = {json.dumps(axis.activation)}")
        if axis.fixed:
            lines.append(f"fixed = {{ {', '.join(f'{key} = {json.dumps(of)}' for key, of in axis.fixed)} }}")
        lines += ["slices = [", *(f"  {_slice_row(piece)}," for piece in axis.slices), "]"]
    return "\n".join(lines) + "\n"


def _slice_row(piece: Slice) -> str:
    parts = [f"name = {json.dumps(piece.name)}", f"dim = {piece.dim}", f"roles = {json.dumps(list(piece.roles))}"]
    if piece.blocks != (1,) * len(piece.roles):
        parts.append(f"blocks = {json.dumps(list(piece.blocks))}")
    if piece.interleaved:
        parts.append("interleaved = true")
    if piece.memory:
        parts.append(f"memory = {json.dumps(piece.memory)}")
    return "{ " + ", ".join(parts) + " }"
