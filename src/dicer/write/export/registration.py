"""Make transformers' auto classes know checkpoints whose widths differ: no flag, no code from the folder."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from dicer.model.families import FAMILIES, PRUNED_PREFIX
from dicer.write.export import modeling_pruned

_AUTO = {
    "AutoConfig": AutoConfig,
    "AutoModel": AutoModel,
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModelForImageTextToText": AutoModelForImageTextToText,
}


def register() -> None:
    """Register the three classes of every family with a row, and those of all others when they are asked for."""
    for family in FAMILIES.values():
        _register(family.pruned_type, family.pruned_classes)
    known = CONFIG_MAPPING._extra_content
    if not isinstance(known, _WhenAskedFor):
        CONFIG_MAPPING._extra_content = _WhenAskedFor(known)


def _register(pruned_type: str, names: dict[str, str]) -> None:
    classes: dict[str, Any] = {auto: getattr(modeling_pruned, name) for auto, name in names.items()}
    config = classes.pop("AutoConfig")
    AutoConfig.register(pruned_type, config, exist_ok=True)
    config.register_for_auto_class()  # so that save_pretrained takes the model file along
    for auto, model in classes.items():
        _AUTO[auto].register(config, model, exist_ok=True)
        model.register_for_auto_class(auto)


class _WhenAskedFor(dict[str, Any]):
    """Config classes by model type; one of a pruned model is made when it is looked up: there are 180 that could be."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and _stock_type(key) is not None)

    def __missing__(self, key: str) -> Any:
        stock = _stock_type(key)
        if stock is None:
            raise KeyError(key)
        _register(key, _names(stock))
        return self[key]


def _stock_type(key: str) -> str | None:
    stock = key.removeprefix(PRUNED_PREFIX)
    return stock if stock != key and stock in CONFIG_MAPPING._mapping else None


def _names(stock: str) -> dict[str, str]:
    """Auto class -> name of the class in ``modeling_pruned.py``, of every head that transformers has for a type."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

    config = CONFIG_MAPPING[stock]
    names = {"AutoConfig": f"Pruned{config.__name__}"}
    mappings = {
        "AutoModel": MODEL_MAPPING,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    for auto, mapping in mappings.items():
        found = mapping.get(config, None) or ()
        for kind in found if isinstance(found, tuple | list) else [found]:
            if kind.config_class is config:
                names[auto] = f"Pruned{kind.__name__}"
    return names
