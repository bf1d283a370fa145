"""Language models whose layers differ in size, written by dicer (Apache-2.0).

Needs only transformers (5.14 or newer) and torch. The classes are those of transformers, whichever config.json calls
for, made when they are asked for: ``PrunedX`` for its class ``X``. Then each layer is given what ``pruned`` in
config.json lists for it: parameters of other shapes, counts that its modules keep, and sub-layers that add nothing, or
a constant. A norm that nothing comes of goes, as a parameter without a gradient stops training on several processes.
Nothing else is changed. Load with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

or, where dicer is installed and imported, without the flag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D


class SkippedMLP(nn.Module):
    """An MLP that is gone: it adds nothing to the residual stream, or its ``bias``, and may return None behind that."""

    def __init__(self, size: int, bias: bool, returns: int = 1) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.returns = returns

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """[..., d] -> [..., d], whatever it is given."""
        nothing = torch.zeros_like(hidden_states)
        added = nothing if self.bias is None else nothing + self.bias
        return added if self.returns == 1 else (added, *[None] * (self.returns - 1))


class SkippedAttention(SkippedMLP):
    """Attention that is gone. Its cache still counts tokens: the first layer's length is taken for that of all."""

    def __init__(self, config: Any, bias: bool, layer_idx: int, size: int = 0, returns: int = 2) -> None:
        super().__init__(size or config.hidden_size, bias, returns)
        self.config = config
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Any:
        """[B, T, d] -> ([B, T, d], no attention weights)."""
        if past_key_values is not None:
            count = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(count, count, self.layer_idx)
        if self.config is None:  # never: vLLM looks for this call in the source of every layer that it serves
            attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
            attend(self, hidden_states, hidden_states, hidden_states, None)
        return super().forward(hidden_states)


class _OwnHeads:
    """A model's config with a layer's own numbers of heads; all else is the model's, also where it changes later."""

    def __init__(self, config: Any, **counts: int) -> None:
        self._config = config
        vars(self).update(counts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


@contextmanager
def _put_aside(config: Any) -> Iterator[None]:
    """Hide for a while what config.json says for others alone: vLLM reads the heads of each layer."""
    keys = (getattr(config, "pruned", None) or {}).get("aside", ())
    whole = config.to_dict() if keys else {}
    values = {key: whole.get(key) for key in keys}
    try:
        for key in values:
            setattr(config, key, None)
        yield
    finally:
        for key, value in values.items():
            setattr(config, key, value)


def shape_as_listed(model: Any, said: Mapping[str, Any]) -> None:
    """Make each layer what ``pruned`` in config.json lists for it, by the names inside the layer.

    Args:
        model: of the stock class.
        said: ``layers``: where they are in the class with the head; ``own``: number -> what is a layer's own:
            ``shapes`` of parameters, ``attributes`` of modules, values in their ``config``, modules to ``skip``, and
            ``idle`` norms; ``aside``: keys of config.json that others read.
    """
    old: list[str] = []
    path, base = said["layers"], f"{model.base_model_prefix}."
    if model.base_model is model and base != ".":
        path = path.removeprefix(base)
    layers = model.get_submodule(path)
    for number, own in said["own"].items():
        layer: Any = layers[int(number)]
        for name, shape in own.get("shapes", {}).items():
            _resize_parameter(layer, name, shape)
        for place, values in own.get("attributes", {}).items():
            module = layer.get_submodule(place)
            for name, value in values.items():
                setattr(module, name, type(getattr(module, name))(value))
        for place, counts in own.get("config", {}).items():
            module = layer.get_submodule(place)
            module.config = _OwnHeads(module.config, **counts)
        for place, skipped in own.get("skip", {}).items():
            _skip(layer, place, int(number), **skipped)
        for place in own.get("idle", ()):
            _put(layer, place, nn.Identity())
            old.append(rf"\.{int(number)}\.{re.escape(place)}\.")  # checkpoints of dicer 0.1 have them
    model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or ()), *old]
    model.post_init()  # again: what is new is not initialised yet


