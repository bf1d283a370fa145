"""The record of a run: one JSON file, whole or not there, and the folder that holds them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from dicer.errors import ExperimentError, OutputError

FORMAT = 1
PARTIAL = ".partial"
LOCK = ".dicer-lock"
_FIELDS = ("id", "status", "method", "model", "recipe", "evaluation")


def run_id(parts: Mapping[str, Any]) -> str:
    """The name of a run: a hash of what decides its result and of the record format, 16 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record_path(results: Path, model: str, method: str, name: str) -> Path:
    """``results/<model_name>/<method>/logs/<run id>.json``, the layout of Xu et al.'s code."""
    return results / model.rsplit("/", 1)[-1].replace(":", "-") / method / "logs" / f"{name}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that a kill at any moment leaves the old file, the new one or none.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    text = json.dumps(finite({"format": FORMAT, **record}), indent=2, sort_keys=True, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write the record {path}: {error.strerror or error}.") from error


def finite(value: Any) -> Any:
    """A value as JSON can say it. JSON has no infinity and no NaN: they become the text that ``float`` reads back."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path) -> dict[str, Any]:
    """One record.

    Raises:
        ExperimentError: it cannot be read, or is of another format.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = record.get("format")
        complete = all(name in record for name in _FIELDS)
    except OSError as error:
        raise ExperimentError(f"the record {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, AttributeError):
        raise ExperimentError(f"{path} is no record of a run; move it out of the results folder.") from None
    if found != FORMAT:
        raise ExperimentError(
            f"the record {path} has format {found}, and this version of dicer reads {FORMAT}; use another results "
            "folder, or move it away."
        )
    if not complete:
        raise ExperimentError(f"{path} is no whole record of a run; move it out of the results folder.")
    return record


def read_records(results: Path) -> list[dict[str, Any]]:
    """Every record of a results folder, in the order of their paths.

    Raises:
        ExperimentError: one of them cannot be read, or is of another format.
    """
    return [read_record(path) for path in sorted(results.glob("*/*/logs/*.json"))]


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """Hold a results folder for one run; the system lets go of it when the process ends, however it ends.

    Raises:
        ExperimentError: another run holds it.
        OutputError: the folder cannot be made.
    """
    lock = filelock.FileLock(results / LOCK)
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ExperimentError(f"another run is writing to {results}; wait for it, or name another folder.") from None
    except OSError as error:
        raise OutputError(f"cannot use the results folder {results}: {error.strerror or error}.") from error
    try:
        for left in results.glob(f"*/*/logs/*.json{PARTIAL}"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def pack(keep: Any, units: int) -> str:
    """Indices of kept units as a base64 bit mask of ``units`` bits, first unit first.

    Args:
        keep: indices, int [K].
        units: N.
    """
    mask = np.zeros(units, dtype=np.uint8)
    mask[np.asarray(keep)] = 1
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def unpack(text: str, units: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """What :func:`pack` wrote, as bool [N]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=units).astype(bool)
