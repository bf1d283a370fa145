"""MODEL -> config, tokenizer, tensors: a hub id, a folder, a .gguf file, ``builtin:smollm2``, or a model in memory."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dicer.errors import ModelError
from dicer.model.families import FAMILIES, Family, family_of
from dicer.model.find import as_model_error, find_model, read_config
from dicer.model.tensors import MemorySource, SafetensorsSource, TensorSource, fingerprint

# Buffers that transformers once saved with all models; those of single classes it knows by itself.
_PASSED_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


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
    """

    name: str
    folder: Path | None
    config: Any
    raw_config: Mapping[str, Any]
    family: Family
    tensors: TensorSource
    live: Any | None = None
    ignored: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells two models apart (see :func:`dicer.model.tensors.fingerprint`)."""
        return fingerprint(self.tensors)

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
        return _tokenizer(self.name, self.folder)

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
        tokenizer = self.tokenizer()
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
            ModelError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM

        with as_model_error(self.name, "model"):
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
            )
            return model.to(device).eval()


def tokenize_with(tokenizer: Any | None) -> Callable[[str], list[int]] | None:
    """Text -> token ids without special tokens, or None without a tokenizer."""
    if tokenizer is None:
        return None

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return tokenize


def open_model(model: str | os.PathLike[str]) -> ModelSource:
    """Find a model and check it, without loading a weight.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.

    Raises:
        ModelError: it cannot be found or read, its weights are missing, broken, pickled or quantized, or its tensors
            are not what its config says.
        UnknownFamily: its family has no row in the table.
    """
    name, folder = find_model(os.fspath(model))
    raw_config = read_config(folder)
    family = family_of(str(raw_config.get("model_type")))
    if quantization := raw_config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"{name} is quantized ({method}): its rows are packed and cannot be cut. Prune the bf16, fp16 or fp32 "
            "checkpoint, then quantize."
        )
    from transformers import AutoConfig

    with as_model_error(name, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tensors = SafetensorsSource(folder)
    ignored = _check_shapes(name, config, family, tensors)
    tensors.leave_out(ignored)
    return ModelSource(name, folder, config, raw_config, family, tensors, ignored=ignored)


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
    return name, loaded.eval(), _tokenizer(name, folder)


def _tokenizer(name: str, folder: Path) -> Any | None:
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    with as_model_error(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def from_memory(model: Any) -> ModelSource:
    """A model that is already loaded; its tensors are read from it, not copied.

    Raises:
        UnknownFamily: its family has no row in the table.
        ModelError: it is no language model of transformers, or its weights are quantized.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise ModelError(f"a {type(model).__name__} is no transformers model; give an AutoModelForCausalLM, or a path.")
    family = family_of(str(config.model_type))
    if not {kind.__name__ for kind in type(model).__mro__} & {family.causal_lm, *family.pruned_classes.values()}:
        raise ModelError(
            f"a {type(model).__name__} cannot be pruned: its head is not that of a {family.causal_lm}. Load it with "
            "AutoModelForCausalLM (and merge or unload adapters first)."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized, so its rows cannot be cut. Load it in bf16, fp16 or fp32.")
    raw_config = json.loads(json.dumps(config.to_dict(), default=str))
    tied = set(_tied_names(model))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    name = Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name
    return ModelSource(name, None, config, raw_config, family, MemorySource(state), model)


def _check_shapes(name: str, config: Any, family: Family, tensors: TensorSource) -> tuple[str, ...]:
    """Hold every tensor that the config calls for against the headers, before anything is loaded.

    Returns:
        The tensors that transformers passes over: tied copies, and buffers of its old versions (GPT-2's ``attn.bias``).
    """
    from transformers import AutoModelForCausalLM

    with as_model_error(name, "config"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(_tied_names(skeleton))
    infos = tensors.infos()
    for parameter, expected in skeleton.named_parameters():
        if parameter in tied:
            continue
        found = infos.get(parameter) or infos.get(parameter.split(".", 1)[1])
        if found is None:
            raise ModelError(f"{name}: tensor '{parameter}' is missing from the weights. Fetch the model again.")
        if not found.dtype.is_floating_point:
            raise ModelError(
                f"{name}: tensor '{parameter}' holds {str(found.dtype).removeprefix('torch.')}, so the weights are "
                "quantized. Prune the bf16, fp16 or fp32 checkpoint, then quantize."
            )
        if found.shape != tuple(expected.shape):
            raise ModelError(
                f"{name}: config.json calls for {tuple(expected.shape)} in '{parameter}', and the file has "
                f"{found.shape}. Config and weights are from different models."
            )
    count = int(config.num_hidden_layers)
    beyond = [n for n in infos if (place := family.locate(n)) and place[0] >= count]
    if beyond:
        raise ModelError(f"{name}: config.json says {count} layers, and the weights have '{beyond[0]}'.")
    read = {name for full in skeleton.state_dict() if full not in tied for name in (full, full.split(".", 1)[-1])}
    passed_over = re.compile("|".join([*_PASSED_OVER, *(skeleton._keys_to_ignore_on_load_unexpected or ())]))
    return tuple(name for name in infos if name in tied or (name not in read and passed_over.search(name)))


def _tied_names(model: Any) -> list[str]:
    return list(model.all_tied_weights_keys)