def _resize_parameter(layer: Any, name: str, shape: list[int]) -> None:
    """Give a parameter another shape, or a linear map a bias that its class does not give it."""
    place, _, leaf = name.rpartition(".")
    module = layer.get_submodule(place)
    old = getattr(module, leaf, None)
    like = module.weight if old is None else old
    new = like.new_empty(shape)
    if isinstance(like, nn.Parameter):
        module.register_parameter(leaf, nn.Parameter(new, requires_grad=like.requires_grad))
    else:
        module.register_buffer(leaf, new)
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    if leaf == "weight" and isinstance(module, Conv1D):
        module.nx, module.nf = shape
    module._is_hf_initialized = False


def _put(layer: Any, place: str, module: nn.Module) -> None:
    parent, _, last = place.rpartition(".")
    setattr(layer.get_submodule(parent), last, module)


def _skip(layer: Any, place: str, number: int, size: int = 0, returns: int = 1, bias: bool = False) -> None:
    """Have a module add nothing; without a size it is one whose output nothing but another such module reads."""
    old = layer.get_submodule(place)
    if not size:
        new: nn.Module = nn.Identity()
    elif hasattr(old, "layer_idx"):  # it writes into the cache
        new = SkippedAttention(old.config, bias, number, size, returns)
    else:
        new = SkippedMLP(size, bias, returns)
    _put(layer, place, new)


def _model_class(name: str, stock: Any, config_class: Any) -> type:
    """The class ``name``: that of transformers, whose layers are then made what config.json says.

    Args:
        name: what it is called.
        stock: the class of transformers.
        config_class: what it is built from.
    """

    # Nothing annotated: vLLM holds the arguments against what this says of them, one place off.
    def init(self, config):  # type: ignore[no-untyped-def]
        said = getattr(config, "pruned", None)
        if said is None and getattr(config, "per_layer_config", None):
            raise ValueError("per_layer_config, as dicer 0.1 wrote it, is read by dicer's from_pretrained alone")
        with _put_aside(config):
            stock.__init__(self, config)
        shape_as_listed(self, said or {"layers": "", "own": {}})

    def is_custom_code(cls):  # type: ignore[no-untyped-def] # noqa: ARG001
        return False  # weights are converted and initialised as those of the stock class

    _share_conversions(stock.__name__, name)
    body = {"config_class": config_class, "__module__": __name__, "__doc__": __doc__, "__init__": init}
    return type(name, (stock,), {**body, "is_custom_code": classmethod(is_custom_code)})


def _share_conversions(stock: str, own: str) -> None:
    """Have transformers convert weights as for the stock class (or type), which it looks up by name."""
    found = conversion_mapping.get_checkpoint_conversion_mapping(stock)
    if found is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(own, found, overwrite=True)


# Ending of a class's name -> the mapping that has it, where a type has none by its own name: InternLM 3 has Llama's.
_ENDINGS = {
    "ForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "ForConditionalGeneration": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "Model": MODEL_MAPPING,
}


def _by_name(name: str) -> type | None:
    """The class ``PrunedX`` for a config or model class ``X``, or None where transformers has no such class."""
    stock_name = name.removeprefix("Pruned")
    stock: Any = getattr(transformers, stock_name, None)
    if stock is not None and stock_name.endswith("Config"):

        def validate(self: Any) -> None:
            with _put_aside(self):  # the whole is read without a warning that layers differ
                stock.validate(self)

        own = {"model_type": "pruned_" + stock.model_type, "__module__": __name__, "validate": validate}
        _share_conversions(stock.model_type, own["model_type"])
        return type(name, (stock,), own)
    config_name = stock.config_class.__name__ if isinstance(getattr(stock, "config_class", None), type) else None
    for ending, mapping in _ENDINGS.items():
        candidate = stock_name.removesuffix(ending) + "Config"
        if stock is None and stock_name.endswith(ending) and hasattr(transformers, candidate):
            stock, config_name = mapping.get(getattr(transformers, candidate), None), candidate
    if stock is None or config_name is None:
        return None
    return _model_class(name, stock, globals().get(f"Pruned{config_name}") or __getattr__(f"Pruned{config_name}"))


def __getattr__(name: str) -> type:
    """Make a class when it is first asked for (PrunedLlamaForCausalLM, PrunedGraniteConfig ...)."""
    if name.startswith("Pruned") and name not in globals() and (found := _by_name(name)) is not None:
        globals()[name] = found
    if name in globals():
        made: type = globals()[name]
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
