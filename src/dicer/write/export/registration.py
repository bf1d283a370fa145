"""Make transformers' auto classes know checkpoints whose widths differ: no flag, no code from the folder."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from dicer.model.families import PRUNED_PREFIX
from dicer.model.structure.skeleton import pruned_classes


class PrunedConfigs(dict[str, Any]):
    """What transformers knows of configs by type; one of ours is made, and its models with it, when it is asked for."""

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or _stock_config(kind) is not None

    def __missing__(self, kind: str) -> Any:
        stock = _stock_config(kind)
        if stock is None:
            raise KeyError(kind)
        from dicer.write.export import modeling_pruned

        self[kind] = config = getattr(modeling_pruned, f"Pruned{stock.__name__}")
        _read_earlier(config)
        config.register_for_auto_class()  # so that save_pretrained takes the model file along
        for auto, name in pruned_classes(stock).items():
            if auto != "AutoConfig":
                _register(auto, config, getattr(modeling_pruned, name))
        return config


def _read_earlier(config: Any) -> None:
    """Have a class read checkpoints of dicer 0.1 as those of today."""
    from dicer.write.export.earlier import as_today, is_earlier

    read = config.from_dict.__func__

    def from_dict(cls: type[Any], /, values: dict[str, Any], **more: Any) -> Any:
        return read(cls, as_today(values) if is_earlier(values) else values, **more)

    config.from_dict = classmethod(from_dict)


def _register(auto: str, config: Any, model: Any) -> None:
    import transformers

    getattr(transformers, auto)._model_mapping.register(config, model, exist_ok=True)
    if model._auto_class is None:
        model.register_for_auto_class(auto)


def _stock_config(kind: object) -> Any:
    """The config class of transformers that one of ours is made of, or None for another type."""
    stock = kind.removeprefix(PRUNED_PREFIX) if isinstance(kind, str) else ""
    return CONFIG_MAPPING[stock] if stock != kind and stock in CONFIG_MAPPING._mapping else None


def register() -> None:
    """Have every type be found that may be asked for; again does nothing new."""
    if not isinstance(CONFIG_MAPPING._extra_content, PrunedConfigs):
        CONFIG_MAPPING._extra_content = PrunedConfigs(CONFIG_MAPPING._extra_content)
