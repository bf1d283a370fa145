"""Every tensor of a folder accounted for: which one of the class it is, under the name that transformers writes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dicer.errors import ModelError
from dicer.model.families import Family, Named
from dicer.model.find import as_model_error
from dicer.model.odd import named_code, refuse_names, why_missing
from dicer.model.structure.family_file import FamilyRow
from dicer.model.structure.find import decoder_layers, find_family, memory_names
from dicer.model.structure.layers import Layers
from dicer.model.structure.skeleton import Skeleton, build, stock_class, stock_config
from dicer.model.tensors import SafetensorsSource, TensorInfo

# Buffers that transformers once saved with all models, and scales of a quantized cache.
_PASSED_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.[qkv]_scale$", r"\.attn\.(masked_)?bias$")
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_MTP = re.compile(r"(^|\.)mtp[._]")


@dataclass(frozen=True)
class Matched:
    """A config that fits the tensors.

    Attributes:
        config: the transformers config; embeddings and head are tied in it only where the files have them so.
        raw_config: ``config.json``, with the same said in it.
        where: the decoder layers, where the tensors were held against them.
        stock: the stock class without weights, where it is the class of that config.
        ignored: tensors of the files that are no part of the model: tied copies, old buffers.
        notes: what the user should know.
    """

    config: Any
    raw_config: Mapping[str, Any]
    where: Layers | None = None
    stock: Skeleton | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def account(
    name: str,
    config: Any,
    raw_config: Mapping[str, Any],
    kind: Any,
    tensors: SafetensorsSource,
    row: FamilyRow | None = None,
) -> Matched:
    """Hold every tensor of a class against the headers; afterwards the tensors have the names that transformers writes.

    Older and newer checkpoints of a family differ in prefixes, which transformers knows; layers that predict tokens
    further ahead are no part of the model that it loads, and are left out.

    Args:
        name: the model's, for people.
        config: the transformers config.
        raw_config: ``config.json`` as it stands.
        kind: the class of transformers.
        tensors: the files; changed as said.
        row: what a file of the user's says of the family.

    Raises:
        ModelError: one line for the first thing that does not fit.
    """
    refuse_names(name, tensors.infos())
    with as_model_error(name, "config"):
        whole = build(config, kind)
    is_stock = stock_class(kind) is kind
    layers = decoder_layers(whole if is_stock else _stock(config, kind), stock_class(kind), row)
    tensors.rename(_own_names(whole, layers, tensors.infos()))
    found, whole = _tied(Matched(config, raw_config, layers), whole, kind, tensors)
    infos = tensors.infos()
    _check(name, whole, infos, lambda: find_family(stock_config(config), stock_class(kind), row=row))
    left = [n for n in infos if n not in whole.shapes]
    ignored = whole.model._keys_to_ignore_on_load_unexpected or ()
    passed_over = re.compile("|".join([*_PASSED_OVER, *ignored]))
    ahead = [n for n in left if _MTP.search(n) or ((place := layers.locate(n)) and place[0] >= layers.count)]
    old = [n for n in left if n not in ahead and (passed_over.search(n) or n in whole.model.all_tied_weights_keys)]
    strange = [n for n in left if n not in ahead and n not in old and layers.locate(n)]
    if strange:
        raise ModelError(
            f"{name}: the weights have '{strange[0]}', and as config.json says it a {kind.__name__} has no such "
            "tensor, so transformers would leave it out. Config and weights are from different models."
        )
    notes = list(found.notes)
    if (plain := _plain_layer(ahead, layers, whole)) and not _predicts_ahead(raw_config):
        raise ModelError(
            f"{name}: config.json says {layers.count} layers, and the weights have '{plain}'. Config and weights are "
            "from different models."
        )
    if ahead:
        notes.append(
            f"{len(ahead)} tensors of layers that predict further ahead are left out ({ahead[0]} ...): transformers "
            "does not load them, and they would not fit what is cut"
        )
        found = replace(found, raw_config=_no_more_ahead(found.raw_config))
    others = [n for n in left if n not in ahead and n not in old]
    if others and (code := named_code(raw_config, Named.of(stock_config(config), stock_class(kind)))):
        raise ModelError(
            f"{name} has code of its own ({code}, named by auto_map in config.json), and a {kind.__name__} of "
            f"transformers does not read '{others[0]}' of its weights: it is another model, which dicer cannot prune."
        )
    if others:
        notes.append(f"{len(others)} tensors that transformers does not load are copied as they are ({others[0]} ...)")
    tensors.leave_out([*ahead, *old])
    return replace(found, stock=whole if is_stock else None, ignored=tuple(old), notes=tuple(notes))


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


def _plain_layer(ahead: Collection[str], layers: Layers, whole: Skeleton) -> str | None:
    """A tensor of a layer beyond the count that is made as the others are; one that predicts ahead has more in it."""
    usual = {n for tensors in layers.inside(whole.shapes) for n in tensors}
    beyond: dict[int, list[str]] = {}
    for full in ahead:
        if place := layers.locate(full):
            beyond.setdefault(place[0], []).append(full)
    plain = [own[0] for own in beyond.values() if all((layers.locate(n) or (0, ""))[1] in usual for n in own)]
    return plain[0] if plain else None


def _predicts_ahead(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config says that layers beyond the count predict further ahead."""
    inner = raw_config.get("text_config")
    parts = (raw_config, inner if isinstance(inner, dict) else {})
    return any(part.get(key) for part in parts for key in _AHEAD)


