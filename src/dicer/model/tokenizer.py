"""The tokenizer of a folder, as AutoTokenizer reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dicer.errors import ModelError
from dicer.model.find import as_model_error, is_panic
from dicer.reading import TABLES, read_json

# Only to tell a folder without tokenizer from one whose tokenizer is broken, once AutoTokenizer has failed.
_LOOKS_LIKE_ONE = re.compile(r"tok|vocab|merges|tekken|spiece|sentencepiece|bpe|\.model$", re.IGNORECASE)


def read_tokenizer(name: str, folder: Path) -> Any | None:
    """The tokenizer, or None where the folder has none.

    Args:
        name: the model's, for people.
        folder: its files.

    Raises:
        ModelError: its files cannot be read, or need code from the folder.
    """
    from transformers import AutoTokenizer

    try:
        with as_model_error(name, "tokenizer"), _no_words_of_rust():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            _try(tokenizer)
    except ModelError:
        if code := own_code(folder):
            raise ModelError(
                f"{name}: its tokenizer needs code of its own ({code}), which dicer does not run; give ready input_ids "
                "rows in a .jsonl file, or from Python prune(..., tokenizer=...)."
            ) from None
        if any(_LOOKS_LIKE_ONE.search(path.name) for path in folder.iterdir()):
            raise
        return None
    # Some classes come up empty where there are no files, with nothing but their special tokens.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def _try(tokenizer: Any) -> None:
    """Use a tokenizer once: some are read without complaint and fail, or panic, at the first text."""
    ids = token_ids(tokenizer, "One text, another.") if len(tokenizer) > len(tokenizer.all_special_tokens) else []
    if not all(isinstance(token, int) for token in ids):
        raise ValueError("it makes no numbers of a text")


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without those that a tokenizer puts around it.

    Raises:
        ModelError: it panics.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ModelError(f"the tokenizer cannot read a text: {' '.join(str(error).split())[:200]}.") from None
    return ids


@contextmanager
def _no_words_of_rust() -> Iterator[None]:
    """Let nothing be written to stdout and stderr: Rust writes there what a file says, raw, and panics at length."""
    before = {}
    for number in (1, 2):
        with suppress(OSError):  # it is closed
            before[number] = os.dup(number)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - no file of others
            for number in before:
                os.dup2(nothing.fileno(), number)
        yield
    finally:
        for number, own in before.items():
            os.dup2(own, number)
            os.close(own)


def own_code(folder: Path) -> str | None:
    """The class that only code of the folder has, if the tokenizer is of one."""
    for file in ("tokenizer_config.json", "config.json"):
        try:
            named = read_json(folder / file, TABLES).get("auto_map") or {}
        except (OSError, ValueError, AttributeError):
            continue
        classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
        found = [c for c in classes if c] if isinstance(classes, list) else [classes] * bool(classes)
        if found:
            return str(found[0])
    return None
