"""Folders and objects that are no plain language model: what they are, and what to do, in one line each."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dicer.errors import ModelError
from dicer.model.families import Family, Named

ADAPTER = "adapter_config.json"  # what peft writes, and what transformers with peft installed loads unasked
_MERGE = "merge it into the model (peft: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER))"
_PACKED = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|weight_packed|weight_scales?|weight_scale_inv|weight_zero_point|W_q|_data|absmax|quant_map|SCB|scales|zeros"
    r"|weight_format|packed_weight|weight_quantizer\..+|codebooks|codes|Qidxs|SU|SV)$"
)
_LORA = re.compile(
    r"(^|\.)(lora_[A-Za-z_]+|base_layer|modules_to_save|ia3_l|hada_w\w+|boft_\w+|vera_\w+|original_module)\b"
)
# A wrapper's segment in a tensor's name -> (what wrote it, what to save instead).
_WRAPPERS: Mapping[str, tuple[str, str]] = {
    "_orig_mod": ("of a model inside torch.compile", "save model._orig_mod"),
    "_fsdp_wrapped_module": ("of a model inside FSDP", "save its full state dict"),
    "_checkpoint_wrapped_module": ("of a model with wrapped checkpoints", "save its state dict without the wrapper"),
    "pretrained_model": ("of a TRL model with a value head", "save model.pretrained_model"),
    "base_model": ("of a model inside peft", "call merge_and_unload() and save what it returns"),
    "language_model": ("the text part of a vision-language model", "save its language model alone"),
    "module": ("of a model inside DataParallel, DDP or DeepSpeed", "save model.module"),
}
_OTHER_HEADS = re.compile(
    r"^((model|transformer)\.)?(score|classifier|classification_head|regression_(layer|head)|v_head|value_head|qa_outputs"
    r"|reward_(model|head)|rm_head|critic(_head)?)\."
)
_OTHER_ENDINGS = (
    *("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "RewardModel"),
    *("RewardModeling", "ForScore", "ValueHead", "DoubleHeadsModel"),
)
_NO_MODEL = ("AutoTokenizer", "AutoProc")  # what auto_map names besides models
# Keys of config.json by other names than the config class has them, or that say nothing of what is computed.
_SAID_OTHERWISE = {
    *("auto_map", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation", "head_dim"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor"),
}
_DROPPED = {"drop_attn_list": "attention", "drop_mlp_list": "MLP", "drop_block_list": "block"}  # LLM-Drop's config


def refuse_adapter(name: str, folder: Path) -> None:
    """Refuse an adapter alone, and one beside a model: with peft installed transformers loads it, and without not.

    Raises:
        ModelError: there is one.
    """
    if not (folder / ADAPTER).is_file():
        return
    if (folder / "config.json").is_file():
        raise ModelError(
            f"{name} has an adapter beside its weights ({ADAPTER}), which transformers adds to the model wherever peft "
            f"is installed. Either {_MERGE}, or move the adapter files out of the folder."
        )
    raise ModelError(f"{name} holds an adapter alone ({ADAPTER}), and no model: {_MERGE}, and give that folder.")


def refuse_config(name: str, raw: Mapping[str, Any]) -> None:
    """Refuse a config that says that the model is no language model as it was trained, or quantized.

    Raises:
        ModelError: with what it is.
    """
    refuse_quantized(name, raw)
    if dropped := [f"{what} of layers {raw[key]}" for key, what in _DROPPED.items() if raw.get(key)]:
        raise ModelError(
            f"{name} is a folder of LLM-Drop ({' and '.join(dropped)} dropped), which its own code reads. Prune the "
            "model that it was made from; --allocate FILE can name the same sub-layers with ratio 1."
        )
    if kind := _other_kind(raw):
        raise ModelError(
            f"{name} is a {kind}, no language model: its head scores or classifies. Give the language model that it "
            "was made from (or save it with a language-model head)."
        )
    if file := raw.get("transformers_weights"):
        raise ModelError(
            f"{name}: transformers_weights in config.json has transformers load '{file}'. Rename that file to "
            "model.safetensors and take the key out."
        )


def refuse_code(name: str, raw: Mapping[str, Any], family: Named, *, runs: bool = False) -> None:
    """Refuse a model that code of its own may make another than the one of transformers.

    Args:
        name: the model's, for people.
        raw: ``config.json`` as it stands.
        family: of its ``model_type``.
        runs: the model is in memory and runs code of its own, so that names say nothing of it.

    Raises:
        ModelError: with the class.
    """
    if code := next(iter(_own_code(raw, family, stock_names=runs)), None):
        raise ModelError(
            f"{name} has modelling code of its own ({code}, named by auto_map in config.json), which dicer does not "
            f"run; as a {family.causal_lm} of transformers it may be another model. If it is the same one, take "
            "auto_map out of config.json."
        )


def refuse_quantized(name: str, raw: Mapping[str, Any]) -> None:
    """Refuse a config that says that the weights are quantized.

    Raises:
        ModelError: with the method.
    """
    inner = raw.get("text_config")
    quantization = raw.get("quantization_config") or (
        inner.get("quantization_config") if isinstance(inner, dict) else None
    )
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"{name} is quantized ({method}): its rows are packed and cannot be cut. Prune the bf16, fp16 or fp32 "
            "checkpoint, then quantize."
        )


def named_code(raw: Mapping[str, Any], family: Named) -> str | None:
    """The first class of a model's own code, where all have the names of transformers' own; else None.

    Phi-3 and others came with code before transformers had them; without the flag it loads its own class for them.
    """
    return None if _own_code(raw, family) else next(iter(_own_code(raw, family, stock_names=True)), None)


def code_notes(raw: Mapping[str, Any], family: Named, folder: Path) -> list[str]:
    """Notes on what hints at other code than the family's own, though nothing names it."""
    notes, classes = [], raw.get("architectures")
    known = {family.causal_lm, f"{family.stem}Model", *family.pruned_classes.values()}
    if isinstance(classes, list) and (others := [name for name in map(str, classes) if name not in known]):
        notes.append(f"config.json calls the model a {others[0]}; it is read and pruned as a {family.causal_lm}")
    if named := named_code(raw, family):
        odd = _strange_keys(raw)
        notes.append(
            f"config.json names code of the model's own ({named}) under the names of transformers' own classes; it is "
            f"read, scored and pruned as a {family.causal_lm} of transformers, and that code is not taken along"
            + (f"; transformers knows nothing of {', '.join(odd)} in config.json" if odd else "")
        )
    if not raw.get("auto_map") and (code := sorted(path.name for path in folder.glob("modeling_*.py"))):
        notes.append(
            f"{code[0]} lies in the folder, and config.json does not name it: it is neither run nor taken along"
        )
    return notes


