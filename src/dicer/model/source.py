"""MODEL -> config, tokenizer, tensors: a hub id, a folder, a .gguf file, ``builtin:smollm2``, or a model in memory."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dicer.errors import ModelError
from dicer.model.beside import left_behind
from dicer.model.families import FAMILIES, Family, known_family
from dicer.model.find import as_model_error, find_model, read_config
from dicer.model.match import Matched, match, same_content, untied
from dicer.model.odd import (
    code_notes,
    refuse_adapter,
    refuse_config,
    refuse_names,
    refuse_quantized,
    refuse_wrapped,
    why_missing,
)
from dicer.model.same import check_same
from dicer.model.structure.account import account
from dicer.model.structure.find import FoundFamily, find_family
from dicer.model.structure.skeleton import model_class, on_disk, stock_class, stock_config
from dicer.model.tensors import FLOATS, MemorySource, SafetensorsSource, TensorSource, fingerprint
from dicer.model.tokenizer import own_code, read_tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read: nothing of it is loaded until it is asked for.

    Attributes:
        name: for people and files: hub id, folder name or file name, never a path.
        folder: where its files are; None for a model in memory.
        config: the transformers config.
        raw_config: ``config.json`` as it stands.
        family: its row of the table.
        tensors: its weights by name on disk.
        live: the model itself, where it is in memory.
        ignored: tensors of the files that are no part of the model: tied copies, old buffers. They are in no result.
        notes: where the files are otherwise than their config says, and what was made of it.
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

    @property
    def widest(self) -> int:
        """Neurons of the widest layer."""
        return max(self.family.widths(self.config))

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the folder has none.

        Raises:
            ModelError: its files are there and cannot be read.
        """
        if self.folder is None:
            return None
        return read_tokenizer(self.name, self.folder)

    def unnamed_tokenizer_class(self) -> str | None:
        """The tokenizer's class where only ``model_type`` says it, which a pruned checkpoint changes; else None."""
        if self.folder is None:
            return None
        try:
            named = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            named = {}
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name}: tokenizer_config.json cannot be read: {error}.") from None
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
        loader = self.family.stock_class if self.is_stock_found else auto
        where: dict[str, Any] = {"config": self.config, "trust_remote_code": False, "local_files_only": True}
        return loader.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, **where, **more)

    @property
    def is_stock_found(self) -> bool:
        """Whether its family was found, and it is loaded by a class of transformers."""
        return isinstance(self.family, FoundFamily) and self.config.model_type == self.family.model_type

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
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _chat(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **more))


def tokenize_with(tokenizer: Any | None) -> Tokenize | None:
    """Text -> token ids without special tokens, or None without a tokenizer."""
    return None if tokenizer is None else Tokenize(tokenizer)


def open_model(model: str | os.PathLike[str], family_file: str | None = None) -> ModelSource:
    """Find a model and check it, without loading a weight.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        family_file: a TOML file that says the structure, where it cannot be found.

    Raises:
        ModelError: it cannot be found or read, its weights are missing, broken, pickled or quantized, or its tensors
            are not what its config says.
        UnknownFamily: its family has no row in the table.
    """
    name, folder = find_model(os.fspath(model))
    refuse_adapter(name, folder)
    raw_config = read_config(folder)
    family = known_family(str(raw_config.get("model_type"))) if family_file is None else None
    if family is None:
        return _open_found(name, folder, raw_config, family_file)
    refuse_config(name, raw_config, family)
    config = _config(name, folder)
    tensors = SafetensorsSource(folder)
    found = match(name, config, raw_config, family, tensors)
    notes = (*found.notes, *code_notes(raw_config, family, folder), *left_behind(folder))
    return ModelSource(
        name, folder, found.config, found.raw_config, family, tensors, ignored=found.ignored, notes=notes
    )


