"""MODEL -> config, tokenizer, tensors: a hub id, a folder, a .gguf file, ``builtin:smollm2``, or a model in memory."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dicer.errors import ModelError, UnknownFamily
from dicer.model.beside import left_behind
from dicer.model.claims import check_config
from dicer.model.families import Family, Named
from dicer.model.find import as_model_error, find_model, read_config, which_is_meant
from dicer.model.odd import (
    code_notes,
    refuse_adapter,
    refuse_code,
    refuse_config,
    refuse_names,
    refuse_wrapped,
    why_missing,
)
from dicer.model.same import check_same
from dicer.model.structure.account import Matched, account, same_content, untied
from dicer.model.structure.family_file import FamilyRow, read_family
from dicer.model.structure.find import find_family
from dicer.model.structure.skeleton import build, model_class, on_disk, stock_class, stock_config
from dicer.model.tensors import FLOATS, MemorySource, SafetensorsSource, TensorSource, fingerprint
from dicer.model.tokenizer import own_code, read_tokenizer, token_ids
from dicer.reading import TABLES, read_json, reason


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read: nothing of it is loaded until it is asked for.

    Attributes:
        name: for people and files: hub id, folder name or file name, never a path.
        folder: where its files are; None for a model in memory.
        config: the transformers config.
        raw_config: ``config.json`` as it stands.
        family: its structure, as it was found.
        tensors: its weights by name on disk.
        live: the model itself, where it is in memory.
        ignored: tensors of the files that are no part of the model: tied copies, old buffers. They are in no result.
        notes: where the files are otherwise than their config says, and what was made of it.
        cut_of: the model that this is a cut of, not written yet; its files and tokenizer are the same.
    """

    name: str
    folder: Path | None
    config: Any
    raw_config: Mapping[str, Any]
    family: Family
    tensors: TensorSource
    live: Any | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cut_of: ModelSource | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells two models apart (see :func:`dicer.model.tensors.fingerprint`)."""
        return fingerprint(self.tensors)

    def check_unchanged(self) -> None:
        """See to it that the weights are still the files that were opened.

        Raises:
            ModelError: one of them has another size or time, or is gone.
        """
        if isinstance(self.tensors, SafetensorsSource) and (file := self.tensors.changed()):
            raise ModelError(
                f"{self.name}: {file} was changed while it was read, so what came of it is of no model. Let whatever "
                "writes there finish, then run again."
            )

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the folder has none.

        Raises:
            ModelError: its files are there and cannot be read.
        """
        return self._tokenizer if self.cut_of is None else self.cut_of.tokenizer()

    @cached_property
    def _tokenizer(self) -> Any | None:
        return None if self.folder is None else read_tokenizer(self.name, self.folder)

    def unnamed_tokenizer_class(self) -> str | None:
        """The tokenizer's class where only ``model_type`` says it, which a pruned checkpoint changes; else None."""
        if self.folder is None:
            return None
        try:
            named = read_json(self.folder / "tokenizer_config.json", TABLES)
        except FileNotFoundError:
            named = {}
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name}: tokenizer_config.json cannot be read: {reason(error)}.") from None
        if named.get("tokenizer_class") or self.raw_config.get("tokenizer_class"):
            return None
        tokenizer = None if own_code(self.folder) else self.tokenizer()
        return None if tokenizer is None else type(tokenizer).__name__

    def generation_config(self) -> Any | None:
        """How it generates unless told otherwise, or None where that is not said.

        Raises:
            ModelError: its file cannot be read.
        """
        if self.live is not None:
            return copy.deepcopy(getattr(self.live, "generation_config", None))
        if self.folder is None or not (self.folder / "generation_config.json").is_file():
            return None
        from transformers import GenerationConfig

        with as_model_error(self.name, "generation config"):
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)

    def load_model(self, dtype: str = "auto", device: str = "cpu") -> nn.Module:
        """The model in memory, in eval mode.

        Args:
            dtype: ``auto`` (the checkpoint's own) or a torch dtype by name.
            device: a torch device.

        Raises:
            ModelError: transformers cannot load it, or loads other tensors than those that would be written.
        """
        with as_model_error(self.name, "model"):
            model: nn.Module = self._from_pretrained(dtype)
            check_same(self.name, model, self.tensors, self.family)
            return model.to(device).eval()

    def load_empty(self, dtype: str = "auto") -> Any:
        """The same model on the meta device, each tensor in the dtype that it would have; no weight is read.

        Raises:
            ModelError: transformers cannot load it.
        """
        with as_model_error(self.name, "model"):
            return self._from_pretrained(dtype, device_map="meta").eval()

    def _from_pretrained(self, dtype: str, **more: Any) -> Any:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

        reads = type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING
        auto: Any = AutoModelForCausalLM if reads else AutoModelForImageTextToText
        loader = self.family.stock_class if self.is_stock else auto
        where: dict[str, Any] = {"config": self.config, "trust_remote_code": False, "local_files_only": True}
        return loader.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, **where, **more)

    @property
    def is_stock(self) -> bool:
        """Whether a class of transformers loads it."""
        return bool(self.config.model_type == self.family.model_type)

    @property
    def text_config(self) -> Any:
        """The config of the part that reads text: the whole one, but for models of images and text."""
        return self.config.get_text_config()


