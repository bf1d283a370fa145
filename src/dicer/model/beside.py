"""What lies beside a model's weights and goes along with it: all that is neither weights, nor code, nor dicer's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

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
# Of dicer; the configs of an adapter and of weights in another layout, which are not there.
_OURS = re.compile(
    r"\.|config\.json$|base_model_card\.md$|dicer_plan|adapter_|params\.json$|optimizer|scheduler\.|rng_state|openvino_"
)


def is_beside(name: str) -> bool:
    """Whether a file of this name (at the top of a folder) goes along."""
    low = name.lower()
    return not low.endswith(_WEIGHTS + _CODE) and not _OURS.match(low)


def files_beside(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files that go along, in order, each with the reason why it does not after all, or None."""
    root = folder.resolve()
    inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]  # as the hub's cache is
    templates = folder / TEMPLATES
    found = [path for path in folder.iterdir() if is_beside(path.name)]
    found += templates.glob("*.jinja") if templates.is_dir() else []
    for path in sorted(found):
        if not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(place) for place in inside):
            yield path, "is a link out of the folder"
        elif path.stat().st_size > MOST_BYTES:
            yield path, f"has more than {MOST_BYTES // 1024**2} MB"
        else:
            yield path, None


def left_behind(folder: Path) -> list[str]:
    """A note for every file that would go along, but for its size or place."""
    return [f"{path.name} {reason}, so it is not taken along" for path, reason in files_beside(folder) if reason]
