"""Where text comes from: a file's documents, a data set's rows, or rows that are tokens already."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dicer.ask.text import Text
from dicer.errors import CalibrationError, unknown

FILE_ENDINGS = (".txt", ".jsonl", ".jsonl.gz")
# How many documents of a streamed data set, its first ones, are drawn from; more would mean more download.
_HUB_DOCUMENTS = 10_000


class HubText(NamedTuple):
    """A text data set on the hub."""

    path: str
    config: str | None
    split: str
    field: str
    revision: str | None = None


# bookcorpus has a loading script, which datasets no longer runs; the hub's own parquet conversion has the same rows.
HUB_TEXTS = MappingProxyType(
    {
        "bookcorpus": HubText("bookcorpus/bookcorpus", None, "train", "text", "refs/convert/parquet"),
        "c4": HubText("allenai/c4", "en", "train", "text"),
        "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    }
)


def is_local(source: str) -> bool:
    """Whether a text's name is that of a file."""
    return source.endswith(FILE_ENDINGS)


def check_source(source: str, known: Iterable[str] = ("builtin", *HUB_TEXTS), what: str = "calibration text") -> None:
    """See to it that a text can be there, without reading it or asking the hub.

    Args:
        source: as it is typed.
        known: names that are no files.
        what: it is called.

    Raises:
        CalibrationError: a file that cannot be opened, or a name that means nothing.
    """
    if not is_local(source):
        if source not in known:
            endings = (f"FILE{ending}" for ending in FILE_ENDINGS)
            raise CalibrationError(unknown(what, source, (*known, *endings)))
        return
    try:
        if not Path(source).is_fifo():  # which can be opened once only
            Path(source).open("rb").close()
    except OSError as error:
        raise CalibrationError(f"{what} {source} cannot be read: {error.strerror or error}.") from None


def check_text(text: Text) -> None:
    """The same for a calibration text, which may also be any data set of the hub."""
    check_source(text.source, ("builtin", *HUB_TEXTS, text.source if text.source.count("/") == 1 else "OWNER/NAME"))


def _lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"text file {path} cannot be read: {reason}.") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}, line {number}: not a JSON object.")
        yield row


def ready_rows(path: Path) -> list[list[int]] | None:
    """The rows of a .jsonl file with ``input_ids``; None where its first row has none."""
    rows: list[list[int]] = []
    for number, row in enumerate(_json_lines(path), start=1):
        ids = row.get("input_ids")
        if ids is None and not rows:
            return None
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**63 for i in ids):
            raise CalibrationError(f"{path}, row {number}: input_ids must be a list of token ids.")
        if rows and len(ids) != len(rows[0]):
            raise CalibrationError(
                f"{path}, row {number}: {len(ids)} tokens, and the first row has {len(rows[0])}; "
                "ready rows must all be of one length."
            )
        rows.append(ids)
    return rows or None


def read_documents(path: Path, field: str) -> Iterator[str]:
    """A .txt file whole, or the text of every row of a .jsonl file."""
    if path.suffix == ".txt":
        yield "".join(_lines(path))
        return
    for number, row in enumerate(_json_lines(path), start=1):
        text = row.get(field)
        if not isinstance(text, str):
            raise CalibrationError(f"{path}, row {number}: no text in the field '{field}' (has: {', '.join(row)}).")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # JSON can say it, tokenizers refuse it
            raise CalibrationError(f"{path}, row {number}: no Unicode text in the field '{field}' (half a surrogate).")
        yield text


def hub_documents(text: Text) -> Iterator[str]:
    """The rows with text, as the stream has them: a shuffled stream would tear sentences of one book apart.

    There are ``_HUB_DOCUMENTS`` of them at most; the seed chooses among those, and the places in them.
    """
    known = HUB_TEXTS.get(text.source)
    check_text(text)
    where = known or HubText(text.source, text.config, text.split, text.field)
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"calibration on '{text.source}' needs the datasets library: pip install 'dicer[data]', "
            "or use --calib builtin or a local file."
        ) from None
    try:
        rows = datasets.load_dataset(
            where.path, where.config, split=where.split, revision=where.revision, streaming=True
        )
        found = 0
        for row in rows:
            if not isinstance(row.get(where.field), str):
                raise CalibrationError(
                    f"data set '{text.source}' has no text field '{where.field}' (has: {', '.join(row)}); "
                    "name it with --calib-field."
                )
            if row[where.field].strip():
                yield row[where.field]
                found += 1
            if found == _HUB_DOCUMENTS:
                return
    except CalibrationError:
        raise
    except Exception as error:  # the library raises a dozen kinds for: offline, no such set, split or config
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"data set '{text.source}' cannot be had: {reason.rstrip('.')}. Check name, split and connection, or use "
            "--calib builtin or a local file."
        ) from None
