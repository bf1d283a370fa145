"""The GGUF file: tensor by tensor from the shards, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize

from dicer.errors import ModelError, OutputError
from dicer.files import as_output_error
from dicer.holds import check_single, taken
from dicer.model.source import ModelSource
from dicer.model.tensors import TensorInfo
from dicer.reading import open_plain
from dicer.write.export.llama_cpp.arch import Layout, choose
from dicer.write.export.llama_cpp.keys import context_notes, refuse_odd, write_keys
from dicer.write.export.llama_cpp.layers import tensors
from dicer.write.export.llama_cpp.rope import Rope, read_rope
from dicer.write.export.llama_cpp.tokenizer import Vocabulary, read_vocabulary
from dicer.write.export.padding import Made
from dicer.write.sink import check_space

_Q8_ROW = 32  # elements that q8_0 packs together
_LARGEST_F16 = float(np.finfo(np.float16).max)
_NEEDS_FLOAT = ("position_embd.weight",)  # besides all vectors: llama.cpp reads these rows as float32
TYPES: Mapping[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = MappingProxyType(
    {
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }
)
_OWN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: where it is.
        arch: its architecture in llama.cpp.
        type: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        nbytes: its size.
        notes: what the user should know of it.
    """

    path: Path
    arch: str
    type: str
    nbytes: int
    notes: list[str]


def export_gguf(
    source: ModelSource,
    out: Path,
    *,
    type: str | None = None,
    pad: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Exported:
    """Write a checkpoint as a GGUF file.

    Args:
        source: the checkpoint; its layers may differ in width.
        out: the file.
        type: of its matrices, one of :data:`TYPES`; without, the checkpoint's own. Vectors are float32.
        pad: neurons of every layer are padded with zeros to a multiple of this; without, of 32 for q8_0, else 1.
        overwrite: replace a GGUF file that is there, once the new one is whole.
        progress: called with (stage, done, total).

    Raises:
        ModelError: llama.cpp cannot be this model, or its tokenizer is none that llama.cpp has.
        OutputError: the file cannot be written, or something else is there.
    """
    target = check_file(out, overwrite=overwrite, source=source)
    kind = type or _own_type(source)
    layout, rope = lay_out(source, pad or (_Q8_ROW if kind == "q8_0" else 1))
    vocabulary = read_vocabulary(source, rows_of_embedding(layout))
    wanted = tensors(layout) | {name: _made(factors) for name, factors in (rope.factors if rope else {}).items()}
    types = {name: _type_of(name, made, TYPES[kind][0]) for name, made in wanted.items()}
    check_space(out, sum(_nbytes(made.shape, types[name]) for name, made in wanted.items()))
    with taken(out) as place, as_output_error(out):
        writer = gguf.GGUFWriter(place.new, layout.arch.name)
        try:
            _write_head(writer, layout, rope, vocabulary, kind)
            _write_tensors(writer, wanted, types, lambda done: progress("write", done, len(wanted)), source.name)
        finally:
            writer.close()
        place.finish()
    unpacked = sum(t == gguf.GGMLQuantizationType.F16 for t in types.values()) if kind == "q8_0" else 0
    kept = [f"{unpacked} matrices are f16, since their rows are no multiple of {_Q8_ROW}"] if unpacked else []
    notes = [*source.notes, *layout.notes, *context_notes(layout), *(rope.notes if rope else ()), *kept]
    return Exported(out, layout.arch.name, kind, target.stat().st_size, notes)


def lay_out(source: ModelSource, multiple: int = 1) -> tuple[Layout, Rope | None]:
    """What the file of a model will be, from its config and headers alone; the tokenizer may still be refused.

    Args:
        source: the checkpoint.
        multiple: neurons of every layer are padded to a multiple of this.

    Raises:
        ModelError: llama.cpp cannot be this model.
    """
    layout = choose(source, multiple)
    refuse_odd(layout)
    return layout, read_rope(layout)


def check_file(out: Path, *, overwrite: bool, source: ModelSource | None = None) -> Path:
    """Refuse a place where something would be lost, or nothing can be written; else the path, links followed.

    Raises:
        OutputError: with what is there.
    """
    inputs = [source.folder] if source is not None and source.folder is not None else []
    target = check_single(out, overwrite=overwrite, inputs=inputs)
    if target.exists():
        with as_output_error(out), open_plain(target) as file:
            if file.read(4) != b"GGUF":
                raise OutputError(f"{out} is no GGUF file, so --overwrite leaves it; choose another name.")
    return target


def _own_type(source: ModelSource) -> str:
    dtypes = {info.dtype for info in source.tensors.infos().values() if len(info.shape) > 1}
    return _OWN[dtypes.pop()] if len(dtypes) == 1 and dtypes <= _OWN.keys() else "f32"


def rows_of_embedding(layout: Layout) -> int:
    """For how many tokens a file needs a name."""
    return int(layout.values["vocab_size"])


def _made(tensor: torch.Tensor) -> Made:
    return Made(TensorInfo(tuple(tensor.shape), tensor.dtype), lambda: tensor)


def _type_of(name: str, made: Made, wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(made.shape) < 2 or name in _NEEDS_FLOAT:
        return gguf.GGMLQuantizationType.F32
    if wanted == gguf.GGMLQuantizationType.Q8_0 and made.shape[-1] % _Q8_ROW:
        return gguf.GGMLQuantizationType.F16
    return wanted


def _nbytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    return int(np.prod(quant_shape_to_byte_shape(shape, kind)))


def _write_head(writer: Any, layout: Layout, rope: Rope | None, vocabulary: Vocabulary, kind: str) -> None:
    writer.add_name(vocabulary.named(layout.layers.source.name))
    write_keys(writer, layout)
    writer.add_file_type(int(TYPES[kind][1]))
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if rope is not None:
        rope.write(writer)
    vocabulary.write(writer)


def _write_tensors(
    writer: Any,
    wanted: Mapping[str, Made],
    types: Mapping[str, gguf.GGMLQuantizationType],
    progress: Callable[[int], None],
    model: str,
) -> None:
    """First what all will be, then one after the other: one is in memory at a time."""
    for name, made in wanted.items():
        writer.add_tensor_info(name, made.shape, np.dtype(np.float32), _nbytes(made.shape, types[name]), types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, made) in enumerate(wanted.items(), start=1):
        values = made.read().detach().float().contiguous().numpy()
        if types[name] == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > _LARGEST_F16:
            raise ModelError(f"{model}: '{name}' has values that f16 cannot hold. Use --type bf16 or f32.")
        writer.write_tensor_data(quantize(values, types[name]))
        progress(done)
