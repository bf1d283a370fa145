"""The texts that a pruned model is compared on: those that are always there, and files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from dicer.ask.evaluation import BUILTIN_CODE
from dicer.errors import CalibrationError
from dicer.measure.documents import check_source
from dicer.measure.text import Tokenize, load_windows

WINDOWS = 8  # of each text, where nobody says otherwise
_MODULES = (
    *("argparse", "bisect", "calendar", "configparser", "copy", "csv", "difflib", "fractions", "functools", "heapq"),
    *("shutil", "statistics", "tarfile", "textwrap", "uuid"),
)
_BEGINNING = 6000  # characters of each, so that a few windows see several


def check_texts(texts: Sequence[str]) -> None:
    """See to it that all texts can be there, without reading one.

    Raises:
        CalibrationError: a file that cannot be opened, or a name that means nothing.
    """
    for text in texts:
        if text != BUILTIN_CODE:
            check_source(text, ("builtin", BUILTIN_CODE), "text")


def text_windows(text: str, tokenize: Tokenize, length: int, count: int | None) -> Tensor:
    """The first windows of a text, side by side, int64 [W, T].

    Args:
        text: ``builtin`` (the blocks that calibration never sees), ``builtin:code`` or a local file.
        tokenize: text -> token ids without special tokens.
        length: tokens in a window, T.
        count: most windows; None for ``WINDOWS``.

    Raises:
        CalibrationError: it cannot be read, or is shorter than one window.
    """
    count = count or WINDOWS
    if text != BUILTIN_CODE:
        return load_windows(text, tokenize, length, count)
    ids = torch.tensor(tokenize(_code())[: length * count])
    if len(ids) < length:
        raise CalibrationError(f"'{text}' is shorter than one window of {length} tokens; use a longer text.")
    return ids[: len(ids) // length * length].view(-1, length)  # [W, T]


def _code() -> str:
    """How some modules of CPython's library begin: program text, public, and there wherever Python has its source."""
    parts = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        read = getattr(spec.loader, "get_source", None) if spec else None
        source = read(name) if read else None
        if not source:
            raise CalibrationError(
                f"'{BUILTIN_CODE}' is the source of Python's library, and {name} is here without it; name --text A,B."
            )
        parts.append(source[:_BEGINNING])
    return "\n\n".join(parts)
