"""Transfer-entropy profiles that are kept: a killed run goes on, and what was measured is not measured again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from dicer.errors import RecipeError
from dicer.files import remove_unfinished, write_whole
from dicer.measure.batches import own_batches
from dicer.measure.entropy.profile import LISTS, Profile, check_choices
from dicer.measure.entropy.transfer import measure
from dicer.measure.stores.store import LayerStore
from dicer.model.find import cache_folder
from dicer.model.source import ModelSource
from dicer.processes import from_first, rank
from dicer.progress import Progress, silent
from dicer.reading import read_json

# Where a config comes from, and what "dtype" below says; all else may change what a model computes.
_WITHOUT_EFFECT = {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}


class _Held(NamedTuple):
    """What a cache file holds: H by key, also of a run that was killed, and whole profiles by their lists."""

    measured: dict[str, float]
    profiles: dict[str, Profile]


def entropy_profile(
    source: ModelSource,
    store: LayerStore,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    lists: Sequence[str] = LISTS,
    search: str = "independent",
    at: str = "norm",
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Profile:
    """The transfer-entropy profile of a model on a text, measured (:func:`.transfer.measure`) or from the cache.

    The cache lies beside the converted models (:func:`dicer.model.find.cache_folder`). It knows a model by its config
    and its fingerprint (names, shapes, first and last rows), so one whose weights were changed elsewhere is taken for
    the old one. A cache that cannot be read is replaced, and one that cannot be written is done without.

    Args:
        source: the model.
        store: its layers, in the dtype and on the device to compute with.
        tokens: int64 [S, T], all samples of all processes.
        mask: which tokens are there and count (:func:`dicer.measure.batches.own_batches`); None for all.
        lists: of blocks, attention, mlp.
        search: ``independent`` or ``greedy``.
        at: ``norm`` or ``hidden``.
        batch_size: samples in a forward pass; None for 4,096 tokens' worth. No part of what the cache tells apart.
        progress: called with (stage, done, total) in layer forwards.

    Raises:
        RecipeError: unknown names, or a final state with NaN or infinite values.
        CalibrationError: there are no tokens.
    """
    check_choices(lists, search, at)
    chosen = [name for name in LISTS if name in lists]
    name = f"{_digest(source, store, tokens, mask, chosen, search, at)}.json"
    held = from_first(_read(name) if rank() == 0 else _Held({}, {}))  # all must run the same modules
    if found := held.profiles.get(",".join(chosen)):
        return found

    def remember(key: str, value: float) -> None:
        held.measured[key] = value
        _write(name, held)

    profile = measure(
        store,
        own_batches(tokens, batch_size, mask=mask),
        lists=chosen,
        search=search,
        at=at,
        known=dict(held.measured),
        remember=remember,
        progress=progress,
    )
    held.profiles[",".join(chosen)] = profile
    _write(name, held)
    return profile


def _digest(
    source: ModelSource,
    store: LayerStore,
    tokens: Tensor,
    mask: Tensor | None,
    lists: Sequence[str],
    search: str,
    at: str,
) -> str:
    """Everything that decides the numbers; of the lists only what a greedy search lets compete."""
    computes = dict(store.computes)
    config = {name: value for name, value in computes.pop("config").items() if name not in _WITHOUT_EFFECT}
    decides = {
        "model": source.fingerprint,
        "config": config,
        **computes,
        "shape": list(tokens.shape),
        "tokens": hashlib.sha256(tokens.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest(),
        "search": search,
        "at": at,
        "pool": [name for name in lists if name != "blocks"] if search == "greedy" else [],
        "versions": {name: importlib.metadata.version(name) for name in ("dicer", "torch", "transformers")},
    }
    if mask is not None:
        decides["mask"] = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(name: str) -> _Held:
    try:
        remove_unfinished(cache_folder() / "entropy")
        content = read_json(cache_folder() / "entropy" / name)
        measured = {str(key): float(value) for key, value in content["measured"].items()}
        if not all(map(math.isfinite, measured.values())):
            return _Held({}, {})
        profiles = {str(lists): Profile.from_json(value) for lists, value in content["profiles"].items()}
    # Whatever is wrong with it, it can be made again (RuntimeError: the user has no home folder).
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, RecipeError):
        return _Held({}, {})
    return _Held(measured, profiles)


def _write(name: str, held: _Held) -> None:
    if rank() > 0:
        return
    other = _read(name)  # of another process that measures the same
    profiles = {**other.profiles, **held.profiles}
    content = {
        "measured": {**other.measured, **held.measured},
        "profiles": {lists: profile.to_json() for lists, profile in profiles.items()},
    }
    with suppress(OSError, RuntimeError):
        write_whole(cache_folder() / "entropy" / name, json.dumps(content))