def _config(name: str, folder: Path) -> Any:
    from transformers import AutoConfig

    with as_model_error(name, "config"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _open_found(name: str, folder: Path, raw_config: Mapping[str, Any], file: str | None = None) -> ModelSource:
    """A model of a family that has no row: its row is found."""
    refuse_quantized(name, raw_config)
    config = _config(name, folder)
    with as_model_error(name, "model"):
        kind = model_class(config, raw_config.get("architectures"))
        tensors = SafetensorsSource(folder)
        found = account(name, config, raw_config, kind, tensors)
        shapes = {n: info.shape for n, info in tensors.infos().items()}
        family = find_family(stock_config(found.config), stock_class(kind), shapes, file=file)
    refuse_config(name, raw_config, family)
    notes = (*found.notes, *family.notes, *code_notes(raw_config, family, folder), *left_behind(folder))
    return ModelSource(
        name, folder, found.config, found.raw_config, family, tensors, ignored=found.ignored, notes=notes
    )


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
    if raw_config.get("model_type") in FAMILIES and not raw_config.get("quantization_config"):
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
        UnknownFamily: its family has no row in the table.
        ModelError: it is no language model of transformers, or its weights are quantized.
    """
    refuse_wrapped(model)
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise ModelError(f"a {type(model).__name__} is no transformers model; give an AutoModelForCausalLM, or a path.")
    known = known_family(str(config.model_type)) if family_file is None else None
    if known is None:
        return _found_in_memory(model, family_file)
    family = known
    if not {kind.__name__ for kind in type(model).__mro__} & {family.causal_lm, *family.pruned_classes.values()}:
        raise ModelError(
            f"a {type(model).__name__} cannot be pruned: its head is not that of a {family.causal_lm}. Load it with "
            "AutoModelForCausalLM (and merge or unload adapters first)."
        )
    if type(model).__module__.startswith("transformers_modules.") and not type(model).__name__.startswith("Pruned"):
        refuse_config("the model in memory", {**config.to_dict(), "architectures": None}, family, runs=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized, so its rows cannot be cut. Load it in bf16, fp16 or fp32.")
    _check_memory(model, family)
    raw_config = json.loads(json.dumps(config.to_dict(), default=str))
    state: dict[str, torch.Tensor] = model.state_dict()
    ties: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    found = Matched(config, raw_config)
    own = [name for name, other in ties.items() if not same_content(state[name], state[other])]
    if own:
        found = untied(found, own[0])
    kinds = {family.causal_lm, *family.pruned_classes.values()}
    if type(model).__name__ not in kinds:
        note = (
            f"the model is a {type(model).__name__}; what is made of it is a {family.causal_lm}, without its own code"
        )
        found = replace(found, notes=(*found.notes, note))
    state = {name: tensor for name, tensor in state.items() if name not in ties or name in own}
    name = Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name
    return ModelSource(
        name, None, found.config, found.raw_config, family, MemorySource(state), model, notes=found.notes
    )


def _found_in_memory(model: Any, file: str | None = None) -> ModelSource:
    """A model in memory of a family that has no row."""
    kind = type(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized, so its rows cannot be cut. Load it in bf16, fp16 or fp32.")
    if kind.__module__.startswith("transformers_modules.") or not kind.can_generate():
        raise ModelError(
            f"a {kind.__name__} cannot be pruned: it is no class of transformers with a language-model head. Load it "
            "with AutoModelForCausalLM (and merge or unload adapters first)."
        )
    state = on_disk(model)
    refuse_names(f"the {kind.__name__} in memory", state)
    if away := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ModelError(
            f"the {kind.__name__} in memory has '{away[0]}' not in memory (offloaded, or never loaded). Load it whole "
            "(without device_map and offload_folder), or give its folder."
        )
    with as_model_error(kind.__name__, "model"):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        family = find_family(stock_config(model.config), stock_class(kind), shapes, file=file)
    raw_config = json.loads(json.dumps(model.config.to_dict(), default=str))
    raw_config["architectures"] = [kind.__name__]
    name = Path(str(getattr(model.config, "_name_or_path", "") or kind.__name__)).name
    return ModelSource(name, None, model.config, raw_config, family, MemorySource(state), model, notes=family.notes)


def _check_memory(model: Any, family: Family) -> None:
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
    units = {name: family.units(model.config, name) for name in family.axes}
    needed = {
        family.tensor_name(layer, piece.name): (piece.dim, count * sum(piece.blocks))
        for axis in family.sized(model.config).values()
        for layer, count in enumerate(units[axis.name])
        if count
        for piece in axis.required
    }
    if missing := [name for name in needed if name not in state]:
        reason = why_missing(missing, state, family, len(units["mlp"]))
        raise ModelError(f"{what}: tensor '{missing[0]}' is missing{reason}")
    for name, (dim, size) in needed.items():
        tensor = state[name]
        whole = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.numel() > 0  # DeepSpeed leaves empty ones
        if not whole or tensor.dtype not in FLOATS:
            kind = type(tensor).__name__ if tensor.dtype in FLOATS else str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{what} holds '{name}' as {kind}: quantized or shared out, its rows cannot be cut. Load it whole in "
                "bf16, fp16 or fp32."
            )
        if tensor.shape[dim] != size:
            raise ModelError(
                f"{what}: its config calls for {size} in dimension {dim} of '{name}', and the tensor has "
                f"{tensor.shape[dim]}. Save it with its own widths, or load it anew."
            )
