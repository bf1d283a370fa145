"""Text to tokens: calibration samples [S, T] with a record of where they come from, and windows for perplexity."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import pydoc_data.topics
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dicer.ask.recipe import Recipe
from dicer.errors import CalibrationError

Tokenize = Callable[[str], list[int]]

# A longer document is read as several: the place of a window stays random without tokenizing gigabytes.
_DOCUMENT_CHARACTERS = 1_000_000
# How many documents of a streamed data set, its first ones, are drawn from; more would mean more download.
_HUB_DOCUMENTS = 10_000
# Tokens: even blocks of the builtin text are for calibration, odd ones for perplexity, whatever the window lengths.
_BUILTIN_BLOCK = 2_048


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


@dataclass(frozen=True)
class Calibration:
    """What a model is shown.

    Attributes:
        tokens: int64 [S, T].
        provenance: source, how the samples were taken, and a hash of the tokens; no path, no time.
        notes: what the user should know (documents joined, windows overlap ...).
    """

    tokens: Tensor
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_calibration(recipe: Recipe, tokenize: Tokenize | None) -> Calibration:
    """Take the samples that a recipe asks for (docs/methods.md).

    Args:
        recipe: ``calib``, ``samples``, ``seq_len``, ``calib_seed`` and the hub fields are read.
        tokenize: text -> token ids without special tokens; not needed for ready ``input_ids``.

    Raises:
        CalibrationError: the source cannot be had, or is too short for one sample.
    """
    source = recipe.calib
    path = Path(source)
    if _is_local(source):
        if path.suffix != ".txt" and (rows := _ready_rows(path)) is not None:
            return _ready(path, rows, recipe)
        documents: Iterable[str] = _read_documents(path, recipe.calib_field)
        name = path.name
    elif source == "builtin":
        return _builtin(recipe, _need(tokenize))
    else:
        documents, name = itertools.islice(_hub_documents(recipe), _HUB_DOCUMENTS), source
    return _sample(documents, name, recipe, _need(tokenize))


def load_windows(source: str, tokenize: Tokenize, length: int, count: int | None, field: str = "text") -> Tensor:
    """The first ``count`` windows of a text, side by side, for perplexity.

    Args:
        source: ``builtin`` (the blocks that calibration never sees, at no window length) or a local file.
        tokenize: text -> token ids without special tokens.
        length: tokens in a window.
        count: most windows to return; None for all.
        field: text field of a .jsonl file.

    Returns:
        int64 [W, length], 1 <= W <= count.

    Raises:
        CalibrationError: the source cannot be read, or is shorter than one window.
    """
    if source == "builtin":
        windows = _builtin_windows(tokenize, length, first_block=1)
    elif _is_local(source):
        windows = _side_by_side(tokenize("\n\n".join(_read_documents(Path(source), field))), length)
    else:
        raise CalibrationError(f"perplexity text '{source}' is neither 'builtin' nor a .txt, .jsonl or .jsonl.gz file.")
    if not windows:
        raise CalibrationError(f"'{source}' is shorter than one window of {length} tokens; use a longer text.")
    return torch.tensor(windows[:count])


def _is_local(source: str) -> bool:
    return source.endswith((".txt", ".jsonl", ".jsonl.gz"))


def _need(tokenize: Tokenize | None) -> Tokenize:
    if tokenize is None:
        raise CalibrationError(
            "the model has no tokenizer, so text cannot become tokens; give ready input_ids rows in a .jsonl file."
        )
    return tokenize


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


def _ready_rows(path: Path) -> list[list[int]] | None:
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


def _ready(path: Path, rows: list[list[int]], recipe: Recipe) -> Calibration:
    if len(rows[0]) < 2:
        raise CalibrationError(f"{path}: rows of one token are too short for a sample.")
    notes = [f"{len(rows)} ready samples of {len(rows[0])} tokens are used as they are"]
    asked = {name: getattr(recipe, name) for name in ("samples", "seq_len") if name in recipe.model_fields_set}
    if asked:
        notes.append(f"{', '.join(asked)} of the recipe do not apply to ready input_ids")
    return _calibration(torch.tensor(rows), {"source": path.name, "kind": "input_ids"}, notes)


def _read_documents(path: Path, field: str) -> Iterator[str]:
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


def _builtin_text() -> str:
    """The language reference that ships with CPython; public, English, and always there."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _builtin_windows(tokenize: Tokenize, length: int, first_block: int) -> list[list[int]]:
    """Windows of every second block, side by side; none crosses into the blocks between.

    A window longer than a block goes on in the next block of the same kind.
    """
    ids = tokenize(_builtin_text())
    blocks = [ids[i : i + _BUILTIN_BLOCK] for i in range(0, len(ids), _BUILTIN_BLOCK)][first_block::2]
    if length > _BUILTIN_BLOCK:
        return _side_by_side(list(itertools.chain.from_iterable(blocks)), length)
    return [window for block in blocks for window in _side_by_side(block, length)]


