"""What will load a checkpoint, from its config alone; tests/serving and scripts/after_pruning.py run what is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dicer.model.families import Family

TARGETS = ("transformers", "vLLM", "llama.cpp", "torchao", "bitsandbytes")


def why_not(target: str, family: Family, config: Mapping[str, Any]) -> str | None:
    """Why a program cannot load a checkpoint and what would help, or None where it can.

    Args:
        target: of :data:`TARGETS`.
        family: of the checkpoint.
        config: its ``config.json``.
    """
    kind, own_code = family.model_type, "auto_map" in config
    if target == "vLLM" and kind == "gpt2" and own_code:
        return "it serves GPT-2 only with equal layers: 'dicer export --to stock' pads them"
    if target == "llama.cpp" and kind == "opt":
        return "it has no OPT"
    if target == "torchao" and kind == "gpt2":
        return "it leaves GPT-2's Conv1D as it is"
    return None


def targets_line(family: Family, config: Mapping[str, Any]) -> str:
    """One line: what loads a checkpoint and how, and what does not and why."""
    flag = "trust_remote_code=True, or after 'import dicer'" if "auto_map" in config else "no flag"
    how = {"transformers": flag, "llama.cpp": "after 'dicer export --to gguf'"}
    if "auto_map" in config:
        how["vLLM"] = "--trust-remote-code"
    refused = {name: reason for name in TARGETS if (reason := why_not(name, family, config))}
    loads = [name + (f" ({how[name]})" if name in how else "") for name in TARGETS if name not in refused]
    line = f"Loads in {', '.join(loads)}"
    return line + "".join(f"; not in {name}: {reason}" for name, reason in refused.items()) + "."


def parallel_line(family: Family, config: Any, parts: int) -> str:
    """Whether every layer's neurons and heads can be shared out evenly for tensor parallelism.

    Args:
        family: of the model.
        config: its transformers config.
        parts: how many devices.
    """
    uneven = []
    for axis in family.axes:
        layers = [i for i, units in enumerate(family.units(config, axis)) if units % parts]
        if layers:
            which = ", ".join(map(str, layers[:8])) + (" ..." if len(layers) > 8 else "")
            uneven.append(f"{'key-value heads' if axis == 'attention' else 'neurons'} of layers {which}")
    if not uneven:
        return f"Widths divide by {parts}: every layer can be shared out to {parts} devices."
    return f"Widths do not divide by {parts}: {'; '.join(uneven)}. Prune with --width-multiple {parts} or a multiple."
