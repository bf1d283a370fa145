"""What transformers loaded, held against what will be written: a model must be scored as it is written."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from dicer.errors import ModelError
from dicer.model.match import same_content
from dicer.model.tensors import TensorSource

_DO = "So what is scored would not be what is written: load it with transformers, save it anew, and give that folder."


def check_same(name: str, model: Any, tensors: TensorSource) -> None:
    """See to it that every tensor of a loaded model is in its files, by name, shape and content.

    Tensors of the files that no model has are looked for before, in the headers (:func:`dicer.model.match.match`).

    Args:
        name: the model's, for people.
        model: as transformers loaded it, on the CPU, in any dtype.
        tensors: what will be written, by the names on disk.

    Raises:
        ModelError: for the first tensor that differs; then more lies between file and model than dicer knows of.
    """
    infos, tied = tensors.infos(), set(model.all_tied_weights_keys)
    pairs: dict[str, tuple[Tensor, str]] = {}
    for full, loaded in model.state_dict().items():
        if full in tied:
            continue
        on_disk = next((n for n in (full, full.split(".", 1)[-1]) if n in infos), None)
        if on_disk is None:
            raise ModelError(f"{name}: transformers loads a tensor '{full}', which the files do not have. {_DO}")
        if loaded.is_meta or tuple(loaded.shape) != infos[on_disk].shape:
            raise ModelError(f"{name}: transformers loads '{full}' in another shape than that in the files. {_DO}")
        pairs[full] = loaded, on_disk

    def same(pair: tuple[Tensor, str]) -> bool:
        return same_content(pair[0], tensors.read(pair[1]).to(pair[0].dtype))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a comparison is one thread's work, and waits for the disk
        for full, equal in zip(pairs, pool.map(same, pairs.values()), strict=True):
            if not equal:
                pool.shutdown(cancel_futures=True)
                raise ModelError(
                    f"{name}: transformers loads '{full}' with another content than that in the files. {_DO}"
                )
