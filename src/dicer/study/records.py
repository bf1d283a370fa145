"""Where records lie: a run's JSON file, whole or not there, and the folder or the one file that holds them all."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import ValidationError

from dicer.errors import ExperimentError, OutputError
from dicer.files import as_output_error, finite, remove_unfinished, write_whole
from dicer.holds import held_folder, taken
from dicer.reading import open_plain, read_bytes, reason
from dicer.study.record import FORMAT, Record, parse_record

First = TypeVar("First")
Returned = TypeVar("Returned")
Rest = ParamSpec("Rest")
LOCK = ".dicer-lock"
PACKED = ".jsonl.gz"
# Of what a packed file may unpack to; a record of 80 layers with 30,000 neurons each has 0.5 MB.
_LONGEST_LINE = 64 * 2**20  # bytes
_LARGEST = 2**30  # bytes


def run_id(parts: Mapping[str, Any]) -> str:
    """The name of a run: a hash of what decides its result and of the record format, 16 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record_path(results: Path, model: str, method: str, name: str) -> Path:
    """``results/<model_name>/<method>/logs/<run id>.json``, the layout of Xu et al.'s code."""
    return results / model.rsplit("/", 1)[-1].replace(":", "-") / method / "logs" / f"{name}.json"


def write_record(path: Path, record: Record) -> None:
    """Write a record so that a kill at any moment leaves the old file, the new one or none.

    Raises:
        OutputError: it cannot be written.
    """
    with as_output_error(f"the record {path}"):
        write_whole(path, json.dumps(values_of(record), indent=2, sort_keys=True, ensure_ascii=False) + "\n", sync=True)


def values_of(record: Record) -> dict[str, Any]:
    """What a record says, and nothing that it leaves to a default, as JSON can say it."""
    values: dict[str, Any] = finite(record.model_dump(exclude_unset=True))
    return values


def read_record(path: Path) -> Record:
    """One record, whole: whoever reads it on finds every key that it should have, and a value of the right kind there.

    Raises:
        ExperimentError: it cannot be read, is of another format, or is damaged; the line says where.
    """
    try:
        content = read_bytes(path, _LONGEST_LINE)
    except OSError as error:
        raise ExperimentError(f"the record {path} cannot be read: {reason(error)}.") from None
    return _parsed(content, f"the record {path}", "move it out of the results folder")


def _parsed(content: bytes, what: str, advice: str) -> Record:
    try:
        return parse_record(content)
    except ValidationError as error:
        first = error.errors()[0]
    where, missing = ".".join(map(str, first["loc"][1:])), first["type"] == "missing"  # behind the kind of record
    if not where:  # no JSON object, or one nested without end
        raise ExperimentError(f"{what} is no record of a run; {advice}.") from None
    if where == "format":
        version = None if missing else first["input"]
        raise ExperimentError(f"{what} has format {version}, and this version of dicer reads {FORMAT}; {advice}.")
    wrong = f"'{where}' is missing" if missing else f"{where}: {first['msg']}, got {first['input']!r:.60}"
    raise ExperimentError(f"{what} is no whole record of a run ({wrong}); {advice}.")


def read_records(results: Path) -> list[Record]:
    """Every record of a results folder, in the order of their paths, or of a packed file; none where nothing is.

    Raises:
        ExperimentError: the folder or a record cannot be read, or a record is of another format or damaged.
    """
    if results.name.endswith(PACKED):
        return list(_packed(results))
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


def _packed(path: Path) -> Iterator[Record]:
    """The records of a packed file, line by line: what unpacks without end is left before it fills the memory."""
    number = size = 0
    try:
        with open_plain(path) as packed, gzip.GzipFile(fileobj=packed) as file:
            while line := file.readline(_LONGEST_LINE + 1):
                number, size = number + 1, size + len(line)
                if len(line) > _LONGEST_LINE or size > _LARGEST:
                    raise ExperimentError(f"{path} unpacks to more than records need: {size:,} bytes at line {number}.")
                yield _parsed(line, f"line {number} of {path}", "pack the records again")
    except FileNotFoundError:
        raise ExperimentError(f"there is no file {path}.") from None
    except EOFError:
        raise ExperimentError(f"{path} ends after {number} records in the middle; copy it again.") from None
    except (OSError, zlib.error) as error:
        raise ExperimentError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def copy_records(source: Path, target: Path) -> int:
    """Pack the records of a folder into one file of compressed JSON lines, or lay those of such a file out again.

    The same records make the same bytes.

    Args:
        source: a results folder or a packed file.
        target: a new ``.jsonl.gz`` file; or a results folder, where a record that is already there stays.

    Returns:
        How many records were written.

    Raises:
        ExperimentError: there is no record, or one cannot be read.
        OutputError: a file is there already, or it cannot be written.
    """
    records = {_place(record): record for record in read_records(source)}
    if not records:
        raise ExperimentError(f"{source} holds no record; 'dicer run EXPERIMENT.toml' makes them.")
    if target.name.endswith(PACKED):
        if target.exists():
            raise OutputError(f"{target} exists; choose another name, or remove it.")
        lines = [json.dumps(values_of(records[place]), sort_keys=True, ensure_ascii=False) for place in sorted(records)]
        with taken(target) as place, as_output_error(target):
            place.new.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
            place.finish()
        return len(records)
    with locked(target):
        new = {path: record for place, record in records.items() if not (path := target / place).exists()}
        for path, record in new.items():
            write_record(path, record)
    return len(new)


def _place(record: Record) -> Path:
    """Where a record lies in its folder; what it says of itself may come from anywhere and must not lead out of it."""
    place = record_path(Path(), record.model.name, record.method, record.id)
    if len(place.parts) != 4 or ".." in place.parts or "\0" in str(place):
        raise ExperimentError(f"a record of {record.model.name!r:.60} has no fit name for a file: {record.id!r:.60}.")
    return place


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """Hold a results folder for one run; the system lets go of it when the process ends, however it ends.

    Who holds it already does so.

    Raises:
        ExperimentError: another run holds it.
        OutputError: the folder cannot be made.
    """
    with held_folder(results, results / LOCK):
        for logs in results.glob("*/*/logs"):
            remove_unfinished(logs)  # of a run that was killed while it wrote
        yield


def held_early(
    work: Callable[Concatenate[First, Path, Rest], Returned],
) -> Callable[Concatenate[First, Path, Rest], Returned]:
    """Hold the results folder, the second argument, before anything else; several processes take it by themselves."""

    @functools.wraps(work)
    def held(first: First, results: Path, /, *rest: Rest.args, **named: Rest.kwargs) -> Returned:
        with nullcontext() if "RANK" in os.environ else locked(results):
            return work(first, results, *rest, **named)

    return held
