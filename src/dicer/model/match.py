"""A config held against the tensors of a folder, before anything is loaded: what is read, under which name, and why."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dicer.errors import ModelError
from dicer.model.families import Family
from dicer.model.find import as_model_error
from dicer.model.odd import named_code, refuse_names, why_missing
from dicer.model.tensors import SafetensorsSource, TensorInfo

# Buffers that transformers once saved with all models, scales of a quantized cache; those of single classes it knows.
_PASSED_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.[qkv]_scale$")


@dataclass(frozen=True)
class Matched:
    """A config that fits the tensors.

    Attributes:
        config: the transformers config; embeddings and head are tied in it only where the files have them so.
        raw_config: ``config.json``, with the same said in it.
        ignored: tensors of the files that are no part of the model: tied copies, old buffers.
        notes: what the user should know.
    """

    config: Any
    raw_config: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def match(name: str, config: Any, raw_config: Mapping[str, Any], family: Family, tensors: SafetensorsSource) -> Matched:
    """Hold every tensor that a config calls for against the headers, and settle what tied tensors are.

    Args:
        name: the model's, for people.
        config: the transformers config.
        raw_config: ``config.json`` as it stands.
        family: its row of the table.
        tensors: the files; afterwards without what is no part of the model, and tied tensors under the name that
            transformers writes.

    Raises:
        ModelError: one line for the first thing that does not fit, and what it is if that can be told.
    """
    refuse_names(name, tensors.infos())
    found, skeleton = _tied(name, Matched(config, raw_config), tensors)
    _check(name, skeleton, family, tensors.infos(), int(found.config.num_hidden_layers))
    unread = _unread(skeleton, tensors.infos())
    passed_over = re.compile("|".join([*_PASSED_OVER, *(skeleton._keys_to_ignore_on_load_unexpected or ())]))
    old = tuple(n for n in unread if n in skeleton.all_tied_weights_keys or passed_over.search(n))
    if strange := [n for n in unread if n not in old and family.locate(n)]:
        raise ModelError(
            f"{name}: the weights have '{strange[0]}', and as config.json says it a {type(skeleton).__name__} has no "
            "such tensor, so transformers would leave it out. Config and weights are from different models."
        )
    notes = list(found.notes)
    others = [n for n in unread if n not in old]
    if others and (code := named_code(raw_config, family)):
        raise ModelError(
            f"{name} has code of its own ({code}, named by auto_map in config.json), and a {family.causal_lm} of "
            f"transformers does not read '{others[0]}' of its weights: it is another model, which dicer cannot prune."
        )
    if others:
        notes.append(f"{len(others)} tensors that transformers does not load are copied as they are ({others[0]} ...)")
    tensors.leave_out(old)
    return replace(found, ignored=old, notes=tuple(notes))


def _skeleton(name: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with as_model_error(name, "config"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _tied(name: str, found: Matched, tensors: SafetensorsSource) -> tuple[Matched, Any]:
    """Settle ties as transformers does: two different tensors are not tied, and of two one may lack in the files."""
    skeleton = _skeleton(name, found.config)
    for target, source in skeleton.all_tied_weights_keys.items():
        first, second = _on_disk(source, tensors.infos()), _on_disk(target, tensors.infos())
        if first is None and second is not None:
            tensors.rename({second: source})
        elif first is not None and second is not None and not same_content(tensors.read(first), tensors.read(second)):
            return untied(found, target), _skeleton(name, untied(found, target).config)
    return found, skeleton


def untied(found: Matched, head: str) -> Matched:
    """The same with a head of its own."""
    config = copy.deepcopy(found.config)
    config.tie_word_embeddings = False
    note = (
        f"'{head}' differs from the embeddings though config.json says tie_word_embeddings: true; it is kept, and the "
        "result says false"
    )
    return replace(
        found, config=config, raw_config={**found.raw_config, "tie_word_embeddings": False}, notes=(*found.notes, note)
    )


def same_content(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.data_ptr() == second.data_ptr():
        return True
    bits = as_bits(first), as_bits(second)
    if bits[0].dtype != bits[1].dtype:  # one of them begins in the middle of 8 bytes
        return torch.equal(*(t.detach().view(_BITS[t.dtype.itemsize]) for t in (first, second)))
    return torch.equal(*bits)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """A flat view as integers, in which NaN is equal to itself; of 8 bytes each where they fit, which is faster."""
    flat = tensor.detach().reshape(-1)
    wide = 8 // flat.dtype.itemsize
    fits = not flat.numel() % wide and not flat.storage_offset() % wide
    return flat.view(torch.int64 if fits else _BITS[flat.dtype.itemsize])


def _on_disk(full: str, infos: Mapping[str, TensorInfo]) -> str | None:
    """What a tensor is called in the files: older checkpoints lack the outermost prefix."""
    return next((n for n in (full, full.split(".", 1)[-1]) if n in infos), None)


def _check(name: str, skeleton: nn.Module, family: Family, infos: Mapping[str, TensorInfo], layers: int) -> None:
    expected = dict(skeleton.named_parameters())
    missing = [full for full in expected if _on_disk(full, infos) is None]
    if missing:
        raise ModelError(f"{name}: tensor '{missing[0]}' is missing{why_missing(missing, infos, family, layers)}")
    for full, parameter in expected.items():
        found = infos[_on_disk(full, infos) or full]
        if not found.dtype.is_floating_point:
            raise ModelError(
                f"{name}: tensor '{full}' holds {str(found.dtype).removeprefix('torch.')}, so the weights are "
                "quantized. Prune the bf16, fp16 or fp32 checkpoint, then quantize."
            )
        if found.shape != tuple(parameter.shape):
            raise ModelError(
                f"{name}: config.json calls for {tuple(parameter.shape)} in '{full}', and the file has "
                f"{found.shape}. Config and weights are from different models."
            )
    beyond = [n for n in infos if (place := family.locate(n)) and place[0] >= layers]
    if beyond:
        raise ModelError(f"{name}: config.json says {layers} layers, and the weights have '{beyond[0]}'.")


def _unread(skeleton: Any, infos: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors of the files that the model does not read."""
    tied = set(skeleton.all_tied_weights_keys)
    read = {n for full in skeleton.state_dict() if full not in tied for n in (full, full.split(".", 1)[-1])}
    return [n for n in infos if n not in read]