def _own_names(whole: Skeleton, layers: Layers, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name in the files -> name that transformers writes, where the two differ."""
    memory = memory_names(whole.model)
    outside = {memory(n): n for n in whole.shapes if not layers.locate(n)}
    inner = {n for tensors in layers.inside(whole.shapes) for n in tensors}
    found = {}
    for name in infos:
        if name in whole.shapes:
            continue
        own = outside.get(memory(name)) or _in_layers(name, layers, inner)
        if own is not None and own not in infos:
            found[name] = own
    return found


def _in_layers(name: str, layers: Layers, inner: set[str]) -> str | None:
    """The name of a layer's tensor behind another prefix, a shorter or a longer one."""
    for match in re.finditer(r"(?:^|\.)(\d+)\.", name):
        if name[match.end() :] in inner:
            prefix = name[: match.start()]
            if _related(prefix, layers.disk):
                return f"{layers.disk}.{match[1]}.{name[match.end() :]}"
    return None


def _related(first: str, second: str) -> bool:
    """Whether two paths end alike and are of the same tower."""
    towers = re.compile(r"vis|audio|image|encoder\.")
    return first.rpartition(".")[2] == second.rpartition(".")[2] and bool(towers.search(first)) == bool(
        towers.search(second)
    )


def _tied(found: Matched, whole: Skeleton, kind: Any, tensors: SafetensorsSource) -> tuple[Matched, Skeleton]:
    """Settle ties as transformers does: two different tensors are not tied, and of two one may lack in the files."""
    memory = memory_names(whole.model)
    by_memory = {memory(n): n for n in tensors.infos()}
    written = {memory(n): n for n in whole.shapes}
    for target, source in whole.model.all_tied_weights_keys.items():
        first, second = by_memory.get(source), by_memory.get(target)
        if first is None and second is not None and source in written:
            tensors.rename({second: written[source]})
        elif first is not None and second is not None and not same_content(tensors.read(first), tensors.read(second)):
            other = untied(found, target)
            return other, build(other.config, kind)
    return found, whole


def _stock(config: Any, kind: Any) -> Skeleton:
    return build(stock_config(config), stock_class(kind))


def _check(name: str, whole: Skeleton, infos: Mapping[str, TensorInfo], family: Callable[[], Family]) -> None:
    for full, shape in whole.shapes.items():
        found = infos.get(full)
        if found is None:
            if _is_needed(whole, full):
                missing = [n for n in whole.shapes if n not in infos and _is_needed(whole, n)]
                own = family()
                raise ModelError(
                    f"{name}: tensor '{full}' is missing{why_missing(missing, infos, own, own.where.count)}"
                )
            continue
        if not found.dtype.is_floating_point:
            if full in whole.whole_numbers:
                continue
            raise ModelError(
                f"{name}: tensor '{full}' holds {str(found.dtype).removeprefix('torch.')}, so the weights are "
                "quantized. Prune the bf16, fp16 or fp32 checkpoint, then quantize."
            )
        if found.shape != shape:
            raise ModelError(
                f"{name}: config.json calls for {shape} in '{full}', and the file has {found.shape}. Config and "
                "weights are from different models."
            )


def _is_needed(whole: Skeleton, full: str) -> bool:
    """Whether a class cannot do without a tensor; of buffers only those that correct a router are learned."""
    optional = re.compile("|".join(whole.model._keys_to_ignore_on_load_missing or ["$^"]))
    return not optional.search(full) and (not whole.is_buffer(full) or full.endswith("correction_bias"))


def _no_more_ahead(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(raw_config)
    for key in _AHEAD:
        if new.get(key):
            new[key] = 0
        if isinstance(new.get("text_config"), dict) and new["text_config"].get(key):
            new["text_config"] = {**new["text_config"], key: 0}
    return new
