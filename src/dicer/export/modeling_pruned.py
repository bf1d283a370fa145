"""Language models whose MLP width differs from layer to layer, written by dicer (Apache-2.0).

Needs only transformers (5.14 or newer) and torch. The classes are those of transformers, with each layer's MLP built
at the width that ``per_layer_config`` in config.json gives it; nothing else is changed. Load with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

or, where dicer is installed and imported, without the flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

# model_type -> name of the stock config, base and language-model classes, path of the decoder layers inside the base
# class, and the modules of a layer that the MLP width sizes.
FAMILIES: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "llama": ("LlamaConfig", "LlamaModel", "LlamaForCausalLM", "layers", ("mlp",)),
    "mistral": ("MistralConfig", "MistralModel", "MistralForCausalLM", "layers", ("mlp",)),
    "qwen2": ("Qwen2Config", "Qwen2Model", "Qwen2ForCausalLM", "layers", ("mlp",)),
    "qwen3": ("Qwen3Config", "Qwen3Model", "Qwen3ForCausalLM", "layers", ("mlp",)),
    "gemma": ("GemmaConfig", "GemmaModel", "GemmaForCausalLM", "layers", ("mlp",)),
    "gemma2": ("Gemma2Config", "Gemma2Model", "Gemma2ForCausalLM", "layers", ("mlp",)),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM", "layers", ("mlp",)),
    "phi3": ("Phi3Config", "Phi3Model", "Phi3ForCausalLM", "layers", ("mlp",)),
    "gpt2": ("GPT2Config", "GPT2Model", "GPT2LMHeadModel", "h", ("mlp",)),
    "opt": ("OPTConfig", "OPTModel", "OPTForCausalLM", "decoder.layers", ("fc1", "fc2")),
}


@contextmanager
def _one_width(config: Any) -> Iterator[None]:
    """Hide the per-layer widths, so that the stock constructor builds every layer at the global one."""
    overrides = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = overrides


def _set_widths(model: Any, layers: Any, modules: tuple[str, ...]) -> None:
    """Give each layer the MLP of its own width, taken from a stock layer built for that width."""
    for index, (layer, layer_config) in enumerate(zip(layers, model.config.per_layer_config, strict=True)):
        stock = type(layer)(layer_config, layer_idx=index)
        for name in modules:
            setattr(layer, name, getattr(stock, name))
    model.post_init()  # again: the new modules are not initialised yet


def _classes(model_type: str) -> dict[str, type]:
    config_name, base_name, causal_name, path, modules = FAMILIES[model_type]
    stock_config = CONFIG_MAPPING[model_type]
    stock_base, stock_causal = MODEL_MAPPING[stock_config], MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    config_class = type(
        "Pruned" + config_name, (stock_config,), {"model_type": "pruned_" + model_type, "__module__": __name__}
    )

    def init_base(self: Any, config: Any) -> None:
        with _one_width(config):
            stock_base.__init__(self, config)
        _set_widths(self, attrgetter(path)(self), modules)

    def init_causal(self: Any, config: Any) -> None:
        with _one_width(config):
            stock_causal.__init__(self, config)
        _set_widths(self, attrgetter(path)(self.base_model), modules)

    body = {"config_class": config_class, "__module__": __name__, "__doc__": __doc__}
    base_class = type("Pruned" + base_name, (stock_base,), {**body, "__init__": init_base})
    causal_class = type("Pruned" + causal_name, (stock_causal,), {**body, "__init__": init_causal})
    return {cls.__name__: cls for cls in (config_class, base_class, causal_class)}


def __getattr__(name: str) -> type:
    """Make a family's three classes when one of them is first asked for (PrunedLlamaForCausalLM ...)."""
    for model_type, (config_name, base_name, causal_name, *_) in FAMILIES.items():
        if name in ("Pruned" + config_name, "Pruned" + base_name, "Pruned" + causal_name):
            globals().update(_classes(model_type))
            found: type = globals()[name]
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
