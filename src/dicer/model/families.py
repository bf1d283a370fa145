"""What differs between model families, as data: one row a family, chosen by ``config.model_type``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from dicer.errors import UnknownFamily
from dicer.model.units import Axis, Slice

PRUNED_PREFIX = "pruned_"  # model_type of a checkpoint whose widths differ: pruned_llama, pruned_opt ...


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as in ``config.json``.
        stem: what the stock config and base model classes are called before ``Config`` and ``Model``.
        causal_lm: name of the stock class with the language-model head.
        layers: path of the list of decoder layers inside the stock class, which is also their prefix on disk.
        final_norm: path of the norm behind the last layer; a variant of the family may lack it.
        axes: by name, in the order of a layer's sub-layers; :meth:`sized` knows their block sizes.
        layers_key: what ``config.json`` calls the number of decoder layers.
        learned_positions: positions are a table of ``max_position_embeddings`` rows, so longer samples cannot run.
    """

    model_type: str
    stem: str
    causal_lm: str
    layers: str
    final_norm: str
    axes: Mapping[str, Axis]
    learned_positions: bool = False
    layers_key: str = "num_hidden_layers"

    @property
    def stock_class(self) -> Any:
        """The class of transformers."""
        import transformers

        return getattr(transformers, self.causal_lm)

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
        match = self._match(tensor_name)
        return (int(match[1]), match[2]) if match else None

    def renumbered(self, tensor_name: str, layer: int) -> str:
        """The name of a layer's tensor with another layer's number in it."""
        match = self._match(tensor_name)
        return tensor_name if match is None else f"{tensor_name[: match.start(1)]}{layer}.{match[2]}"

    def _match(self, tensor_name: str) -> re.Match[str] | None:
        short = self.layers.split(".", 1)[1]
        return re.fullmatch(rf"(?:{re.escape(self.layers)}|{re.escape(short)})\.(\d+)\.(.+)", tensor_name)

    def sized(self, config: Any) -> dict[str, Axis]:
        """The axes at the block sizes of a model, by name.

        Args:
            config: a transformers config, stock or pruned.
        """
        values = config.to_dict()  # the attributes of a config whose layers differ warn when they are read
        heads = self.axes["attention"]
        queries = int(values[heads.width_keys[0]])
        size = head_size(values, queries)
        rows = queries // heads.width(values.get) * size
        return {name: axis.sized(rows, size) for name, axis in self.axes.items()}

    def units(self, config: Any, axis: str) -> list[int]:
        """Units of an axis in every layer, from a transformers config (stock or pruned); 0 where it was removed."""
        return [
            0 if axis in getattr(layer, "skip", ()) else self.axes[axis].width(partial(getattr, layer))
            for layer in config.per_layer_config[:]
        ]

    def output_biases(self, config: Any) -> list[frozenset[str]]:
        """Of every layer the axes whose output projection has a bias that the stock class would not give it."""
        return [frozenset(getattr(layer, "output_bias", ())) for layer in config.per_layer_config]

    def widths(self, config: Any) -> list[int]:
        """Neurons in every layer."""
        return self.units(config, "mlp")


def head_size(config: Mapping[str, Any], heads: int) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or int(config.get("hidden_size") or config["n_embd"]) // heads)


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


def _heads(module: str, output: str, *, output_dim: int = 1) -> tuple[Slice, ...]:
    parts = (("q", "query"), ("k", "key"), ("v", "value"))
    return (
        *(
            Slice(f"{module}.{letter}_proj.{kind}", 0, (role + suffix,))
            for letter, role in parts
            for kind, suffix in (("weight", ""), ("bias", "_bias"))
        ),
        Slice(f"{output}.weight", output_dim, ("output",)),
    )


