"""Language models whose layers differ in size, written by dicer (Apache-2.0).

Needs only transformers (5.14 or newer) and torch. The classes are those of transformers, whichever config.json calls
for, made when they are asked for: ``PrunedX`` for its class ``X``. Then each layer is given what ``pruned`` in
config.json lists for it: parameters of other shapes, counts that its modules keep, and sub-layers that add nothing, or
a constant. Checkpoints with ``per_layer_config`` say heads, neurons and biases, and a table here says where they lie; a
norm that nothing comes of goes, as a parameter without a gradient stops training on several processes. Nothing else is
changed. Load with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

or, where dicer is installed and imported, without the flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D


class SubLayer(NamedTuple):
    """Where a sub-layer lies in a decoder layer.

    Attributes:
        units: config attribute that holds the number of units.
        modules: what it is made of; the last one's output joins the residual stream.
        inputs: linear maps whose outputs the units own -> whose rows a unit has there: a neuron one or two, a key-value
            head its queries (q), its keys or values (k), or all three (qkv).
        output: the linear map whose inputs the units own.
        norms: the one before the sub-layer, and the one behind it where there is one.
    """

    units: str
    modules: tuple[str, ...]
    inputs: dict[str, str]
    output: str
    norms: tuple[str, ...]


_SEPARATE = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "k"}
_BEFORE_HEADS, _BEFORE_MLP = ("input_layernorm",), ("post_attention_layernorm",)
_HEADS = SubLayer("num_key_value_heads", ("self_attn",), _SEPARATE, "self_attn.o_proj", _BEFORE_HEADS)
_MLP = SubLayer("intermediate_size", ("mlp",), {"mlp.gate_proj": "1", "mlp.up_proj": "1"}, "mlp.down_proj", _BEFORE_MLP)
_GEMMA_HEADS = _HEADS._replace(norms=("input_layernorm", "post_attention_layernorm"))
_GEMMA_MLP = _MLP._replace(norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_FUSED_HEADS = _HEADS._replace(inputs={"self_attn.qkv_proj": "qkv"})
_FUSED_MLP = _MLP._replace(inputs={"mlp.gate_up_proj": "2"})
_GPT2_HEADS = SubLayer("n_head", ("attn",), {"attn.c_attn": "qkv"}, "attn.c_proj", ("ln_1",))
_GPT2_MLP = SubLayer("n_inner", ("mlp",), {"mlp.c_fc": "1"}, "mlp.c_proj", ("ln_2",))
_OPT_HEADS = SubLayer("num_attention_heads", ("self_attn",), _SEPARATE, "self_attn.out_proj", ("self_attn_layer_norm",))
_OPT_MLP = SubLayer("ffn_dim", ("fc1", "fc2"), {"fc1": "1"}, "fc2", ("final_layer_norm",))

# model_type -> name of the stock config, base and language-model classes, path of the decoder layers inside the base
# class, and the two sub-layers.
FAMILIES: dict[str, tuple[str, str, str, str, SubLayer, SubLayer]] = {
    "llama": ("LlamaConfig", "LlamaModel", "LlamaForCausalLM", "layers", _HEADS, _MLP),
    "mistral": ("MistralConfig", "MistralModel", "MistralForCausalLM", "layers", _HEADS, _MLP),
    "qwen2": ("Qwen2Config", "Qwen2Model", "Qwen2ForCausalLM", "layers", _HEADS, _MLP),
    "qwen3": ("Qwen3Config", "Qwen3Model", "Qwen3ForCausalLM", "layers", _HEADS, _MLP),
    "gemma": ("GemmaConfig", "GemmaModel", "GemmaForCausalLM", "layers", _HEADS, _MLP),
    "gemma2": ("Gemma2Config", "Gemma2Model", "Gemma2ForCausalLM", "layers", _GEMMA_HEADS, _GEMMA_MLP),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM", "layers", _GEMMA_HEADS, _GEMMA_MLP),
    "phi3": ("Phi3Config", "Phi3Model", "Phi3ForCausalLM", "layers", _FUSED_HEADS, _FUSED_MLP),
    "gpt2": ("GPT2Config", "GPT2Model", "GPT2LMHeadModel", "h", _GPT2_HEADS, _GPT2_MLP),
    "opt": ("OPTConfig", "OPTModel", "OPTForCausalLM", "decoder.layers", _OPT_HEADS, _OPT_MLP),
}


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


def unused_norms(part: SubLayer, config: Any, bias: bool) -> tuple[str, ...]:
    """Norms of a decoder layer that nothing comes of when a sub-layer is gone.

    Args:
        part: the sub-layer.
        config: of the model; OPT's says whether norms lie in the residual stream itself, where they stay.
        bias: whether a bias is left of the sub-layer; a norm behind it is in use.
    """
    if not getattr(config, "do_layer_norm_before", True):
        return ()
    return part.norms[:1] if bias else part.norms


@contextmanager
def _all_alike(config: Any) -> Iterator[None]:
    """Hide what differs between layers, so that the stock constructor builds them all by the global config."""
    overrides = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = overrides


def _shape_layers(model: Any, layers: Any, attention: SubLayer, mlp: SubLayer) -> None:
    """Make each layer what ``per_layer_config`` says of it."""
    old: list[str] = []
    for index, (layer, config) in enumerate(zip(layers, model.config.per_layer_config, strict=True)):
        biased = getattr(config, "output_bias", ())
        skipped = getattr(config, "skip", ())
        gone: list[str] = []
        if "attention" in skipped:
            _replace(layer, attention, SkippedAttention(model.config, "attention" in biased, index))
            gone += unused_norms(attention, config, "attention" in biased)
        else:
            _set_heads(layer, attention, config, "attention" in biased)
        if "mlp" in skipped:
            _replace(layer, mlp, SkippedMLP(config.hidden_size, "mlp" in biased))
            gone += unused_norms(mlp, config, "mlp" in biased)
        else:
            _set_units(layer, mlp, getattr(config, mlp.units), {"1": 1, "2": 2}, 1, "mlp" in biased)
        for name in gone:
            setattr(layer, name, nn.Identity())
            old.append(rf"\.{index}\.{name}\.")  # checkpoints of dicer 0.1 have them
    model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or ()), *old]
    model.post_init()  # again: the new modules are not initialised yet


def _replace(layer: Any, part: SubLayer, skipped: nn.Module) -> None:
    *before, last = part.modules
    for name in before:
        setattr(layer, name, nn.Identity())
    setattr(layer, last, skipped)


def _set_heads(layer: Any, part: SubLayer, config: Any, bias: bool) -> None:
    module = layer.get_submodule(part.modules[0])
    group, size = getattr(module, "num_key_value_groups", 1), module.head_dim
    units = getattr(config, part.units)
    rows = {"q": group * size, "k": size, "qkv": (group + 2) * size}
    _set_units(layer, part, units, rows, group * size, bias)
    # GPT-2 and OPT split by these.
    for name, value in (("num_heads", units), ("num_key_value_heads", units), ("split_size", units * size)):
        if hasattr(module, name):
            setattr(module, name, value)
    if part is _FUSED_HEADS:  # Phi-3 reads them from its config
        module.config = _OwnHeads(module.config, num_attention_heads=units * group, num_key_value_heads=units)


def _set_units(layer: Any, part: SubLayer, units: int | None, rows: dict[str, int], columns: int, bias: bool) -> None:
    """Give a sub-layer's linear maps the sizes that its number of units calls for."""
    if units is None:  # GPT-2's n_inner when it is 4 x hidden size: nothing to change but the bias
        units = _size(layer.get_submodule(part.output))[0] // columns
    for name, kind in part.inputs.items():
        inputs, _ = _size(layer.get_submodule(name))
        _resize(layer, name, inputs, units * rows[kind])
    _, outputs = _size(layer.get_submodule(part.output))
    _resize(layer, part.output, units * columns, outputs, bias=bias)


