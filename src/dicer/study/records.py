"""The record of a run: one JSON file, whole or not there, and the folder that holds them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic import ValidationError

from dicer.errors import ExperimentError, OutputError
from dicer.files import as_output_error, finite, remove_unfinished, write_whole
from dicer.study.record import validate

FORMAT = 1
LOCK = ".dicer-lock"


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
    text = json.dumps(finite({"format": FORMAT, **record}), indent=2, sort_keys=True, ensure_ascii=False)
    with as_output_error(f"the record {path}"):
        write_whole(path, text + "\n", sync=True)


def read_record(path: Path) -> dict[str, Any]:
    """One record, whole: whoever reads it on finds every key that it should have, and a value of the right kind there.

    Raises:
        ExperimentError: it cannot be read, is of another format, or is damaged; the line says where.
    """
    try:
        text = path.read_bytes()
        validate(text)
    except OSError as error:
        raise ExperimentError(f"the record {path} cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        raise ExperimentError(_first_fault(path, error)) from None
    # An integer that no float can hold would break sums later.
    found: dict[str, Any] = json.loads(text, parse_int=lambda digits: (int if len(digits) < 20 else float)(digits))
    return found


def _first_fault(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    where, missing = ".".join(map(str, first["loc"])), first["type"] == "missing"
    if not where:  # no JSON object, or one nested without end
        return f"{path} is no record of a run; move it out of the results folder."
    if where == "format":
        return (
            f"the record {path} has format {None if missing else first['input']}, and this version of dicer reads "
            f"{FORMAT}; use another results folder, or move it away."
        )
    wrong = f"'{where}' is missing" if missing else f"{where}: {first['msg']}, got {first['input']!r:.60}"
    return f"{path} is no whole record of a run ({wrong}); move it out of the results folder."


def read_records(results: Path) -> list[dict[str, Any]]:
    """Every record of a results folder, in the order of their paths; none where there is no such folder.

    Raises:
        ExperimentError: the folder or a record cannot be read, or a record is of another format or damaged.
    """
    try:
        logs = [own / "logs" for model in _folders(results) for own in _folders(model)]
        paths = [path for folder in logs for path in _inside(folder) if path.suffix == ".json"]
    except OSError as error:
        raise ExperimentError(f"{error.filename} cannot be read: {error.strerror}.") from None
    return [read_record(path) for path in sorted(paths)]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir()]


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder; ``Path.glob`` passes over folders that may not be read, with all their records."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """Hold a results folder for one run; the system lets go of it when the process ends, however it ends.

    Raises:
        ExperimentError: another run holds it.
        OutputError: the folder cannot be made.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(results / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise ExperimentError(f"another run is writing to {results}; wait for it, or name another folder.") from None
    except OSError as error:
        raise OutputError(f"cannot use the results folder {results}: {error.strerror or error}.") from error
    with held:
        for logs in results.glob("*/*/logs"):
            remove_unfinished(logs)  # of a run that was killed while it wrote
        yield


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
