"""The dense model that others are compared with: known by its files, loaded only where something must be asked."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dicer.errors import DicerError, ModelError
from dicer.model.find import find_model, read_config
from dicer.model.source import load_any, open_model
from dicer.model.tokenizer import read_tokenizer
from dicer.reading import open_plain


@dataclass
class Dense:
    """A dense model.

    Attributes:
        name: for people.
        fingerprint: tells it from others, as plans and records do.
        weights: tells it from others where only some rows differ: size and time of its files, or their content.
        computes: what else decides its answers: dtype and device.
        tokenizer: its tokenizer.
        positions: how many tokens it can see; infinite where its config does not say.
        nbytes: of its weights on disk; None for a model in memory.
        load: the model in memory.
    """

    name: str
    fingerprint: str
    weights: str
    computes: dict[str, str]
    tokenizer: Any
    positions: float
    nbytes: int | None
    load: Callable[[], Any]
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The model, loaded where it is not yet."""
        if self._model is None:
            self._model = self.load()
        return self._model


def open_dense(model: str | os.PathLike[str], dtype: str = "auto", device: str = "cpu") -> Dense:
    """Find a dense model, without loading a weight.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        dtype: as for :func:`dicer.model.source.load_any`.
        device: a torch device.

    Raises:
        ModelError: there is none, or it has no tokenizer.
    """
    name, folder = find_model(os.fspath(model))
    config, tokenizer = read_config(folder), read_tokenizer(name, folder)
    if tokenizer is None:
        raise ModelError(f"{name} has no tokenizer, so nothing can be compared with it on text.")
    text_config = config.get("text_config") or config
    own_dtype = str(config.get("dtype") or config.get("torch_dtype") or dtype)
    positions = text_config.get("max_position_embeddings") or text_config.get("n_positions") or math.inf
    return Dense(
        name,
        _fingerprint(model, folder),
        _stamp(folder),
        {"dtype": own_dtype if dtype == "auto" else dtype, "device": device.partition(":")[0]},
        tokenizer,
        positions,
        weight_bytes(model),
        lambda: load_any(model, dtype, device)[1],
    )


def held_dense(
    model: Any, tokenizer: Any, name: str, fingerprint: str, nbytes: int | None = None, folder: Path | None = None
) -> Dense:
    """A dense model that is in memory already.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        name: for people.
        fingerprint: as :attr:`dicer.model.source.ModelSource.fingerprint`.
        nbytes: of its weights on disk.
        folder: where its weights are, if they are what the files hold.

    Raises:
        ModelError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ModelError(f"{name} has no tokenizer, so nothing can be compared with it on text.")
    computes = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    weights = _content(model) if folder is None else _stamp(folder)
    return Dense(name, fingerprint, weights, computes, tokenizer, positions, nbytes, lambda: model)


def weight_bytes(model: str | os.PathLike[str]) -> int:
    """Bytes of a model's weights on disk: of a ``.gguf`` file itself, else of the folder's safetensors."""
    if Path(model).suffix == ".gguf":
        return Path(model).stat().st_size
    return sum(file.stat().st_size for file in find_model(os.fspath(model))[1].glob("*.safetensors"))


def _stamp(folder: Path) -> str:
    """Size and time of the files with weights: a fingerprint looks at the first and the last row of each alone."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return json.dumps([(name, found.st_size, found.st_mtime_ns) for name, found in files])


def _content(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(model: str | os.PathLike[str], folder: Path) -> str:
    """As dicer knows a model that it can prune; of any other a hash of its whole files."""
    with suppress(DicerError):
        return open_model(model).fingerprint
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open_plain(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
