"""What will load a checkpoint, without loading it; tests/serving and scripts/after_pruning.py run what is said."""

from __future__ import annotations

from dicer.errors import ModelError
from dicer.model.families import Family
from dicer.model.source import ModelSource
from dicer.write.config import IN_VLLM as IN_VLLM

TARGETS = ("transformers", "vLLM", "llama.cpp", "torchao", "bitsandbytes")


def why_not(target: str, source: ModelSource) -> str | None:
    """Why a program cannot load a checkpoint and what would help, or None where it can.

    Args:
        target: of :data:`TARGETS`, but llama.cpp, of which :func:`as_gguf` knows.
        source: the checkpoint, of which config and headers are looked at.
    """
    kind, own_code = source.family.model_type, "auto_map" in source.raw_config
    if target == "vLLM" and kind == "gpt2" and own_code:
        return "it serves GPT-2 only with equal layers: 'dicer export --to stock' pads them"
    if target == "vLLM" and kind not in (*IN_VLLM, "gpt2"):
        return f"with a {kind} it has not been tried"
    if target == "torchao" and kind == "gpt2":
        return "it leaves GPT-2's Conv1D as it is"
    return None


def as_gguf(source: ModelSource) -> str:
    """How llama.cpp takes a checkpoint, as the exporter decides; of a model in memory the tokenizer is not known yet.

    Raises:
        ModelError: the exporter would refuse it.
    """
    from dicer.write.export.llama_cpp.file import lay_out, rows_of_embedding  # with transformers, which takes seconds
    from dicer.write.export.llama_cpp.tokenizer import read_vocabulary

    layout, _ = lay_out(source)
    if source.folder is not None:
        read_vocabulary(source, rows_of_embedding(layout))
    return "; ".join([f"'dicer export --to gguf' makes it a {layout.arch.name}", *layout.notes])


def targets_line(source: ModelSource) -> str:
    """One line: what loads a checkpoint and how, and what does not and why."""
    own_code = "auto_map" in source.raw_config
    how = {"transformers": "trust_remote_code=True, or after 'import dicer'" if own_code else "no flag"}
    if own_code:
        how["vLLM"] = "--trust-remote-code"
    refused = {name: reason for name in TARGETS if (reason := why_not(name, source))}
    try:
        how["llama.cpp"] = as_gguf(source)
    except ModelError as error:
        refused["llama.cpp"] = str(error).removeprefix(f"{source.name}: ").removesuffix(".")
    loads = [name + (f" ({how[name]})" if name in how else "") for name in TARGETS if name not in refused]
    line = f"Loads in {', '.join(loads)}"
    return line + "".join(f"; not in {name}: {reason}" for name, reason in refused.items()) + "."


def parallel_line(family: Family, parts: int) -> str:
    """Whether every layer's neurons and heads can be shared out evenly for tensor parallelism.

    Args:
        family: of the model.
        parts: how many devices.
    """
    uneven: dict[str, set[int]] = {}
    for name, axis in family.axes.items():
        if axis.kind.routed:  # each device has a part of every expert
            continue
        what = f"{axis.kind.units} inside experts" if axis.routed else axis.kind.units
        uneven.setdefault(what, set()).update(i for i, units in enumerate(family.units(name)) if units % parts)
    said = [
        f"{what} of layers {', '.join(map(str, sorted(layers)[:8]))}{' ...' if len(layers) > 8 else ''}"
        for what, layers in uneven.items()
        if layers
    ]
    if not said:
        return f"Widths divide by {parts}: every layer can be shared out to {parts} devices."
    return f"Widths do not divide by {parts}: {'; '.join(said)}. Prune with --width-multiple {parts} or a multiple."
