"""Rotary positions in llama.cpp's words: base, scaling, and the tensors of factors that some scalings need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from dicer.errors import ModelError
from dicer.write.export.llama_cpp.arch import Layout

_YARN_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))


@dataclass
class Rope:
    """What a file says of its positions.

    Attributes:
        base: of the frequencies.
        dimensions: how many of a head's are rotated.
        base_sliding: the base in layers with a sliding window, where it is another.
        scaling: type of the scaling.
        numbers: the scaling's numbers, by the end of the writer's method (``factor``, ``orig_ctx_len`` ...).
        factors: name -> float32 [dimensions / 2]; what llama.cpp divides each frequency by.
        notes: what the user should know of it.
    """

    base: float
    dimensions: int
    base_sliding: float | None = None
    scaling: gguf.RopeScalingType | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Hand it to a ``GGUFWriter``; the factors are tensors like others."""
        writer.add_rope_dimension_count(self.dimensions)
        writer.add_rope_freq_base(self.base)
        if self.base_sliding is not None:
            writer.add_rope_freq_base_swa(self.base_sliding)
        if self.scaling is not None:
            writer.add_rope_scaling_type(self.scaling)
        for name, number in self.numbers.items():
            getattr(writer, f"add_rope_scaling_{name}")(number)


def read_rope(layout: Layout) -> Rope | None:
    """The positions of a model; None where it learns them (GPT-2).

    Raises:
        ModelError: a scaling that llama.cpp's architecture does not compute, by its name.
    """
    source, values = layout.layers.source, layout.values
    said = values.get("rope_parameters")
    if not said:
        return None
    by_type = said if "full_attention" in said else {"full_attention": said}
    full, sliding = by_type["full_attention"], by_type.get("sliding_attention")
    size = layout.head_size
    rope = Rope(float(full["rope_theta"]), int(size * float(full.get("partial_rotary_factor") or 1.0)))
    if rope.dimensions != size and layout.arch.name != "phi3":
        raise ModelError(f"{source.name}: llama.cpp's {layout.arch.name} rotates whole heads, and this model a part.")
    if sliding is not None:
        if sliding.get("rope_type", "default") != "default":
            raise _refused(layout, f"{sliding['rope_type']} in sliding layers")
        rope.base_sliding = float(sliding["rope_theta"])
    kind = full.get("rope_type", "default")
    if kind != "default":
        known = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
        if kind not in known:
            raise _refused(layout, str(kind))
        known[kind](rope, full, layout)
    return rope


def _refused(layout: Layout, kind: str) -> ModelError:
    return ModelError(
        f"{layout.layers.source.name}: rotary scaling '{kind}' is none that llama.cpp's {layout.arch.name} computes "
        "from a file. Those that can be exported: default, linear, llama3, yarn; longrope for phi3."
    )


def _linear(rope: Rope, said: dict[str, Any], _: Layout) -> None:
    rope.scaling = gguf.RopeScalingType.LINEAR
    rope.numbers["factor"] = float(said["factor"])


def _llama3(rope: Rope, _: dict[str, Any], layout: Layout) -> None:
    """What transformers makes of each frequency, as the number that llama.cpp divides it by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _attention = ROPE_INIT_FUNCTIONS["llama3"](layout.layers.source.config, "cpu")
    plain = 1.0 / rope.base ** (torch.arange(0, rope.dimensions, 2, dtype=torch.float32) / rope.dimensions)
    rope.factors["rope_freqs.weight"] = plain / scaled


def _yarn(rope: Rope, said: dict[str, Any], layout: Layout) -> None:
    factor = float(said["factor"])
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    own = abs(float(said.get("attention_factor") or usual) - usual) > 1e-6
    if own or said.get("mscale") or said.get("mscale_all_dim"):
        raise _refused(layout, "yarn with an attention factor of its own")
    if said.get("truncate") is False:
        raise _refused(layout, "yarn without truncation")
    rope.scaling = gguf.RopeScalingType.YARN
    rope.numbers["factor"] = factor
    before = said.get("original_max_position_embeddings") or layout.values["max_position_embeddings"]
    rope.numbers["orig_ctx_len"] = int(before)
    for name, default in _YARN_BETAS:
        rope.numbers[f"yarn_{name}"] = float(said.get(name) or default)


def _longrope(rope: Rope, said: dict[str, Any], layout: Layout) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if layout.arch.name != "phi3":
        raise _refused(layout, "longrope")
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](layout.layers.source.config, "cpu", seq_len=1)
    before = int(said.get("original_max_position_embeddings") or layout.values["original_max_position_embeddings"])
    rope.numbers |= {"orig_ctx_len": before, "attn_factors": float(attention)}
    for which in ("long", "short"):
        rope.factors[f"rope_factors_{which}.weight"] = torch.tensor(said[f"{which}_factor"], dtype=torch.float32)
    rope.notes.append(
        f"llama.cpp takes the long factors where its context (-c) is above {before} tokens, transformers where the "
        "text is"
    )
