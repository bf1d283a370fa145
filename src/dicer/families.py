"""What differs between model families, as data: one row a family, chosen by ``config.model_type``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dicer.errors import RecipeError, UnknownFamily

PRUNED_PREFIX = "pruned_"  # model_type of a checkpoint whose widths differ: pruned_llama, pruned_opt ...


@dataclass(frozen=True)
class Slice:
    """Where the units of an axis lie in one tensor of a layer.

    Attributes:
        name: the tensor's name inside its layer, as on disk (``mlp.gate_proj.weight``).
        dim: the dimension that the units run along.
        roles: what each consecutive segment along ``dim`` is (``gate``, ``up``, ``down``, ``gate_bias``, ``up_bias``);
            Phi-3's fused ``gate_up_proj`` has two segments.
        blocks: how many consecutive rows one unit owns in each segment (1 for neurons, head size for heads).
    """

    name: str
    dim: int
    roles: tuple[str, ...]
    blocks: tuple[int, ...] = (1,)

    @property
    def optional(self) -> bool:
        """Biases are there or not, by config; weights must be there."""
        return all(role.endswith("_bias") for role in self.roles)

    @property
    def is_output(self) -> bool:
        """Whether the units are this tensor's inputs (the output projection) and not its outputs."""
        return self.roles == ("down",)

    def units(self, shape: Sequence[int]) -> int:
        """How many units a tensor of this shape holds."""
        return int(shape[self.dim]) // sum(self.blocks)

    def rows(self, units: Tensor, count: int) -> Tensor:
        """Indices along ``dim`` that the given units own.

        Args:
            units: int64 [K], unit numbers in 0..count-1.
            count: how many units the tensor holds.

        Returns:
            int64 [K * sum(blocks)], segment after segment.
        """
        parts, start = [], 0
        for block in self.blocks:
            parts.append((start + units[:, None] * block + torch.arange(block)).reshape(-1))  # [K*block]
            start += count * block
        return torch.cat(parts)


@dataclass(frozen=True)
class Axis:
    """One kind of unit that can be pruned, and where a layer of this family keeps it.

    Attributes:
        name: ``mlp``.
        width_key: the config attribute that holds the number of units.
        slices: every tensor of a layer that the units run through.
        activation: submodule of a layer whose input is the pre-activation and whose output is the post-activation.
        output: submodule of a layer whose input is the modulated activation.
    """

    name: str
    width_key: str
    slices: tuple[Slice, ...]
    activation: str
    output: str


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as in ``config.json``.
        stem: what the stock config and base model classes are called before ``Config`` and ``Model``.
        causal_lm: name of the stock class with the language-model head.
        layers: path of the list of decoder layers inside the stock class, which is also their prefix on disk.
        mlp: the MLP axis.
        learned_positions: positions are a table of ``max_position_embeddings`` rows, so longer samples cannot run.
    """

    model_type: str
    stem: str
    causal_lm: str
    layers: str
    mlp: Axis
    learned_positions: bool = False

    @property
    def pruned_type(self) -> str:
        """``model_type`` of a checkpoint of this family whose widths differ."""
        return PRUNED_PREFIX + self.model_type

    @property
    def pruned_classes(self) -> dict[str, str]:
        """Auto class -> class in ``modeling_pruned.py`` for a checkpoint whose widths differ."""
        return {
            "AutoConfig": f"Pruned{self.stem}Config",
            "AutoModel": f"Pruned{self.stem}Model",
            "AutoModelForCausalLM": f"Pruned{self.causal_lm}",
        }

    def tensor_name(self, layer: int, name: str) -> str:
        """The full name, on disk and in memory, of a layer's tensor."""
        return f"{self.layers}.{layer}.{name}"

    def locate(self, tensor_name: str) -> tuple[int, str] | None:
        """(layer, name inside it) of a tensor on disk, or None for one outside the decoder layers.

        Older checkpoints lack the outermost prefix (GPT-2's ``h.0.`` for ``transformer.h.0.``): both are understood.
        """
        short = self.layers.split(".", 1)[1]
        match = re.fullmatch(rf"(?:{re.escape(self.layers)}|{re.escape(short)})\.(\d+)\.(.+)", tensor_name)
        return (int(match[1]), match[2]) if match else None

    def widths(self, config: Any) -> list[int]:
        """Units of the MLP axis in every layer, from a transformers config (stock or pruned)."""
        return [self._width(layer) for layer in config.per_layer_config[:]]

    def _width(self, layer_config: Any) -> int:
        value = getattr(layer_config, self.mlp.width_key)
        return 4 * int(layer_config.hidden_size) if value is None else int(value)  # GPT-2: n_inner = null means 4 x


