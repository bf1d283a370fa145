"""Make transformers' auto classes know checkpoints whose widths differ: no flag, no code from the folder."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dicer.model.families import FAMILIES
from dicer.write.export import modeling_pruned

_AUTO = {"AutoConfig": AutoConfig, "AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}


def register() -> None:
    """Register the three classes of every family; again does nothing new."""
    for family in FAMILIES.values():
        classes = {auto: getattr(modeling_pruned, name) for auto, name in family.pruned_classes.items()}
        config = classes.pop("AutoConfig")
        AutoConfig.register(family.pruned_type, config, exist_ok=True)
        config.register_for_auto_class()  # so that save_pretrained takes the model file along
        for auto, model in classes.items():
            _AUTO[auto].register(config, model, exist_ok=True)
            model.register_for_auto_class(auto)
