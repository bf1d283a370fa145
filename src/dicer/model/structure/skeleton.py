"""A model without weights: the class that a config calls for, built on the meta device, with its tensors as on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dicer.errors import UnknownFamily

Shape = tuple[int, ...]
_OWN_KEYS = ("pruned", "auto_map", "model_type", "architectures", "per_layer_config", "output_bias")
# Auto class -> how the names of its classes end.
_AUTO = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForImageTextToText": "ForConditionalGeneration",
}


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        config: the transformers config that it was built from.
        model: the stock class.
    """

    config: Any
    model: Any

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The tensors that ``save_pretrained`` would write: name on disk -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @cached_property
    def whole_numbers(self) -> frozenset[str]:
        """Tensors on disk that hold no fractions in any checkpoint: tables and counters."""
        return frozenset(name for name, tensor in self._tensors.items() if not tensor.is_floating_point())

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return on_disk(self.model)

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is no parameter, by its name in memory."""
        return name in self._buffers

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_buffers())

    @cached_property
    def lists(self) -> dict[str, int]:
        """Path of every list of modules -> how long it is."""
        return {name: len(part) for name, part in self.model.named_modules() if isinstance(part, nn.ModuleList)}


def on_disk(model: Any, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A model's tensors by the names, and in the layout, that transformers writes them in.

    Args:
        model: of transformers, on any device.
        state: some of its tensors; all of them by default, but those that are tied to others.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if state is None:
        ignored = {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    as_loaded = model.__dict__.pop("_weight_conversions", None)  # which names the files' own, older prefixes
    try:
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(state))
    finally:
        if as_loaded is not None:
            model._weight_conversions = as_loaded
    return found


def model_class(config: Any, architectures: Any = None) -> Any:
    """The class of transformers that a config calls for, with a head that predicts tokens.

    A class for the text part alone, which would leave a vision tower out, is none for the config of the whole.

    Args:
        config: a transformers config.
        architectures: what ``config.json`` says of it; decides where there are two.

    Raises:
        UnknownFamily: transformers has none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kinds: list[Any] = []
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        found = mapping.get(type(config), None) or ()
        kinds += found if isinstance(found, tuple | list) else [found]
    whole = [kind for kind in kinds if kind.config_class in (type(config), None)] or kinds
    if not whole:
        raise UnknownFamily(
            f"transformers has no language model for a '{config.model_type}' ({type(config).__name__})."
        )
    named = architectures if isinstance(architectures, list) else []
    return next((kind for kind in whole if kind.__name__ in named), whole[0])


def pruned_classes(config_class: Any) -> dict[str, str]:
    """Auto class -> class in ``modeling_pruned.py``, for checkpoints of a config class whose layers differ.

    A class for the text part alone is left out; where one is another config's own (InternLM 3 has Llama's), ours has a
    name of its own.
    """
    import transformers

    stem = config_class.__name__.removesuffix("Config")
    found = {"AutoConfig": f"Pruned{stem}Config"}
    for auto, ending in _AUTO.items():
        stock = getattr(transformers, auto)._model_mapping.get(config_class, None)
        stock = stock[0] if isinstance(stock, tuple) else stock
        if stock is not None and stock.config_class is config_class:
            found[auto] = f"Pruned{stock.__name__}"
        elif stock is not None and not config_class.sub_configs:
            found[auto] = f"Pruned{stem}{ending}"
    return found


def stock_config_class(config: Any) -> Any:
    """The class of transformers of a config, also where it is one of ours made of that."""
    return stock_class(type(config))


def stock_class(kind: Any) -> Any:
    """The class of transformers that a class of ours is made of; else the same."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("transformers."))


def stock_config(config: Any) -> Any:
    """The config of transformers' own class: that of a model whose layers differ without the list of what differs."""
    own, stock = _OWN_KEYS, stock_config_class(config)
    if type(config) is stock:
        return config
    return stock.from_dict({key: value for key, value in config.to_dict().items() if key not in own})


def as_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` as values: JSON has no word for infinity, so transformers writes ``{"__float__": ...}``."""

    def value(said: Any) -> Any:
        if isinstance(said, Mapping):
            return float(said["__float__"]) if [*said] == ["__float__"] else {key: value(v) for key, v in said.items()}
        return [value(item) for item in said] if isinstance(said, list | tuple) else copy.deepcopy(said)

    return {key: value(said) for key, said in raw.items()}


def build(config: Any, kind: Any) -> Skeleton:
    """A model of a class on the meta device; whatever the class raises of a config that it does not take goes on."""
    own = copy.deepcopy(config)
    with torch.device("meta"), quiet():
        model = kind._from_config(own)
    return Skeleton(own, model.eval())


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A config with other values; ``text_config.intermediate_size`` is a key of a config inside it.

    The config is made anew from its own dictionary, so that what a class derives from a key follows it.
    """
    said = copy.deepcopy(config.to_dict())
    for path, value in values.items():
        *outer, key = path.split(".")
        inner = said
        for name in outer:
            inner = inner[name]
        inner[key] = value
    with quiet():
        return type(config).from_dict(said)


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing of configs that are only tried."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def flat_values(config: Any) -> dict[str, Any]:
    """Every key of the text part of a config by its path, as in ``text_config.intermediate_size``."""
    said = config.to_dict()
    found = dict(said)
    for name in ("text_config", "llm_config", "language_config", "ffn_config", "attn_config"):
        if isinstance(said.get(name), dict):
            found |= {f"{name}.{key}": value for key, value in said[name].items()}
    return found