def _size(linear: Any) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _resize(layer: Any, name: str, inputs: int, outputs: int, *, bias: bool = False) -> None:
    old = layer.get_submodule(name)
    if _size(old) == (inputs, outputs) and (old.bias is not None or not bias):
        return
    if isinstance(old, Conv1D):
        new: nn.Module = Conv1D(outputs, inputs)
    else:
        new = nn.Linear(inputs, outputs, bias=bias or old.bias is not None)
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, new)


def _shape_as_listed(model: Any, said: Mapping[str, Any]) -> None:
    """Make each layer what ``pruned`` in config.json lists for it, by the names inside the layer.

    Args:
        model: of the stock class.
        said: ``layers``: where they are in the class with the head; ``own``: number -> what is a layer's own:
            ``shapes`` of parameters, ``attributes`` of modules, values in their ``config``, and modules to ``skip``.
    """
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


def _model_class(name: str, stock: Any, config_class: Any, shape: Callable[[Any], None] | None) -> type:
    """The class ``name``: that of transformers, whose layers are then made what config.json says.

    Args:
        name: what it is called.
        stock: the class of transformers.
        config_class: what it is built from.
        shape: what ``per_layer_config`` stands for; None for a family that no table knows.
    """

    # Nothing annotated: vLLM holds the arguments against what this says of them, one place off.
    def init(self, config):  # type: ignore[no-untyped-def]
        said = getattr(config, "pruned", None)
        if said is None and shape is not None:
            with _all_alike(config):
                stock.__init__(self, config)
            shape(self)
        else:
            stock.__init__(self, config)
            _shape_as_listed(self, said or {"layers": "", "own": {}})

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


