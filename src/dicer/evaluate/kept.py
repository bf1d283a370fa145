"""Tensors that cost a forward pass, kept in the cache folder by all that decides them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dicer.errors import EvaluationError
from dicer.files import remove_unfinished, write_whole
from dicer.model.find import cache_folder

FOLDER = "answers"  # in the cache folder
_FORMAT = "1"


def kept(decides: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was kept under this name, or else made now, and kept where that can be.

    Args:
        decides: everything that the tensors depend on; versions of torch and transformers are added.
        make: the tensors, in the CPU's memory.

    Raises:
        EvaluationError: there is a file, and it is damaged or was made for something else.
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    key = json.dumps({**decides, "versions": versions, "format": _FORMAT}, sort_keys=True, default=str)
    try:
        path = cache_folder() / FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    except RuntimeError:  # the user has no home
        return make()
    if (found := _read(path, key)) is not None:
        return found
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    with suppress(OSError):
        write_whole(path, save(made, metadata={"key": key, "sha256": _digest(made)}))
    return made


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None where there is no file, or nobody may look."""
    try:
        remove_unfinished(path.parent)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except PermissionError:
        return None
    except (OSError, SafetensorError) as error:
        raise _unusable(path, f"damaged ({error})") from None
    if about.get("key") != key:
        raise _unusable(path, "those of another model or text")
    if about.get("sha256") != _digest(found):
        raise _unusable(path, "damaged (their checksum is another)")
    return found


def _unusable(path: Path, why: str) -> EvaluationError:
    return EvaluationError(
        f"the kept answers in {path} are {why}. Delete that file, and they are made again from the dense model."
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
