"""What lies beside a model's weights and goes along with it: all that is neither weights, nor code, nor dicer's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dicer.errors import ModelError
from dicer.files import is_there
from dicer.reading import SETTINGS, TABLES, check_plain, read_json, reason

TEMPLATES = "additional_chat_templates"  # the one subfolder of a model that is fetched, and taken along
MOST_BYTES = 256 * 1024**2  # of one file; the largest tokenizers have 40 MB

_WEIGHTS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".onnx",
        ".onnx_data",
        ".h5",
        ".msgpack",
        ".npz",
    ),
    *(".npy", ".pkl", ".pickle", ".joblib", ".tflite", ".mlmodel", ".ot", ".distcp", ".engine", ".llamafile", ".nemo"),
    *(".data", ".pte", ".imatrix", ".index.json"),
)
_CODE = (
    *(".py", ".pyc", ".pyi", ".ipynb", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js"),
    *(".ts", ".c", ".cc", ".cpp", ".h", ".cu", ".rs", ".go", ".java", ".rb", ".pl", ".lua", ".jar", ".wasm"),
    ".whl",
)
# What transformers and dicer open by its name, and what the weights are in.
_READ = re.compile(
    r"config\.json$|\.safetensors$|\.index\.json$|\.jinja$|special_tokens_map|chat_template|"
    r"tok|vocab|merges|tekken|spiece|sentencepiece|bpe|dict|\.model$|\.spm$",
    re.IGNORECASE,
)
_PARSED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys by which transformers opens a file wherever it is, and one that lists names of files in the folder.
_PATHS, _NAMES = ("vocab", "merges", "vocab_file", "merges_file"), "fast_tokenizer_files"
# Of dicer; the configs of an adapter and of weights in another layout, which are not there.
_OURS = re.compile(
    r"\.|config\.json$|base_model_card\.md$|dicer_(plan|export)|adapter_|params\.json$|optimizer|scheduler\.|rng_state|openvino_"
)


def is_beside(name: str) -> bool:
    """Whether a file of this name (at the top of a folder) goes along."""
    low = name.lower()
    copied = any(ending in low for ending in (".safetensors", ".gguf", ".bin."))  # model.safetensors.bak
    return not copied and not low.endswith(_WEIGHTS + _CODE) and not _OURS.match(low)


def files_beside(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files that go along, in order, each with the reason why it does not after all, or None."""
    for path in sorted(path for path in _inside(folder) if path.parent != folder or is_beside(path.name)):
        if not path.is_file():
            continue
        if leads_out(path, folder):
            yield path, "is a link out of the folder"
        elif path.stat().st_size > MOST_BYTES:
            yield path, f"has more than {MOST_BYTES // 1024**2} MB"
        else:
            yield path, None


def _inside(folder: Path) -> Iterator[Path]:
    """What lies in a model folder: at its top, and its templates."""
    yield from folder.iterdir()
    if (templates := folder / TEMPLATES).is_dir():
        yield from templates.glob("*.jinja")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a model folder is a link to elsewhere; blobs of the hub's cache belong to its snapshots."""
    root = folder.resolve()
    inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    return not any(path.resolve().is_relative_to(place) for place in inside)


def check_read(folder: Path) -> None:
    """See to it that all files of a model folder that are read are plain files of its own, before one is read.

    Raises:
        ModelError: one is a pipe, socket, device or link out of the folder, cannot be opened, or is too long.
    """
    for path in sorted(path for path in _inside(folder) if _READ.search(path.name) and not path.is_dir()):
        if path.exists() and leads_out(path, folder):
            raise ModelError(
                f"{path} is a link out of the folder, and links are followed only within it (or within the hub's "
                "cache). Put the file itself there."
            )
        try:
            check_plain(path)
            if path.name in _PARSED:
                _check_names(read_json(path, TABLES))
        except FileNotFoundError:  # a link to nothing
            continue
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {reason(error)}. Check its permissions.") from None
        except ValueError as error:
            raise ModelError(f"{path} cannot be read: {error}. Fetch it again.") from None
        most = SETTINGS if path.name.endswith("config.json") else TABLES
        if not path.name.endswith(".safetensors") and path.stat().st_size > most:
            raise ModelError(
                f"{path} has {path.stat().st_size:,} bytes, and of such a file at most {most:,} are read. Fetch it "
                "again."
            )


def _check_names(found: Any) -> None:
    """Refuse what is no table, or names a file that does not lie in its folder.

    Raises:
        ValueError: with the name.
    """
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    named = [(key, found[key]) for key in _PATHS if isinstance(found.get(key), str) and is_there(found[key])]
    if isinstance(names := found.get(_NAMES), list):
        named += [(_NAMES, name) for name in names if Path(str(name)).name != name]
    if named:
        raise ValueError(f"its {named[0][0]} is {named[0][1]!r:.100}, and files elsewhere are not read")


def left_behind(folder: Path) -> list[str]:
    """A note for every file that would go along, but for its size or place.

    Raises:
        ModelError: one that goes along cannot be opened.
    """
    notes = []
    for path, why in files_beside(folder):
        if why is not None:
            notes.append(f"{path.name} {why}, so it is not taken along")
            continue
        try:
            check_plain(path)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {reason(error)}. It would be taken along: check its permissions, or move it "
                "away."
            ) from None
    return notes
