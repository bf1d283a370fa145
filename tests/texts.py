"""Documents of a few hundred letters, and files that hold them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

from dicer.ask.text import Text
from dicer.measure.text import Calibration, load_calibration
from dicer.model.source import tokenize_with

DOCUMENTS = [f"Document {i}. " + "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(200 + i)) for i in range(12)]
tokenize: Any = tokenize_with(tiny_tokenizer())


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as a .jsonl file, zipped if its name says so; a text stands for a row with that text."""
    text = "".join(json.dumps({"text": row} if isinstance(row, str) else row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(calib: object, **more: Any) -> Calibration:
    """Six samples of twenty tokens, or whatever else is asked for."""
    return load_calibration(Text(calib=str(calib), **{"samples": 6, "seq_len": 20, "calib_seed": 3, **more}), tokenize)


def contains(ids: list[int], window: list[int]) -> bool:
    """Whether a window is a stretch of a text."""
    return any(ids[i : i + len(window)] == window for i in range(len(ids) - len(window) + 1))
