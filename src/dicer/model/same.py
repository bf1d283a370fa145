"""What transformers loaded, held against what will be written: a model must be scored as it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from dicer.errors import ModelError
from dicer.model.families import Family
from dicer.model.structure.account import same_content
from dicer.model.structure.skeleton import on_disk
from dicer.model.tensors import TensorSource

_DO = "So what is scored would not be what is written: load it with transformers, save it anew, and give that folder."


def check_same(name: str, model: Any, tensors: TensorSource, family: Family) -> None:
    """See to it that every tensor of a loaded model is in its files, by name, shape and content.

    Tensors of the files that no model has are looked for before, in the headers
    (:func:`dicer.model.structure.account.account`).

    Args:
        name: the model's, for people.
        model: as transformers loaded it, on the CPU, in any dtype.
        tensors: what will be written, by the names on disk.
        family: as it was found.

    Raises:
        ModelError: for the first tensor that differs; then more lies between file and model than dicer knows of.
    """
    for state in _portions(model, family):
        check_portion(name, state, tensors)


def _portions(model: Any, family: Family) -> Iterator[Mapping[str, Tensor]]:
    """A model's tensors by their names on disk; layer by layer where to have them so some have to be copied."""
    tied = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = {full: loaded for full, loaded in model.state_dict().items() if full not in tied}
    by_layer: dict[str, dict[str, Tensor]] = {}
    prefix = f"{family.layers}."
    for full, loaded in state.items():
        number = full.removeprefix(prefix).partition(".")[0] if full.startswith(prefix) else ""
        by_layer.setdefault(number, {})[full] = loaded
    for portion in by_layer.values():
        yield on_disk(model, portion)


def check_portion(name: str, state: Mapping[str, Tensor], tensors: TensorSource) -> None:
    """The same for some of its tensors, by their names on disk."""
    infos = tensors.infos()
    pairs: dict[str, tuple[Tensor, str]] = {}
    for full, loaded in state.items():
        on_file = next((n for n in (full, full.split(".", 1)[-1]) if n in infos), None)
        if on_file is None and loaded.numel() and not loaded.dtype.is_floating_point:
            continue  # a counter that newer versions save along
        if on_file is None:
            raise ModelError(f"{name}: transformers loads a tensor '{full}', which the files do not have. {_DO}")
        if loaded.is_meta or tuple(loaded.shape) != infos[on_file].shape:
            raise ModelError(f"{name}: transformers loads '{full}' in another shape than that in the files. {_DO}")
        pairs[full] = loaded, on_file

    def same(pair: tuple[Tensor, str]) -> bool:
        return same_content(pair[0], tensors.read(pair[1]).to(pair[0].dtype))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a comparison is one thread's work, and waits for the disk
        for full, equal in zip(pairs, pool.map(same, pairs.values()), strict=True):
            if not equal:
                pool.shutdown(cancel_futures=True)
                raise ModelError(
                    f"{name}: transformers loads '{full}' with another content than that in the files. {_DO}"
                )
