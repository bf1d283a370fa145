"""Does what is written open? Asked before a run begins, and again before the folder gets its name."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicer.errors import ModelError, OutputError
from dicer.model.find import as_model_error
from dicer.model.source import ModelSource, open_model
from dicer.model.structure.family_file import FamilyRow
from dicer.model.structure.skeleton import Skeleton, as_values
from dicer.model.tensors import TensorInfo
from dicer.write.surgery import Cut


def described(cut: Cut) -> tuple[Any, Any]:
    """The class and the config of what a cut comes to: a stock one, or one of our own model file."""
    import transformers

    from dicer.write.export import modeling_pruned

    raw = as_values(cut.config)
    kind, auto_map, (name, *_) = raw.pop("model_type"), raw.pop("auto_map", None), raw["architectures"]
    config = transformers.AutoConfig.for_model(kind, **raw)
    if auto_map is None:
        return getattr(transformers, name), config
    config.auto_map = auto_map
    return getattr(modeling_pruned, name), config


@dataclass(frozen=True)
class _Foreseen:
    """The tensors of a cut."""

    cut: Cut

    def infos(self) -> Mapping[str, TensorInfo]:
        return self.cut.infos

    def read(self, name: str) -> Tensor:
        return self.cut.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.cut.read(name)[start:stop]


def as_source(cut: Cut) -> ModelSource:
    """What a cut comes to, as a model that can be opened, before it is written; its files are the source's."""
    config, tensors = described(cut)[1], _Foreseen(cut)
    return replace(cut.source, config=config, raw_config=cut.config, tensors=tensors, live=None, cut_of=cut.source)


def check_cut(cut: Cut) -> None:
    """Hold what would be written against the model that its config calls for, before anything is computed.

    Raises:
        ModelError: transformers would not take the config, or other tensors belong to it.
    """
    what = "checkpoint that this would be"
    with as_model_error(cut.source.name, what), torch.device("meta"):
        model_class, config = described(cut)
        model = model_class(config)
    needed = Skeleton(config, model)
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["$^"]))
    for name, shape in needed.shapes.items():
        found = cut.infos.get(name) or cut.infos.get(name.split(".", 1)[1])
        if found is None and (needed.is_buffer(name) or optional.search(name)):
            continue
        if found is None or found.shape != shape:
            raise ModelError(
                f"{cut.source.name}: the {what} cannot be loaded: '{name}' would be {found and found.shape}, and its "
                f"config calls for {shape}. Choose other units; this one is a fault of dicer."
            )
    _run(model, cut.source, what)


def check_folder(folder: Path, row: FamilyRow | None = None) -> ModelSource:
    """Open a folder as transformers does, with our own model file for the one in it, and load no weight.

    The model is built on the meta device, every tensor's name and shape held against it, one short sequence sent
    through it; then the generation config is read.

    Args:
        folder: where it lies.
        row: what a file of the user's says of its family.

    Raises:
        ModelError: something in it cannot be opened.
    """
    source = open_model(folder, row)
    with as_model_error(source.name, "model"), torch.device("meta"):
        model = _class_of(source)(source.config)
    _run(model, source, "model")
    source.generation_config()
    return source


def _class_of(source: ModelSource) -> Any:
    """The class that loads an opened folder."""
    from dicer.write.export import modeling_pruned

    if source.is_stock:
        return source.family.stock_class
    return getattr(modeling_pruned, source.raw_config["architectures"][0])


def check_written(folder: Path, out: Path, original: ModelSource) -> ModelSource:
    """Open what was written, and its tokenizer, before it gets its name.

    Args:
        folder: where it lies now.
        out: what it will be called, for the message.
        original: the model that was pruned.

    Raises:
        OutputError: it cannot be opened.
    """
    try:
        written = check_folder(folder, original.family.said)
        _open_tokenizer(written, original)
    except ModelError as error:
        reason = str(error).removeprefix(f"{folder.resolve().name}: ")
        raise OutputError(f"{out} was not written, as it could not be opened again: {reason}") from None
    return written


def _open_tokenizer(written: ModelSource, original: ModelSource) -> None:
    """One that does not open where it comes from either, as it needs code of its own, goes along as it is."""
    try:
        written.tokenizer()
    except ModelError:
        if original.folder is None:
            return
        try:
            original.tokenizer()
        except ModelError:
            return
        raise


def _run(model: Any, source: ModelSource, what: str) -> None:
    """Send a sequence through a model without weights: what does not fit together is found, nothing is computed.

    A class that cannot be run so when it is built from the dense model's config, either, is not at fault.
    """
    error = _fault(model)
    if error is None:
        return
    with as_model_error(source.name, what):
        with torch.device("meta"):
            dense = source.family.stock_class._from_config(copy.deepcopy(source.config), dtype=model.dtype)
        if _fault(dense) is not None:
            return
        raise error


def _fault(model: Any) -> Exception | None:
    """What a model raises at a sequence; to look at values, which are not there, is none."""
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 4, 4, device="meta")  # ready made: to make one, transformers looks at values
    error: Exception | None = None
    for more in ({"attention_mask": mask, "position_ids": ids}, {"attention_mask": mask}, {}):
        with torch.no_grad():
            try:
                model.eval()(input_ids=ids, use_cache=False, **more)
            except (RuntimeError, NotImplementedError) as found:
                # What looks at values (dynamic rotary scaling) is no fault.
                return None if "meta tensors" in str(found) else found
            except TypeError as found:  # it may know no such argument
                error = found
                continue
            except Exception as found:
                return found
        return None
    return error
