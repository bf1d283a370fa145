"""What is written of a model differs by where its family comes from: a row of the table, or found in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dicer.model.families import Family
from dicer.model.shapes import LayerShape
from dicer.model.source import ModelSource
from dicer.model.structure.find import FoundFamily
from dicer.model.tensors import TensorInfo
from dicer.write.config import pruned_config
from dicer.write.config_found import found_config


class Form(Protocol):
    """What differs."""

    def config(
        self, source: ModelSource, infos: Mapping[str, TensorInfo], shapes: Sequence[LayerShape], kept: Sequence[int]
    ) -> dict[str, Any]:
        """``config.json`` of what layers of a source become, with the tensors that there will be."""
        ...

    def idle_norms(
        self, source: ModelSource, infos: Mapping[str, TensorInfo], shapes: Sequence[LayerShape]
    ) -> list[str]:
        """Tensors of norms that nothing comes of, as their sub-layer is gone."""
        ...


class RowForm:
    """Of a family with a row."""

    def config(
        self, source: ModelSource, _: Mapping[str, TensorInfo], shapes: Sequence[LayerShape], kept: Sequence[int]
    ) -> dict[str, Any]:
        """``per_layer_config`` says where layers differ."""
        return pruned_config(source, shapes, kept)

    def idle_norms(
        self, source: ModelSource, infos: Mapping[str, TensorInfo], shapes: Sequence[LayerShape]
    ) -> list[str]:
        """Those that the model file leaves out."""
        from dicer.write.export.modeling_pruned import FAMILIES, unused_norms

        family = source.family
        *_, heads, mlp = FAMILIES[family.model_type]
        unused = {
            (index, norm)
            for index, shape in enumerate(shapes)
            for axis, part in (("attention", heads), ("mlp", mlp))
            if not shape.units[axis]
            for norm in unused_norms(part, source.config, axis in shape.output_bias)
        }
        places = ((name, family.locate(name)) for name in infos)
        return [name for name, place in places if place and (place[0], place[1].partition(".")[0]) in unused]


class FoundForm:
    """Of a family that was found."""

    def config(
        self, source: ModelSource, infos: Mapping[str, TensorInfo], shapes: Sequence[LayerShape], kept: Sequence[int]
    ) -> dict[str, Any]:
        """``pruned`` lists where layers differ."""
        return found_config(source, infos, shapes, kept)

    def idle_norms(self, *_: Any) -> list[str]:
        """None: which norms are a sub-layer's is not known."""
        return []


def form_of(family: Family) -> Form:
    """Which of the two."""
    return FoundForm() if isinstance(family, FoundFamily) else RowForm()