def _strange_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys that the config class of transformers only carries along: those of other code, if it is another."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(str(raw["model_type"])).to_dict().keys() | _SAID_OTHERWISE
    return sorted(key for key, value in raw.items() if key not in known and value is not None and value is not False)


def _other_kind(raw: Mapping[str, Any]) -> str | None:
    classes = raw.get("architectures")
    found = (str(name) for name in classes) if isinstance(classes, list) else ()
    return next((name for name in found if name.endswith(_OTHER_ENDINGS)), None)


def _own_code(raw: Mapping[str, Any], family: Named, *, stock_names: bool = False) -> list[str]:
    """The classes that only code of the folder has, the model's own first; none where the code is dicer's own.

    Args:
        raw: ``config.json`` as it stands.
        family: of its ``model_type``.
        stock_names: count also those that are called as the family's class in transformers is, or one for another task.
    """
    import transformers

    named = raw.get("auto_map") or {}
    if not isinstance(named, dict):
        return [str(named)]
    ours = {f"modeling_pruned.{name}" for name in family.pruned_classes.values()}
    if raw.get("model_type") == family.pruned_type and set(map(str, named.values())) <= ours:
        return []
    stock = {"AutoConfig": f"{family.stem}Config", "AutoModel": f"{family.stem}Model"}
    stock["AutoModelForCausalLM"] = family.causal_lm

    def counts(auto: str, name: str) -> bool:
        is_stock = name == stock[auto] if auto in stock else hasattr(transformers, name)
        return not auto.startswith(_NO_MODEL) and (stock_names or not is_stock)

    order = sorted(named.items(), key=lambda item: (item[0] != "AutoModelForCausalLM", item[0]))
    return [str(name) for auto, name in order if counts(auto, str(name).rpartition(".")[2])]


def refuse_names(name: str, infos: Collection[str]) -> None:
    """Refuse weights whose names say that they are an adapter's, packed, or of a model with another head.

    Raises:
        ModelError: with what they are.
    """
    if found := next(filter(_LORA.search, infos), None):
        raise ModelError(f"{name}: '{found}' is of an adapter that was never merged; {_MERGE}.")
    if found := next(filter(_PACKED.search, infos), None):
        raise ModelError(
            f"{name}: '{found}' is of quantized weights (GPTQ, AWQ, bitsandbytes ...), whose rows are packed and "
            "cannot be cut. Prune the bf16, fp16 or fp32 checkpoint, then quantize."
        )
    if found := next(filter(_OTHER_HEADS.search, infos), None):
        raise ModelError(
            f"{name}: '{found}' is the head of a classifier or reward model, no language model's. Give the language "
            "model that it was made from."
        )


