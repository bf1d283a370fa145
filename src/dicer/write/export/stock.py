"""A checkpoint whose layers differ, padded with zeros until the family's own class can be all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dicer.ask.axes import kind_of
from dicer.errors import ModelError
from dicer.model.find import as_model_error
from dicer.model.shapes import LayerShape, fits_stock
from dicer.model.source import ModelSource
from dicer.model.tensors import TensorInfo
from dicer.write.config import pruned_config
from dicer.write.export.padding import Layers, Made, added_parameters
from dicer.write.side_files import copy_side_files
from dicer.write.sink import MADE_BY_EXPORT, CheckpointSink, check_output, check_space


@dataclass(frozen=True)
class Padded:
    """A folder that was written.

    Attributes:
        path: where it is.
        model_class: what loads it.
        nbytes: of its weights.
        notes: what the user should know of it.
    """

    path: Path
    model_class: str
    nbytes: int
    notes: list[str]


def export_stock(
    source: ModelSource,
    out: Path,
    *,
    pad: int = 1,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Padded:
    """Write a checkpoint that the stock class loads: every layer as wide as the widest, with zeros in between.

    Args:
        source: the checkpoint.
        out: the folder.
        pad: neurons are padded to a multiple of this.
        overwrite: replace what dicer wrote there before.
        progress: called with (stage, done, total).

    Raises:
        ModelError: no padding makes it a stock model: biases that the stock class has no place for, other units.
        OutputError: the folder cannot be written, or something else is there.
    """
    check_output(out, overwrite=overwrite, inputs=[source.folder])
    if {*source.family.axes} != {"attention", "mlp"}:
        found = ", ".join(sorted({kind_of(axis).units for axis in source.family.axes})) or "nothing that can be cut"
        raise ModelError(
            f"{source.name}: layers are padded where they are attention and one MLP, and those of a "
            f"'{source.family.model_type}' are not (found: {found}). Prune it with --stock instead."
        )
    layers = Layers(source)
    shape = _stock_shape(source, layers, pad)
    padded = [layers.padded(i, shape.units) for i in range(len(layers.shapes))]
    config = _config(source, padded, shape)
    made = dict(_tensors(source, layers, padded, config))
    infos = {name: tensor.info for name, tensor in made.items()}
    nbytes = sum(info.nbytes for info in infos.values())
    check_space(out, nbytes)
    padding = added_parameters(layers, [shape.units] * len(layers.shapes))
    with CheckpointSink(out, overwrite=overwrite) as sink:
        if source.folder is not None:
            copy_side_files(source.folder, sink.folder)
        sink.write_json(
            MADE_BY_EXPORT, {"source": source.name, "to": "stock", "units": shape.units, "padding": padding}
        )
        sink.write_tensors(infos, lambda name: made[name].read(), lambda done: progress("write", done, len(made)))
        sink.write_json("config.json", config)
    return Padded(out, source.family.causal_lm, nbytes, [*source.notes, *_notes(infos, padding)])


def _notes(infos: dict[str, TensorInfo], padding: int) -> list[str]:
    whole = sum(info.numel for info in infos.values())
    return [f"{padding:,} of {whole:,} parameters are padding ({padding / whole:.1%}); they cost time and memory"]


def _stock_shape(source: ModelSource, layers: Layers, pad: int) -> LayerShape:
    """The least that all layers can be in the stock class: as many neurons, and as many heads where that is legal."""
    neurons = -(-max(layers.units("mlp")) // pad) * pad
    biased = frozenset().union(*(shape.output_bias for shape in layers.shapes))
    axis, most = layers.axes["attention"], max(layers.units("attention"))
    values = source.config.to_dict()
    whole = int(values.get("hidden_size") or values["n_embd"]) // axis.channels
    for heads in [whole] if axis.fixed else range(most, max(most, whole, axis.width(values.get)) + 1):
        shape = LayerShape({"attention": heads, "mlp": neurons}, biased)
        if heads >= most and fits_stock(source.family, source.config, [shape]):
            return shape
    if lost := [name for name in biased if layers.axes[name].bias_option is None]:
        raise ModelError(
            f"{source.name}: {source.family.causal_lm} has no bias behind its {lost[0]}, and this checkpoint has one. "
            "Prune it without '--compensate bias'."
        )
    raise ModelError(f"{source.name}: {source.family.causal_lm} can have none of the numbers of heads from {most} on.")


def _config(source: ModelSource, padded: Sequence[Mapping[str, Made]], shape: LayerShape) -> dict[str, Any]:
    """``config.json`` of the stock class with these layers."""
    infos = {name: info for name, info in source.tensors.infos().items() if source.family.locate(name) is None}
    infos |= {source.family.tensor_name(i, n): made.info for i, layer in enumerate(padded) for n, made in layer.items()}
    config = pruned_config(source, infos, [shape] * len(padded), range(len(padded)))
    if "auto_map" in config:
        raise ModelError(f"{source.name}: {source.family.causal_lm} cannot have {shape.units} in every layer.")
    return config


def _tensors(
    source: ModelSource, layers: Layers, padded: Sequence[Mapping[str, Made]], config: dict[str, Any]
) -> Iterator[tuple[str, Made]]:
    """Everything that the stock class asks for, by the names that it has for it."""
    infos = source.tensors.infos()
    dtype = next(iter(layers.names.values())).dtype
    for name, wanted in _asked(source, config):
        place = source.family.locate(name)
        short = name.split(".", 1)[-1]
        stored = name if name in infos else short if short in infos else None
        if place is not None and place[1] in padded[place[0]]:
            made = padded[place[0]][place[1]]
        elif place is not None and name.endswith(".bias"):  # what a switch for biases turns on besides those wanted
            made = Made(TensorInfo(wanted, dtype), lambda wanted=wanted: torch.zeros(wanted, dtype=dtype))  # type: ignore[misc]
        elif stored is not None:
            made = Made(infos[stored], lambda stored=stored: source.tensors.read(stored))  # type: ignore[misc]
        else:
            raise ModelError(f"{source.name}: {source.family.causal_lm} asks for '{name}', which is not there.")
        if made.shape != wanted:
            raise ModelError(f"{source.name}: '{name}' would be {made.shape}, and the stock class asks for {wanted}.")
        yield name, made


def _asked(source: ModelSource, config: dict[str, Any]) -> Sequence[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter of the stock model, built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with as_model_error(source.name, "config"), torch.device("meta"):
        values = dict(config)
        stock = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForCausalLM.from_config(stock, trust_remote_code=False)
    tied = set(model.all_tied_weights_keys)
    return [(name, tuple(tensor.shape)) for name, tensor in model.named_parameters() if name not in tied]
