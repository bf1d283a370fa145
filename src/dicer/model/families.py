"""What differs between model families, as data: what is found in a model, or said by a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from dicer.model.structure.family_file import FamilyRow
from dicer.model.structure.heads import HeadKeys
from dicer.model.structure.layers import Layers
from dicer.model.structure.skeleton import pruned_classes
from dicer.model.units import Axis

PRUNED_PREFIX = "pruned_"  # model_type of a checkpoint whose widths differ: pruned_llama, pruned_opt ...


@dataclass(frozen=True)
class Named:
    """What transformers calls the classes of a model, and what ours of it are called.

    Attributes:
        model_type: as in ``config.json``.
        stem: what the stock config is called before ``Config``.
        causal_lm: name of the stock class with the language-model head.
    """

    model_type: str
    stem: str
    causal_lm: str

    @classmethod
    def of(cls, config: Any, kind: Any) -> Named:
        """The names of a class of transformers and of its config, both as they are in transformers."""
        return cls(str(config.model_type), type(config).__name__.removesuffix("Config"), kind.__name__)

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
        import transformers

        known = pruned_classes(getattr(transformers, f"{self.stem}Config"))
        own = f"Pruned{self.causal_lm}"
        # Emu3's text part has a class, and no auto class knows it.
        return (
            known
            if {"AutoModelForCausalLM", "AutoModelForImageTextToText"} & {*known}
            else {**known, "AutoModelForCausalLM": own}
        )


@dataclass(frozen=True)
class Family(Named):
    """A family as it was found in one model; its widths are those of the model's tensors.

    Attributes:
        layers: path of the list of decoder layers inside the stock class.
        final_norm: path of the norm behind the last layer; a variant of the family may lack it.
        axes: by name, in the order of a layer's sub-layers.
        where: the decoder layers.
        learned_positions: positions are a table of ``max_position_embeddings`` rows, so longer samples cannot run.
        returned: how many values a layer returns, 0 where it is no tuple; None where that was not seen.
        counts: axis -> units in every layer, 0 where a layer has none.
        biases: of every layer the axes whose output projection has a bias that the stock class would not give it.
        factors: axis -> units for each one of its width key; 2 where the key holds half of the width, say.
        heads: what the config says of heads; None where they were not found.
        sets: axis -> what the config must say besides its width, path -> value.
        refused: axis, or ``block`` -> why it cannot be pruned, known beforehand.
        said: what a file of the user's says of it, which holds for a twin and for what is written, too.
        notes: what was not found, and why.
    """

    layers: str
    final_norm: str
    axes: Mapping[str, Axis]
    where: Layers
    learned_positions: bool = False
    returned: int | None = None
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biases: tuple[frozenset[str], ...] = ()
    factors: Mapping[str, Fraction] = field(default_factory=dict)
    heads: HeadKeys | None = None
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    said: FamilyRow | None = None

    def tensor_name(self, layer: int, name: str) -> str:
        """The full name, on disk, of a layer's tensor."""
        return f"{self.where.disk}.{layer}.{name}"

    def locate(self, tensor_name: str) -> tuple[int, str] | None:
        """(layer, name inside it) of a tensor on disk, or None for one outside the decoder layers."""
        return self.where.locate(tensor_name)

    def renumbered(self, tensor_name: str, layer: int) -> str:
        """The name of a layer's tensor with another layer's number in it."""
        place = self.locate(tensor_name)
        return tensor_name if place is None else self.tensor_name(layer, place[1])

    def units(self, axis: str) -> list[int]:
        """Units of an axis in every layer, 0 where it was removed."""
        return list(self.counts[axis])

    def output_biases(self, config: Any) -> list[frozenset[str]]:
        """Of every layer the axes with a bias that the stock class would not give them, and those gone but for one."""
        said = (getattr(config, "pruned", None) or {}).get("own", {})
        skips = [said.get(f"{i:03d}", {}).get("skip", {}) for i in range(self.where.count)]
        return [
            own | {name for name, axis in self.axes.items() if skip.get(axis.modules[-1], {}).get("bias")}
            for own, skip in zip(self.biases, skips, strict=True)
        ]