def why_missing(missing: Collection[str], infos: Collection[str], family: Family, layers: int) -> str:
    """Why tensors that a model needs are not there, and what to do; the line goes on from "... is missing".

    Args:
        missing: full names, at least one.
        infos: the names that are there.
        family: as it should be.
        layers: how many decoder layers its config says.
    """
    if line := _wrapped(next(iter(missing)), infos):
        return line
    if not infos:
        return " from the weights. Fetch the model again."
    places = [place for name in infos if (place := family.locate(name))]
    gone = sorted(set(range(layers)) - {layer for layer, _ in places})
    if not any(axis.owns(inner) for _, inner in places for axis in family.axes.values()):
        return (
            f", and no name is one of a {family.causal_lm} ('{next(iter(infos))}' ...): the weights are in another "
            "layout (that of the original release, say) or another model's. Convert them for transformers."
        )
    if gone == list(range(layers - len(gone), layers)) and gone:
        return (
            f" from the weights, with all of the last {len(gone)} of {layers} layers: the download is not whole "
            f"(fetch the model again), or config.json must say {layers - len(gone)} layers."
        )
    if dropped := [f"layer {i}" for i in gone] or _sub_layers_gone(missing, infos, family):
        return (
            f" from the weights, with all of {', '.join(dropped[:4])}{' ...' if len(dropped) > 4 else ''}: "
            "other pruning (LLM-Drop, say) took them out. Prune the model that it was made from; --allocate FILE can "
            "name the same sub-layers with ratio 1."
        )
    if list(missing) == ["lm_head.weight"]:
        return (
            " from the weights, and all else is there: saved without its language-model head (AutoModel), or with "
            "the embeddings as its head, and then config.json must say tie_word_embeddings: true. Save it with "
            "AutoModelForCausalLM, or fetch the model again."
        )
    if other := _instead(missing, infos, family):
        return f" from the weights, and has '{other}' in its place, which is of other modelling code. Convert it first."
    return " from the weights. Fetch the model again."


def _wrapped(missing: str, infos: Collection[str]) -> str | None:
    """The line for names that hold a missing one with something in front of it or in between."""
    wanted = {missing, missing.split(".", 1)[-1]}
    segments = re.compile(
        "|".join(rf"(^|(?<=\.)){word}\." for word in _WRAPPERS if word not in ("base_model", "module"))
    )
    for name in infos:
        plain = re.sub(r"^(module\.)*(base_model\.model\.)?", "", segments.sub("", name))
        ends = [end for end in wanted if name.endswith(f".{end}") and end.count(".") > 1]
        if plain not in wanted and not ends:
            continue
        if plain not in wanted:
            plain = max(ends, key=len)
        word = next((word for word in _WRAPPERS if word in name.split(".") and word not in plain.split(".")), None)
        prefix = name.removesuffix(plain) if name.endswith(plain) else f"{word}."
        what, do = _WRAPPERS.get(word or "", ("saved from inside something else", "save the model alone"))
        return f": its name is '{name}', {what}. To mend it, {do}, or take '{prefix}' out of every name."
    return None


def _sub_layers_gone(missing: Collection[str], infos: Collection[str], family: Family) -> list[str]:
    """Sub-layers of which nothing is there."""
    there = {place for name in infos if (place := family.locate(name))}
    absent = {place for name in missing if (place := family.locate(name))}
    found = []
    for axis in family.axes.values():
        for layer in sorted({layer for layer, inner in absent if axis.owns(inner)}):
            if not any(i == layer and axis.owns(inner) for i, inner in there):
                found.append((layer, f"{axis.name} of layer {layer}"))
    return [what for _, what in sorted(found)]


def _instead(missing: Collection[str], infos: Collection[str], family: Family) -> str | None:
    """A tensor of other code in the sub-layer of a missing one."""
    known = {piece.name for axis in family.axes.values() for piece in axis.slices}
    for name in missing:
        place = family.locate(name)
        axis = next((a for a in family.axes.values() if place and a.owns(place[1])), None)
        if place is None or axis is None:
            continue
        for other in infos:
            there = family.locate(other)
            if there and there[0] == place[0] and axis.owns(there[1]) and there[1] not in known and "norm" not in other:
                return other
    return None


def refuse_wrapped(model: Any) -> None:
    """Refuse an object that holds a model, and say how to get at it.

    Raises:
        ModelError: it is wrapped.
    """
    kind = type(model).__name__
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ModelError(f"the model is inside torch.compile ({kind}); give its ._orig_mod.")
    if hasattr(model, "merge_and_unload"):
        raise ModelError(f"a {kind} holds an adapter; give what its merge_and_unload() returns (or its unload()).")
    if not hasattr(type(model), "config_class"):
        for inner in ("module", "pretrained_model", "model"):
            if hasattr(getattr(model, inner, None), "config") and isinstance(getattr(model, inner), nn.Module):
                raise ModelError(f"the model is inside a {kind}; give its .{inner}.")
