"""A model whose weights stay in its files: a part is read when it is asked for, and forgotten afterwards."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dicer.errors import ModelError
from dicer.model.find import as_model_error
from dicer.model.same import check_portion
from dicer.model.source import ModelSource
from dicer.model.structure.skeleton import on_disk
from dicer.model.tensors import SafetensorsSource

OUTSIDE = -1  # the part that is no decoder layer


@dataclass
class _Group:
    """Tensors on disk that become tensors in memory together: one and one, but for experts and the like.

    Attributes:
        names: of the tensors on disk, in the order in which they are joined.
        make: what transformers makes of them, told the tensors.
        converted: whether it makes others of them.
    """

    make: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    converted: bool
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)


class Piecewise:
    """A model on the meta device, of which parts are put in place for a while.

    What is read is what ``from_pretrained`` would have loaded, bit for bit: transformers' own conversions are applied
    to the tensors of one part, in its dtypes; what no file holds (buffers that a class makes) is made by the class, and
    stays. On the CPU, in the dtype of the files, tensors are views of the mapped files and take no memory of their own.

    Args:
        source: a model in a folder.
        dtype: ``auto`` (the checkpoint's own) or a torch dtype by name.
        device: what is made by the class lies there.

    Attributes:
        model: the model.

    Raises:
        ModelError: transformers cannot build it, or some of its layers' tensors are in no file.
    """

    def __init__(self, source: ModelSource, dtype: str = "auto", device: str = "cpu") -> None:
        if not isinstance(source.tensors, SafetensorsSource):
            raise ModelError("a model in memory is there already, so its layers cannot be read one at a time.")
        self._source, self._tensors = source, source.tensors
        self._layer = re.compile(rf"{re.escape(source.family.layers)}\.(\d+)\.")
        self.model: Any = source.load_empty(dtype)
        self._empty: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        self._groups = self._grouped()
        self._makers = self._dry_run()
        self._tied = dict[str, str](self.model.all_tied_weights_keys)
        self._checked: set[str] = set()
        unread = [name for name in self._empty if name not in self._makers and name not in self._tied]
        _make_rest(self.model, unread, device)
        self._wanted: dict[int, dict[str, str]] = {}  # part -> name in memory -> of which tensor that is read
        for name in self._empty:
            origin = self._tied.get(name, name) if name not in self._makers else name
            if origin in self._makers and (part := self._part(name)) is not None:
                self._wanted.setdefault(part, {})[name] = origin

    def names(self, part: int) -> list[str]:
        """The tensors on disk that a part is made of.

        Args:
            part: the number of a layer, or ``OUTSIDE``.
        """
        groups = dict.fromkeys(self._makers[origin] for origin in self._wanted.get(part, {}).values())
        return [name for first in groups for name in self._groups[first].names]

    def nbytes(self, part: int) -> int:
        """The bytes on disk of a part."""
        infos = self._tensors.infos()
        return sum(infos[name].nbytes for name in self.names(part))

    def read(self, part: int) -> dict[str, Tensor]:
        """The tensors of a part by their names in memory, on the CPU; may run in a thread beside the model.

        Raises:
            ModelError: a file is gone or broken, or something other than transformers' conversions lies between.
        """
        wanted = self._wanted.get(part, {})
        held = self._tensors.read_all(self.names(part))
        found: dict[str, Tensor] = {}
        for first in dict.fromkeys(self._makers[origin] for origin in wanted.values()):
            group = self._groups[first]
            made = group.make([held.pop(name).to(group.dtype) for name in group.names])
            if group.converted and first not in self._checked:
                check_portion(self._source.name, on_disk(self.model, made), self._tensors)
                self._checked.add(first)
            found |= made
        return {name: found[origin] for name, origin in wanted.items()}

    def owner(self, name: str) -> Any:
        """The module that a tensor in memory belongs to."""
        return self.model.get_submodule(name.rpartition(".")[0])

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places."""
        for name, tensor in tensors.items():
            _set(self.owner(name), name.rpartition(".")[2], tensor)

    def forget(self, names: Collection[str]) -> None:
        """Take tensors out again."""
        for name in names:
            setattr(self.owner(name), name.rpartition(".")[2], self._empty[name])

    def _part(self, name: str) -> int | None:
        """Where a tensor in memory belongs; None for what only the head has, which no layer needs."""
        if found := self._layer.match(name):
            return int(found[1])
        model, norm = self.model, self._source.family.final_norm
        within = "" if model.base_model is model else f"{model.base_model_prefix}."
        return OUTSIDE if name.startswith(within) or (norm and name.startswith(f"{norm}.")) else None

    def _grouped(self) -> dict[str, _Group]:
        """First name in memory -> the tensors on disk that make it, as transformers finds them in loading."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        conversions = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, state, groups = self.model.base_model_prefix, self._empty, dict[str, _Group]()
        patterns: dict[str, list[tuple[str, str]]] = {}
        for name in sorted(self._tensors.infos(), key=dot_natural_key):
            first, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if first not in state and name in state:
                first, pattern = rename_source_key(name, [], [], prefix, state)
            if first not in state:
                continue
            converter = None if pattern is None else by_pattern[pattern]
            patterns.setdefault(first, []).append((name, pattern or name))
            if first not in groups:
                make = _maker(self.model, first, converter, patterns[first])
                groups[first] = _Group(make, converter is not None, state[first].dtype)
            groups[first].names.append(name)
        return groups

    def _dry_run(self) -> dict[str, str]:
        """Name in memory -> the group that it comes from, found by making them of tensors without content."""
        infos, makers = self._tensors.infos(), dict[str, str]()
        with as_model_error(self._source.name, "model"):
            for first, group in self._groups.items():
                empty = [torch.empty(infos[name].shape, dtype=group.dtype, device="meta") for name in group.names]
                makers |= dict.fromkeys(group.make(empty) if group.converted else [first], first)
        return {name: first for name, first in makers.items() if name in self._empty}


def _maker(
    model: Any, first: str, converter: Any, patterns: Sequence[tuple[str, str]]
) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    """What makes tensors in memory of a group's tensors on disk.

    Args:
        model: of transformers.
        first: name in memory of the first that is made.
        converter: what transformers has for it; None where a tensor is only called otherwise.
        patterns: (name on disk, the converter's pattern for it) of each; more may be added until it is called.
    """

    def make(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        if converter is None:
            return {first: tensors[-1]}
        own = copy.deepcopy(converter)
        for (name, pattern), tensor in zip(patterns, tensors, strict=True):
            own.add_tensor(first, name, pattern, tensor)
        made = own.convert(first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return make


def _make_rest(model: Any, names: Collection[str], device: str) -> None:
    """Let the class make what no file holds, as ``from_pretrained`` does: it knows what was loaded by a flag.

    Args:
        model: on the meta device, with the flag on everything.
        names: in memory, of tensors that would have been saved; all others are made in any case.
        device: where they are made.
    """
    saved = model.state_dict()
    made = [*names, *(name for name, _ in model.named_buffers() if name not in saved)]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in made]
    for module, own in places:
        _set(module, own, torch.empty_like(getattr(module, own), device="cpu"))
    for module in model.modules():  # one may make what another holds
        module._is_hf_initialized = False
    model.initialize_weights()
    for module, own in places:
        _set(module, own, getattr(module, own).detach().to(device))


def _set(module: Any, own: str, tensor: Tensor) -> None:
    is_parameter = own in module._parameters
    setattr(module, own, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
