"""What a GGUF file says of its model: sizes of every layer, norms, windows, soft caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dicer.errors import ModelError
from dicer.write.export.llama_cpp.arch import Layout

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def write_keys(writer: Any, layout: Layout) -> None:
    """Hand a ``GGUFWriter`` all but name, tokens and positions."""
    source, values, arch = layout.layers.source, layout.values, layout.arch.name
    family = source.family.model_type
    writer.add_type("model")
    if layout.arch.per_layer:
        writer.add_description(
            f"{family}, pruned by dicer; its layers differ in width, which llama.cpp's {arch} allows, and {family} not"
        )
    writer.add_block_count(len(layout.units))
    writer.add_context_length(context(layout))
    writer.add_embedding_length(int(values.get("hidden_size") or values["n_embd"]))
    writer.add_feed_forward_length(_one([units["mlp"] for units in layout.units]))
    writer.add_head_count(_one(layout.heads))
    writer.add_head_count_kv(_one([units["attention"] for units in layout.units]))
    writer.add_key_length(layout.head_size)
    writer.add_value_length(layout.head_size)
    writer.add_vocab_size(int(values["vocab_size"]))
    if "rms_norm_eps" in values:
        writer.add_layer_norm_rms_eps(float(values["rms_norm_eps"]))
    else:
        writer.add_layer_norm_eps(float(values["layer_norm_epsilon"]))
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(float(values["attn_logit_softcapping"]))
        writer.add_final_logit_softcapping(float(values["final_logit_softcapping"]))
    if arch == "phi3":
        writer.add_sliding_window(0)  # the key tells Phi-3 from older files; llama.cpp has no window for it
    if arch in ("gemma2", "gemma3"):
        period = _period(values.get("layer_types") or ())
        writer.add_sliding_window(int(values["sliding_window"]))
        if period:
            writer.add_sliding_window_pattern(period)


def _one(numbers: Sequence[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def refuse_odd(layout: Layout) -> None:
    """What the same family may be set to, and no file can say.

    Raises:
        ModelError: the config asks for something that the architecture does not compute.
    """
    values, arch, name = layout.values, layout.arch.name, layout.layers.source.name
    odd = []
    if arch == "gpt2":
        odd += [key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if values.get(key)]
        odd += [key for key in ("scale_attn_weights",) if not values.get(key, True)]
    if arch.startswith("gemma"):
        odd += ["use_bidirectional_attention"] if values.get("use_bidirectional_attention") else []
        wanted = arch == "gemma2"
        odd += [key for key in _CAPS if (values.get(key) is not None) != wanted]
    if arch == "gemma3" and not _period(values.get("layer_types") or ()):
        odd += ["layer_types"]
    if odd:
        raise ModelError(
            f"{name}: llama.cpp's {arch} does not compute what config.json says under {odd[0]} ({values.get(odd[0])}); "
            "the file would be silently wrong."
        )


def _period(kinds: Sequence[str]) -> int:
    """The p for which every p-th layer looks at the whole text and all others through a window; 0 where none fits."""
    for period in range(1, len(kinds) + 2):
        if all((kind == "sliding_attention") == (i % period < period - 1) for i, kind in enumerate(kinds)):
            return period
    return 0


def _window(layout: Layout) -> int | None:
    """The window that this family has and the architecture has not."""
    values, arch = layout.values, layout.arch.name
    kinds = values.get("layer_types") or ()
    if arch == "gemma3" or (arch == "gemma2" and _period(kinds)):
        return None
    everywhere = layout.layers.source.family.model_type in ("mistral", "phi3")
    window = values.get("sliding_window") if everywhere or "sliding_attention" in kinds else None
    return int(window) if window else None


def context(layout: Layout) -> int:
    """How many tokens the file admits: no more than a sliding window, where the architecture has none."""
    longest = int(layout.values.get("max_position_embeddings") or layout.values["n_positions"])
    return min(longest, _window(layout) or longest)


def context_notes(layout: Layout) -> list[str]:
    """What the user should know of the context."""
    window, longest = _window(layout), int(layout.values.get("max_position_embeddings") or layout.values["n_positions"])
    if window is None or window >= longest:
        return []
    return [
        f"the context is {window} tokens and not {longest}, since llama.cpp's {layout.arch.name} has no sliding window "
        "here; up to there it is the same model"
    ]