class Tokenize:
    """Text -> token ids without special tokens.

    Attributes:
        template: (messages, **more) -> text, as the model's chat template has it; None where it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        speaks = getattr(tokenizer, "chat_template", None) or type(tokenizer).__name__.startswith("MistralCommon")
        self.template: Callable[..., str] | None = self._chat if speaks else None

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        return token_ids(self._tokenizer, text)

    def _chat(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **more))


def tokenize_with(tokenizer: Any | None) -> Tokenize | None:
    """Text -> token ids without special tokens, or None without a tokenizer."""
    return None if tokenizer is None else Tokenize(tokenizer)


def open_model(model: str | os.PathLike[str], family: str | FamilyRow | None = None) -> ModelSource:
    """Find a model and check it, without loading a weight.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        family: a TOML file that says the structure, where it cannot be found, or what was read of one.

    Raises:
        ModelError: it cannot be found or read, its weights are missing, broken, pickled or quantized, or its tensors
            are not what its config says.
        UnknownFamily: its structure cannot be found.
    """
    row = read_family(family) if isinstance(family, str) else family
    name, folder = find_model(os.fspath(model))
    refuse_adapter(name, folder)
    read = read_config(folder)
    refuse_config(name, read)
    check_config(name, read, (tensors := SafetensorsSource(folder)).infos())
    config = _config(name, folder)
    raw_config = _as_read(read, config)
    with as_model_error(name, "model"):
        kind = model_class(config, raw_config.get("architectures"))
        refuse_code(name, raw_config, Named.of(stock_config(config), stock_class(kind)))
        found = account(name, config, raw_config, kind, tensors, row)
        shapes = {n: info.shape for n, info in tensors.infos().items()}
        own = stock_config(found.config), stock_class(kind)
        structure = find_family(*own, shapes, row=row, where=found.where, whole=found.stock)
    meant = which_is_meant(os.fspath(model))
    notes = (*meant, *found.notes, *structure.notes, *code_notes(raw_config, structure, folder), *left_behind(folder))
    return ModelSource(
        name, folder, found.config, found.raw_config, structure, tensors, ignored=found.ignored, notes=notes
    )


def _as_read(raw: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
    """``config.json`` of dicer 0.1 with what its ``per_layer_config`` was read as; any other as it stands."""
    earlier = ("per_layer_config", "allow_global_per_layer_attribute_access", "output_bias")
    if "pruned" in raw or (listed := getattr(config, "pruned", None)) is None:
        return raw
    return {key: value for key, value in raw.items() if key not in earlier} | {"pruned": listed}


def _config(name: str, folder: Path) -> Any:
    from transformers import AutoConfig

    with as_model_error(name, "config"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_any(model: str | os.PathLike[str], dtype: str = "auto", device: str = "cpu") -> tuple[str, Any, Any | None]:
    """Any causal language model to measure, also of a family that dicer cannot prune, or quantized.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        dtype: ``auto`` (the checkpoint's own) or a torch dtype by name.
        device: a torch device.

    Returns:
        Its name for people, the model in eval mode, and its tokenizer, or None where it has none.

    Raises:
        ModelError: it cannot be found or loaded, or weights are missing (transformers would make random ones).
    """
    name, folder = find_model(os.fspath(model))
    raw_config = read_config(folder)
    if not raw_config.get("quantization_config"):
        with suppress(UnknownFamily):
            open_model(model)  # whose checks say more than the loading does
    from transformers import AutoModelForCausalLM

    with as_model_error(name, "model"):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{name}: tensor '{missing[0]}' is missing from the weights. Fetch the model again.")
    return name, loaded.eval(), read_tokenizer(name, folder)


def from_memory(model: Any, family_file: str | None = None) -> ModelSource:
    """A model that is already loaded; its tensors are read from it, not copied.

    Args:
        model: of transformers.
        family_file: a TOML file that says the structure, where it cannot be found.

    Raises:
        UnknownFamily: its structure cannot be found.
        ModelError: it is no language model of transformers, or its weights are quantized.
    """
    refuse_wrapped(model)
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise ModelError(f"a {type(model).__name__} is no transformers model; give an AutoModelForCausalLM, or a path.")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized, so its rows cannot be cut. Load it in bf16, fp16 or fp32.")
    row = read_family(family_file) if family_file is not None else None
    kind = _class_in_memory(model)
    _check_memory(model)
    if type(config).__module__.startswith("transformers_modules."):  # ours, as an earlier dicer wrote it
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[config.model_type].from_dict(config.to_dict())
    raw_config = json.loads(json.dumps(config.to_dict(), default=str))
    raw_config["architectures"] = [kind.__name__]
    found = Matched(config, raw_config)
    state: dict[str, torch.Tensor] = model.state_dict()
    tied: Mapping[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    own = [name for name, other in tied.items() if not same_content(state[name], state[other])]
    if own:
        found = untied(found, own[0])
    if type(model) is not kind and not type(model).__name__.startswith("Pruned"):
        note = f"the model is a {type(model).__name__}; what is made of it is a {kind.__name__}, without its own code"
        found = replace(found, notes=(note,))
    tensors = on_disk(model) | {name: state[name] for name in own}
    with as_model_error(kind.__name__, "model"):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        family = find_family(stock_config(found.config), stock_class(kind), shapes, row=row)
    if type(model).__module__.startswith("transformers_modules.") and not type(model).__name__.startswith("Pruned"):
        refuse_code("the model in memory", config.to_dict(), family, runs=True)
    _check_shapes(model, kind, family, tensors)
    name = Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name
    notes = (*found.notes, *family.notes)
    return ModelSource(name, None, found.config, found.raw_config, family, MemorySource(tensors), model, notes=notes)


def _class_in_memory(model: Any) -> Any:
    """The class of transformers, or of ours, that a model in memory is, or is made of.

    Raises:
        ModelError: it is none with a head that predicts tokens.
    """
    for kind in type(model).__mro__:
        ours = kind.__module__.startswith(("transformers.", "dicer.")) or kind.__name__.startswith("Pruned")
        if ours and kind.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return kind
    raise ModelError(
        f"a {type(model).__name__} cannot be pruned: it is no class of transformers with a language-model head. Load "
        "it with AutoModelForCausalLM (and merge or unload adapters first)."
    )


def _check_memory(model: Any) -> None:
    """Refuse a model whose weights are elsewhere, or in another form than its class has them.

    Raises:
        ModelError: with the first such tensor, and what to do.
    """
    what, kept = f"the {type(model).__name__} in memory", model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in kept.items() if isinstance(tensor, torch.Tensor)}
    if len(state) < len(kept):
        raise ModelError(f"{what} is quantized, so its rows cannot be cut. Load it in bf16, fp16 or fp32.")
    if away := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ModelError(
            f"{what} has '{away[0]}' not in memory (offloaded, or never loaded). Load it whole (without device_map and "
            "offload_folder), or give its folder."
        )
    refuse_names(what, state)
    for name, tensor in state.items():
        whole = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.numel() > 0  # DeepSpeed leaves empty ones
        if isinstance(tensor, nn.Parameter) and not (whole and tensor.dtype in FLOATS):
            kind = type(tensor).__name__ if tensor.dtype in FLOATS else str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{what} holds '{name}' as {kind}: quantized or shared out, its rows cannot be cut. Load it whole in "
                "bf16, fp16 or fp32."
            )


def _check_shapes(model: Any, kind: Any, family: Family, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model in memory whose tensors are not those that its config calls for.

    Raises:
        ModelError: with the first tensor that is missing, or of another size.
    """
    what, needed = f"the {type(model).__name__} in memory", build(model.config, kind).shapes
    inside = {piece.name for axis in family.axes.values() for piece in axis.required}
    wanted = {name: shape for name, shape in needed.items() if (place := family.locate(name)) and place[1] in inside}
    if missing := [name for name in wanted if name not in tensors]:
        raise ModelError(
            f"{what}: tensor '{missing[0]}' is missing{why_missing(missing, tensors, family, family.where.count)}"
        )
    for name, shape in wanted.items():
        for dim, (size, found) in enumerate(zip(shape, tensors[name].shape, strict=True)):
            if size != found:
                raise ModelError(
                    f"{what}: its config calls for {size} in dimension {dim} of '{name}', and the tensor has {found}. "
                    "Save it with its own widths, or load it anew."
                )
