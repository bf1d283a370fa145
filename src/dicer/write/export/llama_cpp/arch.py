"""Which architecture of llama.cpp can be a model, and at what widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dicer.errors import ModelError
from dicer.model.source import ModelSource
from dicer.write.export.padding import Layers, added_parameters

EMPTY_NEURONS = 32  # zero neurons where an MLP is gone; with a width of 0 llama.cpp is silently wrong
_QKV = frozenset(f"self_attn.{letter}_proj" for letter in "qkv")
_ALL = _QKV | {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_GPT2 = frozenset(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))


@dataclass(frozen=True)
class Arch:
    """One architecture of llama.cpp, as far as dense decoders differ (its src/models/*.cpp).

    Attributes:
        name: ``general.architecture``.
        per_layer: every layer may have its own numbers of heads and neurons.
        interleaved: rotary pairs are neighbours, so the rows of queries and keys are permuted.
        fused: queries, keys and values are one tensor, also where the family has three.
        biases: modules of a layer that may have a bias, by the family's names; norms aside.
        whole: heads times head size must be the hidden size.
        tied: the output is always the embedding's matrix.
        factors: has a tensor for frequency factors (``llama3`` rotary scaling).
        activations: what it computes, by transformers' names.
    """

    name: str
    per_layer: bool = False
    interleaved: bool = False
    fused: bool = False
    biases: frozenset[str] = frozenset()
    whole: bool = False
    tied: bool = False
    factors: bool = False
    activations: tuple[str, ...] = ("silu", "swish")


_ACTIVATION = ("hidden_activation", "hidden_act", "activation_function")
_TANH = ("gelu_pytorch_tanh", "gelu_new")
_LLAMA = Arch("llama", interleaved=True, biases=_ALL, factors=True)
_DECI = Arch("deci", per_layer=True, interleaved=True, biases=_ALL, factors=True)
# Family -> what it can be, best first. deci is Llama with own widths for every layer; openelm is Qwen3 with tied
# embeddings and own widths for every layer.
ARCHS: Mapping[str, tuple[Arch, ...]] = MappingProxyType(
    {
        "llama": (_LLAMA, _DECI),
        "mistral": (_LLAMA, _DECI),
        "qwen2": (Arch("qwen2", biases=_QKV, whole=True), _DECI),
        "qwen3": (Arch("qwen3"), Arch("openelm", per_layer=True, fused=True, tied=True)),
        "gemma": (Arch("gemma", tied=True, activations=_TANH),),
        "gemma2": (Arch("gemma2", tied=True, activations=_TANH),),
        "gemma3_text": (Arch("gemma3", activations=_TANH),),
        "phi3": (Arch("phi3", whole=True),),
        "gpt2": (Arch("gpt2", biases=_GPT2, whole=True, activations=_TANH),),
    }
)


@dataclass(frozen=True)
class Layout:
    """What a file will be.

    Attributes:
        arch: the architecture.
        layers: the model's layers.
        units: for every layer, axis -> how many units it gets in the file.
        heads: for every layer, how many query heads.
        head_size: width of one head.
        notes: what the user should know of it.
    """

    arch: Arch
    layers: Layers
    units: list[dict[str, int]]
    heads: list[int]
    head_size: int
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """The config, without the warnings that its attributes give where layers differ."""
        values: dict[str, Any] = self.layers.source.config.to_dict()
        return values


def choose(source: ModelSource, multiple: int = 1) -> Layout:
    """The architecture for a model: its own where all layers are alike, else one with own widths, else padding.

    Args:
        source: any checkpoint of a family that dicer knows.
        multiple: neurons of every layer are padded to a multiple of this.

    Raises:
        ModelError: llama.cpp has no architecture that computes this model; the line says what would work.
    """
    family, layers = source.family.model_type, Layers(source)
    if family not in ARCHS:
        raise ModelError(
            f"{source.name}: llama.cpp has no architecture for the family {family}, so there is no GGUF of it. "
            f"Families that have one: {', '.join(sorted(ARCHS))}."
        )
    alike = all(shape.units == layers.shapes[0].units and all(shape.units.values()) for shape in layers.shapes)
    archs = ARCHS[family]
    able = [arch for arch in archs if (alike or arch.per_layer) and not _misses(arch, source, layers)]
    for arch in able:
        if not arch.whole or _whole_heads(source, layers) == layers.units("attention")[0]:
            return _laid_out(arch, source, layers, multiple)
    if reason := _misses(archs[0], source, layers):
        raise ModelError(f"{source.name}: {reason}")
    return _laid_out(archs[0], source, layers, multiple)


def _laid_out(arch: Arch, source: ModelSource, layers: Layers, multiple: int) -> Layout:
    values = source.config.to_dict()
    axis = layers.axes["attention"]
    queries = int(values[axis.width_keys[0]])
    group = queries // axis.width(values.get)
    heads, neurons = layers.units("attention"), layers.units("mlp")
    if not arch.per_layer:
        most = max(*heads, _whole_heads(source, layers)) if arch.whole else max(heads)
        heads, neurons = [most] * len(heads), [max(neurons)] * len(neurons)
    units = [
        {"attention": max(h, 1), "mlp": -(-(n or EMPTY_NEURONS) // multiple) * multiple}
        for h, n in zip(heads, neurons, strict=True)
    ]
    layout = Layout(arch, layers, units, [u["attention"] * group for u in units], axis.head_size(values))
    if padding := added_parameters(layers, units):
        whole = sum(info.numel for info in source.tensors.infos().values())
        why = "" if arch.per_layer else f", since llama.cpp's {arch.name} has one width for all layers"
        layout.notes.append(f"padding adds {padding:,} parameters ({padding / whole:.1%}){why}")
    return layout


def _whole_heads(source: ModelSource, layers: Layers) -> int:
    """How many units of attention make heads times head size the hidden size."""
    values = source.config.to_dict()
    return int(values.get("hidden_size") or values["n_embd"]) // layers.axes["attention"].channels


def _misses(arch: Arch, source: ModelSource, layers: Layers) -> str:
    """What an architecture lacks for a model, and what would work; empty where it has all."""
    values, has = source.config.to_dict(), source.tensors.infos()
    activation = next(values[key] for key in _ACTIVATION if key in values)
    if activation not in arch.activations:
        return f"llama.cpp's {arch.name} computes {arch.activations[0]}, not {activation}; nothing but that will do."
    if arch.tied and any(name.startswith("lm_head.") for name in has):
        return f"llama.cpp's {arch.name} has no head of its own, and this model's is not its embedding's."
    biased = {inner.removesuffix(".bias") for inner in layers.names if inner.endswith(".bias")}
    if lost := sorted(name for name in biased - arch.biases if not name.split(".")[-1].startswith(("ln_", "norm"))):
        return (
            f"llama.cpp's {arch.name} has no bias in {lost[0]}, and this model has. Prune it without "
            "'--compensate bias' (Llama, Mistral, Qwen2 and GPT-2 can have such biases)."
        )
    scaling = (values.get("rope_parameters") or {}).get("rope_type")
    if scaling == "llama3" and not arch.factors:
        return f"llama.cpp's {arch.name} has no place for rotary scaling '{scaling}'; its llama and deci have."
    return ""
