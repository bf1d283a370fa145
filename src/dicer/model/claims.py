"""Counts that a config says, held against what the tensors can be: transformers builds as many parts as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dicer.errors import ModelError
from dicer.model.tensors import TensorInfo

_LAYERS = re.compile(r"(^|_)(layers?|blocks?|depths?)$")
_EXPERTS = re.compile(r"experts?(_|$)")
_LABELS = re.compile(r"(^|_)(labels|classes)$")
_MOST = {_LAYERS: 1000, _EXPERTS: 10_000, _LABELS: 2**20}  # before the tensors are known; no model has as many
# What a config may say though nothing of it is in the files: towers that were left out, a class's own defaults.
_USUAL = {_LAYERS: 100, _EXPERTS: 1024, _LABELS: 2**20}


def check_config(name: str, raw_config: Mapping[str, Any], infos: Mapping[str, TensorInfo] | None = None) -> None:
    """Refuse a config that says more layers, experts or labels than there can be, before anything is built from it.

    Args:
        name: the model's, for people.
        raw_config: ``config.json`` as it stands.
        infos: the tensors that the files hold; None where they are not known yet.

    Raises:
        ModelError: with the first such number.
    """
    stacked = max((info.shape[0] for info in (infos or {}).values() if len(info.shape) > 2), default=0)
    for key, value in _numbers(raw_config):
        kind = next((kind for kind in _MOST if kind.search(key)), None)
        if kind is None:
            continue
        if infos is None and value > _MOST[kind]:
            raise ModelError(f"{name}: config.json says {key} {value:,}, and no model has more than {_MOST[kind]:,}.")
        if infos is not None and value > max(_USUAL[kind], len(infos), stacked if kind is _EXPERTS else 0):
            raise ModelError(
                f"{name}: config.json says {key} {value:,}, and the weights have {len(infos):,} tensors. Config and "
                "weights are from different models."
            )


def _numbers(raw_config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """(key, number) of a config and of all tables and lists in it."""
    waiting: list[tuple[str, Any]] = list(raw_config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(inner), one) for inner, one in value.items()]
        elif isinstance(value, list):
            waiting += [(key, one) for one in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
