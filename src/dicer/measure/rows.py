"""Rows of text files and folders, whatever they are written in: one dict each, one after the other."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dicer.errors import CalibrationError
from dicer.machine import free_memory
from dicer.reading import check_plain, open_plain

PLAIN = (".txt", ".text", ".md")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FILE_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".txt.gz", ".json", ".csv", ".tsv", ".parquet", ".md")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what save_to_disk writes
_LONGEST_LINE = 64 * 2**20  # characters; a row of a million token ids has 7 million
_LONGEST_TEXT = 500_000_000  # characters of a plain text, as many as samples are drawn from
_MOST_JSON = 2 * 1024**3  # characters of a JSON array, which is read whole; lines are a stream
_BEGINNING = 4096  # characters of a plain text without a NUL, else it is none


class Row(NamedTuple):
    """One row, and where it stands, for people."""

    where: str
    values: dict[str, Any]


def ending_of(path: Path) -> str:
    """A file's ending in lower case, without that of zipping."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that a data set was saved to (``save_to_disk``)."""
    return folder.is_dir() and any((folder / name).is_file() for name in _SAVED)


def text_files(folder: Path) -> list[Path]:
    """The files of a folder, and of those in it, that hold text, in order."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and ending_of(path) in PLAIN + ROWS)
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def whole_text(path: Path) -> str:
    """A plain text file.

    Raises:
        CalibrationError: it cannot be read, or is no UTF-8.
    """
    with _opened(path) as file:
        text = file.read(_BEGINNING)
        if "\0" in text:
            raise CalibrationError(f"text file {path} is no text: it holds NUL characters. Save it as UTF-8.")
        return text + file.read(_LONGEST_TEXT - len(text))


def read_rows(path: Path, split: str = "train") -> Iterator[Row]:
    """The rows of a file of rows, or of a folder that a data set was saved to.

    Args:
        path: of any ending in ``ROWS``, zipped or not, or a folder.
        split: of a folder with several.

    Raises:
        CalibrationError: it cannot be read; with file and line or row.
    """
    if path.is_dir():
        return _saved_rows(path, split)
    ending = ending_of(path)
    if ending == ".parquet":
        return _parquet_rows(path)
    if ending in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if ending == ".tsv" else ",")
    return _json_rows(path) if ending == ".json" else _json_lines(path)


@contextmanager
def _as_calibration_error(path: Path) -> Iterator[None]:
    try:
        yield
    except CalibrationError:
        raise
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"text file {path} cannot be read: {reason}.") from None


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text as a stream, zipped or not; it may unpack to far more than fits into memory."""
    with _as_calibration_error(path), open_plain(path) as plain:
        bytes_ = gzip.GzipFile(fileobj=plain) if path.name.lower().endswith(".gz") else plain
        with io.TextIOWrapper(bytes_, encoding="utf-8-sig", newline=newline) as file:
            yield file


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    with _opened(path, newline) as file:
        while line := file.readline(_LONGEST_LINE + 1):
            if len(line) > _LONGEST_LINE:
                raise OSError(errno.EFBIG, f"a line has more than {_LONGEST_LINE:,} characters")
            yield line


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}, line {number}: not a JSON object.")
        yield Row(f"{path}, row {number}", row)


def _json_rows(path: Path) -> Iterator[Row]:
    """A JSON array of rows (or texts), an object that holds one, or after all one object a line."""
    free = free_memory(torch.device("cpu"))
    most = _MOST_JSON if free is None else min(_MOST_JSON, free // 8)  # as values it takes several times as much
    with _opened(path) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise CalibrationError(
            f"{path} is one JSON value of more than {most / 1e9:.1f} GB, all of which has to be in memory; write its "
            "rows as lines of a .jsonl."
        )
    try:
        value = json.loads(text)
    except RecursionError:
        raise CalibrationError(f"{path} is no JSON: nested too deeply.") from None
    except ValueError as error:
        if not text.lstrip().startswith("{"):
            raise CalibrationError(f"{path} is no JSON: {error}.") from None
        yield from _json_lines(path)
        return
    if isinstance(value, dict):
        lists = [held for held in value.values() if isinstance(held, list) and held and isinstance(held[0], dict)]
        value = lists[0] if len(lists) == 1 and not {"messages", "conversations"} & value.keys() else [value]
    if not isinstance(value, list):
        raise CalibrationError(f"{path} holds no JSON array of rows.")
    for number, row in enumerate(value, start=1):
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}, row {number}: not a JSON object.")
        yield Row(f"{path}, row {number}", row)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_LINE)
    try:
        for number, row in enumerate(csv.DictReader(_lines(path, newline=""), delimiter=delimiter), start=1):
            if None in row or None in row.values():
                raise CalibrationError(f"{path}, row {number}: not as many fields as the first line has names.")
            yield Row(f"{path}, row {number}", {name: _cell(name, value) for name, value in row.items()})
    except csv.Error as error:
        raise CalibrationError(f"{path} is no CSV: {error}.") from None


def _cell(name: str, value: str) -> Any:
    """A cell; of fields that are never text what its JSON says."""
    if name in ("text", "prompt") or not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(f"{path} needs pyarrow: pip install 'dicer[data]', or give a .jsonl file.") from None
    number = 0
    with _as_calibration_error(path):
        check_plain(path)
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", row)
        except ArrowException as error:
            raise CalibrationError(f"{path} is no parquet file: {str(error).splitlines()[0].rstrip('.')}.") from None


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(f"{folder} was saved by datasets, which it needs: pip install 'dicer[data]'.") from None
    with _as_calibration_error(folder):
        for path in folder.rglob("*"):
            if not path.is_dir():
                check_plain(path)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises a dozen kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CalibrationError(f"data set folder {folder} cannot be read: {reason}.") from None
    if isinstance(found, dict):
        if split not in found:
            raise CalibrationError(
                f"{folder} has no split '{split}' (has: {', '.join(found)}); name one: --calib-split."
            )
        found = found[split]
    for number, row in enumerate(found, start=1):
        yield Row(f"{folder}, row {number}", row)
