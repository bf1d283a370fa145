"""A model's tensors under llama.cpp's names and in its order of rows, each read when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import gguf
import torch
from torch import Tensor

from dicer.errors import ModelError
from dicer.model.tensors import TensorInfo
from dicer.write.export.llama_cpp.arch import Layout
from dicer.write.export.padding import Made

_WIDE_SCALE = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, whose attention scale llama.cpp takes from its width


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rotary pairs side by side: transformers keeps the two halves of a head apart.

    Args:
        rows: [heads * size, ...], head after head.
        heads: how many there are in this layer.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def tensors(layout: Layout) -> dict[str, Made]:
    """Every tensor of the file but the rotary factors, in the order of writing.

    Raises:
        ModelError: the model has a tensor that the architecture has no place for.
    """
    source = layout.layers.source
    found = {}
    for name, info in source.tensors.infos().items():
        if source.family.locate(name) is None:
            target = _mapped(layout, name)
            made = Made(info, lambda name=name: source.tensors.read(name))  # type: ignore[misc]
            found[target] = _shifted(layout, name, made)
    for index in range(len(layout.units)):
        found.update(_layer(layout, index))
    return found


def _mapped(layout: Layout, name: str) -> str:
    """The name in llama.cpp; older checkpoints lack the outermost prefix."""
    source, kind = layout.layers.source, next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == layout.arch.name)
    names = gguf.get_tensor_name_map(kind, len(layout.units))
    prefix = source.family.layers.split(".")[0]
    for full in (name, f"{prefix}.{name}"):
        if target := names.get_name(full, try_suffixes=(".weight", ".bias")):
            return str(target)
    raise ModelError(f"{source.name}: llama.cpp's {layout.arch.name} has no place for the tensor '{name}'.")


def _layer(layout: Layout, index: int) -> Iterator[tuple[str, Made]]:
    padded = layout.layers.padded(index, layout.units[index])
    ordered = {inner: _rows(layout, index, inner, made) for inner, made in padded.items()}
    if layout.arch.fused:
        parts = [ordered.pop(f"self_attn.{letter}_proj.weight") for letter in "qkv"]
        yield f"blk.{index}.attn_qkv.weight", _joined(parts)
    for inner, made in ordered.items():
        name = layout.layers.source.family.tensor_name(index, inner)
        yield _mapped(layout, name), _shifted(layout, name, made)


def _joined(parts: list[Made]) -> Made:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Made(TensorInfo(shape, parts[0].info.dtype), lambda: torch.cat([part.read() for part in parts]))


def _rows(layout: Layout, index: int, inner: str, made: Made) -> Made:
    """Rows of heads as llama.cpp wants them, and a matrix with outputs first."""
    axis = layout.layers.axes["attention"]
    roles = next((piece.roles for piece in axis.slices if piece.name == inner), ())
    heads = {"query": layout.heads[index], "key": layout.units[index]["attention"]}.get(
        roles[0].removesuffix("_bias") if len(roles) == 1 else "", 0
    )
    if heads and layout.arch.interleaved:
        return _then(made, lambda tensor: interleave(tensor, heads))
    if layout.arch.name == "gpt2" and len(made.shape) == 2:  # Conv1D keeps inputs first
        return Made(TensorInfo(made.shape[::-1], made.info.dtype), lambda: made.read().T)
    if layout.arch.name == "gemma2" and inner == "self_attn.q_proj.weight" and (scale := _query_scale(layout)) != 1:
        return _then(made, lambda tensor: tensor.float() * scale)
    return made


def _shifted(layout: Layout, name: str, made: Made) -> Made:
    """Gemma's norms multiply by one more than their weight; llama.cpp wants the factor itself."""
    if not (layout.arch.name.startswith("gemma") and name.endswith("norm.weight")):
        return made
    scale = _query_scale(layout) if layout.arch.name == "gemma3" and name.endswith("q_norm.weight") else 1.0
    return _then(made, lambda tensor: (tensor.float() + 1.0) * scale)


def _query_scale(layout: Layout) -> float:
    """What queries must be multiplied by: llama.cpp takes its attention scale from sizes, and not from the config."""
    values = layout.values
    wide = len(layout.units) == _WIDE_SCALE[layout.arch.name]
    taken = values["hidden_size"] // layout.heads[0] if wide else layout.head_size
    return math.sqrt(taken / float(values["query_pre_attn_scalar"]))


def _then(made: Made, change: Callable[[Tensor], Tensor]) -> Made:
    return Made(made.info, lambda: change(made.read()))