def _builtin(recipe: Recipe, tokenize: Tokenize) -> Calibration:
    even = _builtin_windows(tokenize, recipe.seq_len, first_block=0)
    if not even:
        raise CalibrationError(f"the builtin text is shorter than one sample of {recipe.seq_len} tokens.")
    rng, notes = np.random.default_rng(recipe.calib_seed), []
    if recipe.samples > len(even):
        notes.append(f"the builtin text has {len(even)} samples of {recipe.seq_len} tokens; some are used again")
    order = np.concatenate([rng.permutation(len(even)) for _ in range(-(-recipe.samples // len(even)))])
    rows = [even[i] for i in order[: recipe.samples]]
    return _calibration(torch.tensor(rows), {"source": "builtin", "kind": "windows", "seed": recipe.calib_seed}, notes)


def _sample(documents: Iterable[str], name: str, recipe: Recipe, tokenize: Tokenize) -> Calibration:
    """Windows at seeded random places: one of each long document, then of the short ones joined, then more of each.

    Short documents are joined in their order, so that sentences of one book follow each other.
    """
    length, samples, rng, notes = recipe.seq_len, recipe.samples, np.random.default_rng(recipe.calib_seed), []
    pieces = [p for d in documents for p in _pieces(d)]
    if not pieces:
        raise CalibrationError(f"'{name}' holds no text.")
    long: dict[int, list[int]] = {}
    for index in rng.permutation(len(pieces)):
        ids = tokenize(pieces[index])
        if len(ids) >= length:
            long[int(index)] = ids
        if len(long) == samples:
            break
    seats = list(long.values())
    room = {id(ids): len(ids) // length for ids in seats}
    short = [piece for index, piece in enumerate(pieces) if index not in long] if len(seats) < samples else []
    joined = tokenize("\n\n".join(short)) if short else []
    from_joined = min(len(joined) // length, samples - len(seats))
    if not seats and not from_joined:
        raise CalibrationError(
            f"'{name}' gives {len(joined)} tokens, too short for one sample of {length}; "
            "use a longer text or a smaller --seq-len."
        )
    if from_joined and not seats:
        notes.append(f"no document of '{name}' has {length} tokens, so its {len(pieces)} documents were joined")
    elif from_joined:
        notes.append(
            f"only {len(seats)} documents of '{name}' have {length} tokens, so {from_joined} of {samples} samples come "
            "from the shorter ones joined"
        )
    texts = [*seats, joined] if from_joined else seats
    seats = seats + [joined] * from_joined
    room[id(joined)] = len(joined) // length
    if sum(room[id(ids)] for ids in texts) < samples:
        notes.append(f"'{name}' is shorter than {samples} x {length} tokens, so samples overlap")
    for turn in itertools.count(2):  # a text has its next turn while it has room, and then all have
        if len(seats) >= samples:
            break
        seats += [ids for ids in texts if ids is not joined and room[id(ids)] >= turn] or texts
    rows = []
    for ids in seats[:samples]:
        start = int(rng.integers(len(ids) - length + 1))
        rows.append(ids[start : start + length])
    provenance = {
        "source": name,
        "kind": "random windows",
        "seed": recipe.calib_seed,
        "joined": from_joined > 0,
    }
    return _calibration(torch.tensor(rows), provenance, notes)


def _pieces(document: str) -> Iterator[str]:
    for start in range(0, len(document), _DOCUMENT_CHARACTERS):
        yield document[start : start + _DOCUMENT_CHARACTERS]


def _side_by_side(ids: Sequence[int], length: int) -> list[list[int]]:
    return [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


def _hub_documents(recipe: Recipe) -> Iterator[str]:
    """The rows with text, as the stream has them: a shuffled stream would tear sentences of one book apart.

    The seed chooses among the first ``_HUB_DOCUMENTS`` of them, and the places in them.
    """
    known = HUB_TEXTS.get(recipe.calib)
    if known is None and recipe.calib.count("/") != 1:
        raise CalibrationError(
            f"calibration source '{recipe.calib}' is unknown: use builtin, {', '.join(HUB_TEXTS)}, OWNER/NAME of a hub "
            "data set, or a .txt, .jsonl or .jsonl.gz file."
        )
    text = known or HubText(recipe.calib, recipe.calib_config, recipe.calib_split, recipe.calib_field)
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"calibration on '{recipe.calib}' needs the datasets library: pip install 'dicer[data]', "
            "or use --calib builtin or a local file."
        ) from None
    try:
        rows = datasets.load_dataset(text.path, text.config, split=text.split, revision=text.revision, streaming=True)
        for row in rows:
            if not isinstance(row.get(text.field), str):
                raise CalibrationError(
                    f"data set '{recipe.calib}' has no text field '{text.field}' (has: {', '.join(row)}); "
                    "name it with --calib-field."
                )
            if row[text.field].strip():
                yield row[text.field]
    except CalibrationError:
        raise
    except Exception as error:  # the library raises a dozen kinds for: offline, no such set, split or config
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"data set '{recipe.calib}' cannot be had: {reason.rstrip('.')}. Check name, split and connection, or use "
            "--calib builtin or a local file."
        ) from None


def _calibration(tokens: Tensor, provenance: dict[str, Any], notes: Sequence[str]) -> Calibration:
    record = {
        **provenance,
        "samples": tokens.shape[0],
        "seq_len": tokens.shape[1],
        "tokens_sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
    }
    return Calibration(tokens, record, tuple(notes))
