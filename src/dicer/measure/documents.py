"""Where text comes from: files, folders and data sets, as documents or as rows that are tokens already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from dicer.ask.text import Text, sources_of
from dicer.errors import CalibrationError, unknown
from dicer.measure.batches import check_room
from dicer.measure.chat import Template, chat_field, chat_text
from dicer.measure.rows import (
    FILE_ENDINGS,
    PLAIN,
    ROWS,
    Row,
    ending_of,
    is_saved,
    read_rows,
    text_files,
    whole_text,
)
from dicer.reading import check_plain, reason

_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # OWNER/NAME
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
    """Whether a text's name is that of a file, or of a folder that is there.

    OWNER/NAME is a data set of the hub: a folder begins with ``.`` or ``/``, ends in ``/``, or is no such name.

    Raises:
        CalibrationError: it could be a data set of the hub and a folder here: which one, it has to say.
    """
    if not source or source == "builtin":
        return False
    name = HUB_TEXTS[source].path if source in HUB_TEXTS else source
    if ending_of(Path(name)) in PLAIN + ROWS:
        return True
    if not re.fullmatch(_HUB_ID, name):
        return Path(name).is_dir()
    if Path(name).is_dir():  # which the library would read in place of the hub's
        raise CalibrationError(
            f"'{source}' is a data set of the hub, and there is a folder {name} here: write ./{name} for the folder, "
            "or work in another one for the hub's."
        )
    return False


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
    path = Path(source)
    if path.is_dir():
        if not is_saved(path) and not text_files(path):
            raise CalibrationError(
                f"{what} {source} is a folder without a file that ends in {', '.join(FILE_ENDINGS)}."
            )
        return
    try:
        check_plain(path)
    except OSError as error:
        raise CalibrationError(f"{what} {source} cannot be read: {reason(error)}.") from None


def check_text(text: Text) -> None:
    """The same for a calibration text, which may also be any data set of the hub."""
    check_room(text.samples, text.seq_len)
    for source in sources_of(text.source):
        check_source(source, ("builtin", *HUB_TEXTS, source if source.count("/") == 1 else "OWNER/NAME"))


def entries(path: Path, split: str = "train") -> Iterator[str | Row]:
    """What a file or folder holds, in order: plain texts, and rows.

    Args:
        path: of a file, or of a folder of files, or of one that a data set was saved to.
        split: of a saved data set with several.

    Raises:
        CalibrationError: something cannot be read.
    """
    if path.is_dir() and not is_saved(path):
        for file in text_files(path):
            yield from entries(file)
    elif ending_of(path) in PLAIN and not path.is_dir():
        yield whole_text(path)
    else:
        yield from read_rows(path, split)


def as_documents(found: Iterable[str | Row], field: str, template: Template | None = None) -> Iterator[str]:
    """The texts of what was found: plain ones, the text of every row, or its chat through the model's template.

    Raises:
        CalibrationError: a row without text.
    """
    for entry in found:
        yield entry if isinstance(entry, str) else _row_text(entry, field, template)


def _row_text(row: Row, field: str, template: Template | None) -> str:
    where, values = row
    text = values.get(field)
    if not isinstance(text, str):
        chat = field if isinstance(text, list) else chat_field(values) if field == "text" else None
        if chat is None:
            raise CalibrationError(f"{where}: no text in the field '{field}' (has: {', '.join(map(str, values))}).")
        text = chat_text(row, chat, template)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # JSON can say it, tokenizers refuse it
        raise CalibrationError(f"{where}: no Unicode text in the field '{field}' (half a surrogate).")
    return text


def read_documents(path: Path, field: str, template: Template | None = None) -> Iterator[str]:
    """The texts of a file or folder (:func:`entries`, :func:`as_documents`)."""
    return as_documents(entries(path), field, template)


def hub_documents(text: Text, template: Template | None = None) -> Iterator[str]:
    """The rows with text, as the stream has them: a shuffled stream would tear sentences of one book apart.

    There are ``_HUB_DOCUMENTS`` of them at most; the seed chooses among those, and the places in them.
    """
    check_text(text)
    where = HUB_TEXTS.get(text.source, HubText(text.source, text.config, text.split, text.field))
    asked = {name: getattr(text, name) for name in ("config", "split", "field") if name in text.model_fields_set}
    where = where._replace(**asked)  # what was said goes before what is usual for a name
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
            if where.field == "text" and "text" not in row and (chat := chat_field(row)):
                row["text"] = chat_text(Row(f"data set '{text.source}', row {found + 1}", row), chat, template)
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
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"data set '{text.source}' cannot be had: {said.rstrip('.')}. Check name, split and connection, or use "
            "--calib builtin or a local file."
        ) from None
