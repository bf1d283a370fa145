"""Language models whose layers differ in size, written by dicer (Apache-2.0).

Needs only transformers (5.14 or newer) and torch. The classes are those of transformers; then each layer gets the
heads, the neurons and the biases that ``per_layer_config`` in config.json gives it, and a sub-layer that it skips is
replaced by one that adds nothing, or a constant; a norm that nothing comes of goes with it, as a parameter without a
gradient stops training on several processes. Nothing else is changed. Load with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

or, where dicer is installed and imported, without the flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
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
    """An MLP that is gone: it adds nothing to the residual stream, or its ``bias``."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d], whatever it is given."""
        nothing = torch.zeros_like(hidden_states)
        return nothing if self.bias is None else nothing + self.bias


class SkippedAttention(SkippedMLP):
    """Attention that is gone. Its cache still counts tokens: the first layer's length is taken for that of all."""

    def __init__(self, config: Any, bias: bool, layer_idx: int) -> None:
        super().__init__(config.hidden_size, bias)
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
        return super().forward(hidden_states), None


class _OwnHeads:
    """A model's config with a layer's own numbers of heads; all else is the model's, also where it changes later."""

    def __init__(self, config: Any, heads: int, groups: int) -> None:
        self._config = config
        self.num_attention_heads = heads
        self.num_key_value_heads = groups

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
        module.config = _OwnHeads(module.config, units * group, units)


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


def _classes(model_type: str) -> dict[str, type]:
    config_name, base_name, causal_name, path, attention, mlp = FAMILIES[model_type]
    stock_config = CONFIG_MAPPING[model_type]
    stock_base, stock_causal = MODEL_MAPPING[stock_config], MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]

    def validate(self: Any) -> None:
        with _all_alike(self):  # each layer was held against the rules already; the whole is read without a warning
            stock_config.validate(self)

    own = {"model_type": "pruned_" + model_type, "__module__": __name__, "validate": validate}
    config_class = type("Pruned" + config_name, (stock_config,), own)

    # Nothing annotated: vLLM holds the arguments against what this says of them, one place off.
    def init_base(self, config):  # type: ignore[no-untyped-def]
        with _all_alike(config):
            stock_base.__init__(self, config)
        _shape_layers(self, attrgetter(path)(self), attention, mlp)

    def init_causal(self, config):  # type: ignore[no-untyped-def]
        with _all_alike(config):
            stock_causal.__init__(self, config)
        _shape_layers(self, attrgetter(path)(self.base_model), attention, mlp)

    body = {"config_class": config_class, "__module__": __name__, "__doc__": __doc__}
    base_class = type("Pruned" + base_name, (stock_base,), {**body, "__init__": init_base})
    causal_class = type("Pruned" + causal_name, (stock_causal,), {**body, "__init__": init_causal})
    return {cls.__name__: cls for cls in (config_class, base_class, causal_class)}


class _Own:
    """A config with some values of a layer's own; all else is the model's, also where it changes later."""

    def __init__(self, config: Any, values: dict[str, Any]) -> None:
        self._config = config
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def _shape_as_recorded(model: Any, record: dict[str, Any]) -> None:
    """Give each layer's parameters the shapes that ``pruned`` in config.json says, and its heads their numbers."""
    layers = model.get_submodule(_path(model, record["layers"]))
    for index, own in record["own"].items():
        layer = layers[int(index)]
        for name, shape in own.get("shapes", {}).items():
            _give_shape(layer, name, tuple(shape))
        for path, values in own.get("attributes", {}).items():
            for name, value in values.items():
                setattr(layer.get_submodule(path), name, value)
        for path, values in own.get("config", {}).items():
            module = layer.get_submodule(path)
            module.config = _Own(module.config, values)
    model.post_init()  # again: the new parameters are not initialised yet


def _path(model: Any, path: str) -> str:
    """Where the layers are in a class with a head, or without one."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return path.partition(".")[2]
    return path


def _give_shape(layer: Any, name: str, shape: tuple[int, ...]) -> None:
    path, _, last = name.rpartition(".")
    module = layer.get_submodule(path)
    old = getattr(module, last, None)
    if old is None:  # a bias that the class would not have
        old = next(module.parameters())
    new = old.new_empty(shape)
    if last in module._buffers:
        module._buffers[last] = new
    else:
        setattr(module, last, nn.Parameter(new, requires_grad=new.is_floating_point()))
    if last != "weight" or len(shape) != 2:
        return
    if isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape


def _any_class(name: str) -> type:
    """``PrunedX`` for the class ``X`` of transformers: a config, a model, or a model with a head."""
    stock: Any = getattr(transformers, name.removeprefix("Pruned"))
    if issubclass(stock, transformers.PreTrainedConfig):
        return type(name, (stock,), {"model_type": "pruned_" + stock.model_type, "__module__": __name__})
    config_class = globals().get("Pruned" + stock.config_class.__name__) or __getattr__(
        "Pruned" + stock.config_class.__name__
    )
    for known in (stock.__name__, stock.config_class.model_type):  # how transformers names and joins its tensors
        conversion = get_checkpoint_conversion_mapping(known)
        if conversion is not None:
            own = name if known == stock.__name__ else config_class.model_type
            register_checkpoint_conversion_mapping(own, conversion, overwrite=True)

    # Nothing annotated: vLLM holds the arguments against what this says of them, one place off.
    def init(self, config, *args, **kwargs):  # type: ignore[no-untyped-def]
        stock.__init__(self, config, *args, **kwargs)
        _shape_as_recorded(self, config.pruned)

    body = {"config_class": config_class, "__module__": __name__, "__doc__": __doc__, "__init__": init}
    return type(name, (stock,), body)


def __getattr__(name: str) -> type:
    """Make a class when it is first asked for (PrunedLlamaForCausalLM ...)."""
    for model_type, (config_name, base_name, causal_name, *_) in FAMILIES.items():
        if name in ("Pruned" + config_name, "Pruned" + base_name, "Pruned" + causal_name):
            globals().update(_classes(model_type))
            found: type = globals()[name]
            return found
    if name.startswith("Pruned") and hasattr(transformers, name.removeprefix("Pruned")):
        globals()[name] = _any_class(name)
        return globals()[name]  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