def _classes(model_type: str) -> dict[str, type]:
    config_name, base_name, causal_name, path, attention, mlp = FAMILIES[model_type]
    stock_config = CONFIG_MAPPING[model_type]

    def validate(self: Any) -> None:
        with _all_alike(self):  # each layer was held against the rules already; the whole is read without a warning
            stock_config.validate(self)

    def shape_base(model: Any) -> None:
        _shape_layers(model, attrgetter(path)(model), attention, mlp)

    def shape_causal(model: Any) -> None:
        _shape_layers(model, attrgetter(path)(model.base_model), attention, mlp)

    own = {"model_type": "pruned_" + model_type, "__module__": __name__, "validate": validate}
    config_class = type("Pruned" + config_name, (stock_config,), own)
    base, causal = MODEL_MAPPING[stock_config], MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    return {
        config_class.__name__: config_class,
        "Pruned" + base_name: _model_class("Pruned" + base_name, base, config_class, shape_base),
        "Pruned" + causal_name: _model_class("Pruned" + causal_name, causal, config_class, shape_causal),
    }


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
        own = {"model_type": "pruned_" + stock.model_type, "__module__": __name__}
        _share_conversions(stock.model_type, own["model_type"])
        return type(name, (stock,), own)
    config_name = stock.config_class.__name__ if isinstance(getattr(stock, "config_class", None), type) else None
    for ending, mapping in _ENDINGS.items():
        candidate = stock_name.removesuffix(ending) + "Config"
        if stock is None and stock_name.endswith(ending) and hasattr(transformers, candidate):
            stock, config_name = mapping.get(getattr(transformers, candidate), None), candidate
    if stock is None or config_name is None:
        return None
    return _model_class(name, stock, globals().get(f"Pruned{config_name}") or __getattr__(f"Pruned{config_name}"), None)


def __getattr__(name: str) -> type:
    """Make a class when it is first asked for (PrunedLlamaForCausalLM, PrunedGraniteConfig ...)."""
    for model_type, (config_name, base_name, causal_name, *_) in FAMILIES.items():
        if name in ("Pruned" + config_name, "Pruned" + base_name, "Pruned" + causal_name):
            globals().update(_classes(model_type))
    if name.startswith("Pruned") and name not in globals() and (found := _by_name(name)) is not None:
        globals()[name] = found
    if name in globals():
        made: type = globals()[name]
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