def legal(width: int, ratio: float, multiple: int) -> int:
    """How many units stay of ``width`` when the fraction ``ratio`` goes.

    K = round(width * (1 - ratio)), then the nearest multiple of ``multiple`` that is not more than ``width``
    (METHODS section 1).

    Raises:
        RecipeError: when no unit would stay.
    """
    keep = round(width * (1 - ratio))
    if multiple > 1:
        keep = min(round(keep / multiple), width // multiple) * multiple
    if keep < 1:
        of = f" in multiples of {multiple}" if multiple > 1 else ""
        raise RecipeError(
            f"ratio {ratio} leaves no neuron of {width}{of}: ask for a smaller --ratio or a smaller --width-multiple."
        )
    return keep


@dataclass(frozen=True)
class UnitWeights:
    """One layer's weights in the same unfused, untransposed form for every family.

    Attributes:
        gate: [U, d], or None for an MLP without gate.
        up: [U, d]; without gate, the input projection.
        down: [d, U].
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor

    @property
    def units(self) -> int:
        """U."""
        return self.up.shape[0]


def unit_weights(axis: Axis, tensors: Mapping[str, Tensor]) -> UnitWeights:
    """Views of a layer's tensors by their role; nothing is copied.

    Args:
        axis: whose slices say where each role lies.
        tensors: name inside the layer -> tensor.
    """
    parts: dict[str, Tensor] = {}
    for piece in axis.slices:
        if piece.optional:
            continue
        by_unit = tensors[piece.name].movedim(piece.dim, 0)  # [U * sum(blocks), d]
        count = piece.units(by_unit.shape[:1]) if piece.dim == 0 else by_unit.shape[0] // sum(piece.blocks)
        for role, part in zip(piece.roles, by_unit.split([count * b for b in piece.blocks]), strict=True):
            parts[role] = part.T if role == "down" else part
    return UnitWeights(parts.get("gate"), parts["up"], parts["down"])


def _gated(gate: str, up: str, down: str) -> tuple[Slice, ...]:
    return (
        Slice(f"{gate}.weight", 0, ("gate",)),
        Slice(f"{gate}.bias", 0, ("gate_bias",)),
        Slice(f"{up}.weight", 0, ("up",)),
        Slice(f"{up}.bias", 0, ("up_bias",)),
        Slice(f"{down}.weight", 1, ("down",)),
    )


def _ungated(up: str, down: str, *, transposed: bool) -> tuple[Slice, ...]:
    return (
        Slice(f"{up}.weight", int(transposed), ("up",)),
        Slice(f"{up}.bias", 0, ("up_bias",)),
        Slice(f"{down}.weight", int(not transposed), ("down",)),
    )


_LLAMA_MLP = Axis(
    "mlp", "intermediate_size", _gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "mlp.act_fn", "mlp.down_proj"
)
_PHI3_MLP = Axis(
    "mlp",
    "intermediate_size",
    (
        Slice("mlp.gate_up_proj.weight", 0, ("gate", "up"), (1, 1)),
        Slice("mlp.down_proj.weight", 1, ("down",)),
    ),
    "mlp.activation_fn",
    "mlp.down_proj",
)
_GPT2_MLP = Axis("mlp", "n_inner", _ungated("mlp.c_fc", "mlp.c_proj", transposed=True), "mlp.act", "mlp.c_proj")
_OPT_MLP = Axis("mlp", "ffn_dim", _ungated("fc1", "fc2", transposed=False), "activation_fn", "fc2")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("llama", "Llama", "LlamaForCausalLM", "model.layers", _LLAMA_MLP),
            Family("mistral", "Mistral", "MistralForCausalLM", "model.layers", _LLAMA_MLP),
            Family("qwen2", "Qwen2", "Qwen2ForCausalLM", "model.layers", _LLAMA_MLP),
            Family("qwen3", "Qwen3", "Qwen3ForCausalLM", "model.layers", _LLAMA_MLP),
            Family("gemma", "Gemma", "GemmaForCausalLM", "model.layers", _LLAMA_MLP),
            Family("gemma2", "Gemma2", "Gemma2ForCausalLM", "model.layers", _LLAMA_MLP),
            Family("gemma3_text", "Gemma3Text", "Gemma3ForCausalLM", "model.layers", _LLAMA_MLP),
            Family("phi3", "Phi3", "Phi3ForCausalLM", "model.layers", _PHI3_MLP),
            Family("gpt2", "GPT2", "GPT2LMHeadModel", "transformer.h", _GPT2_MLP, learned_positions=True),
            Family("opt", "OPT", "OPTForCausalLM", "model.decoder.layers", _OPT_MLP, learned_positions=True),
        )
    }
)


def family_of(model_type: str) -> Family:
    """The row for a ``model_type``, stock or pruned.

    Raises:
        UnknownFamily: with the list of known families and where to read how to add one.
    """
    family = FAMILIES.get(model_type.removeprefix(PRUNED_PREFIX))
    if family is None:
        raise UnknownFamily(
            f"model family '{model_type}' is not supported. Known: {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md, section 'Add a family', says how to add one (a row in src/dicer/families.py)."
        )
    return family