_LLAMA_MLP = Axis(
    "mlp",
    ("intermediate_size",),
    _gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp",),
    "mlp.act_fn",
    "mlp.down_proj",
)
_LLAMA_HEADS = Axis(
    "attention",
    ("num_attention_heads", "num_key_value_heads"),
    _heads("self_attn", "self_attn.o_proj"),
    ("self_attn",),
    None,
    "self_attn.o_proj",
    returns=2,
    size_key="head_dim",
    default=("num_attention_heads", 1),
)
_BIASED_HEADS = replace(_LLAMA_HEADS, bias_option="attention_bias")
_PHI3_MLP = replace(
    _LLAMA_MLP,
    slices=(
        Slice("mlp.gate_up_proj.weight", 0, ("gate", "up"), (1, 1)),
        Slice("mlp.down_proj.weight", 1, ("down",)),
    ),
    activation="mlp.activation_fn",
)
_PHI3_HEADS = replace(
    _LLAMA_HEADS,
    slices=(
        Slice("self_attn.qkv_proj.weight", 0, ("query", "key", "value"), (1, 1, 1)),
        Slice("self_attn.o_proj.weight", 1, ("output",)),
    ),
)
_GPT2_MLP = Axis(
    "mlp",
    ("n_inner",),
    _ungated("mlp.c_fc", "mlp.c_proj", transposed=True),
    ("mlp",),
    "mlp.act",
    "mlp.c_proj",
    default=("hidden_size", 4),
)
_GPT2_HEADS = replace(
    _LLAMA_HEADS,
    width_keys=("n_head",),
    slices=(
        Slice("attn.c_attn.weight", 1, ("query", "key", "value"), (1, 1, 1)),
        Slice("attn.c_attn.bias", 0, ("query_bias", "key_bias", "value_bias"), (1, 1, 1)),
        Slice("attn.c_proj.weight", 0, ("output",)),
    ),
    modules=("attn",),
    output="attn.c_proj",
    fixed=(("num_heads", "units"), ("split_size", "channels")),
    default=None,
)
_OPT_MLP = Axis("mlp", ("ffn_dim",), _ungated("fc1", "fc2", transposed=False), ("fc1", "fc2"), "activation_fn", "fc2")
_OPT_HEADS = replace(
    _LLAMA_HEADS,
    width_keys=("num_attention_heads",),
    slices=_heads("self_attn", "self_attn.out_proj"),
    output="self_attn.out_proj",
    fixed=(("num_heads", "units"),),
    default=None,
)


def _axes(heads: Axis, mlp: Axis) -> Mapping[str, Axis]:
    return MappingProxyType({"attention": heads, "mlp": mlp})


def _like_llama(
    model_type: str, stem: str, mlp: Axis = _LLAMA_MLP, heads: Axis = _LLAMA_HEADS, *, even_heads: bool = False
) -> Family:
    name = f"{stem.removesuffix('Text')}ForCausalLM"
    heads = replace(heads, divides="hidden_size") if even_heads else heads
    return Family(model_type, stem, name, "model.layers", "model.norm", _axes(heads, mlp))


_LLAMA_BIASED = replace(_LLAMA_MLP, bias_option="mlp_bias")
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            _like_llama("llama", "Llama", _LLAMA_BIASED, _BIASED_HEADS, even_heads=True),
            _like_llama("mistral", "Mistral"),
            _like_llama("qwen2", "Qwen2"),
            _like_llama("qwen3", "Qwen3", heads=_BIASED_HEADS),
            _like_llama("gemma", "Gemma", heads=_BIASED_HEADS),
            _like_llama("gemma2", "Gemma2", heads=_BIASED_HEADS, even_heads=True),
            _like_llama("gemma3_text", "Gemma3Text", heads=_BIASED_HEADS, even_heads=True),
            _like_llama("phi3", "Phi3", _PHI3_MLP, _PHI3_HEADS),
            Family(
                "gpt2",
                "GPT2",
                "GPT2LMHeadModel",
                "transformer.h",
                "transformer.ln_f",
                _axes(_GPT2_HEADS, _GPT2_MLP),
                learned_positions=True,
                layers_key="n_layer",
            ),
            Family(
                "opt",
                "OPT",
                "OPTForCausalLM",
                "model.decoder.layers",
                "model.decoder.final_layer_norm",
                _axes(_OPT_HEADS, _OPT_MLP),
                learned_positions=True,
            ),
        )
    }
)


def known_family(model_type: str) -> Family | None:
    """The row for a ``model_type``, stock or pruned, or None where there is none."""
    return FAMILIES.get(model_type.removeprefix(PRUNED_PREFIX))


def family_of(model_type: str) -> Family:
    """The row for a ``model_type``, stock or pruned.

    Raises:
        UnknownFamily: with the list of known families and where to read how to add one.
    """
    family = FAMILIES.get(model_type.removeprefix(PRUNED_PREFIX))
    if family is None:
        raise UnknownFamily(
            f"model family '{model_type}' is not supported. Known: {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md, section 'Add a family', says how to add one (a row in src/dicer/model/families.py)."
        )
    return family
