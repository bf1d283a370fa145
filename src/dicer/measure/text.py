"""Text to tokens: calibration samples [S, T] with a record of where they come from, and windows for perplexity."""

from __future__ import annotations

import hashlib
import itertools
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicer.ask.text import Text, sources_of
from dicer.errors import CalibrationError
from dicer.measure.batches import ABSENT, COUNTED, SEEN, in_one
from dicer.measure.chat import Template
from dicer.measure.documents import as_documents, entries, hub_documents, is_local, read_documents
from dicer.measure.ready import ready_rows, unread_fields
from dicer.measure.rows import FILE_ENDINGS, Row

Tokenize = Callable[[str], list[int]]

# A longer document is read as several: the place of a window stays random without tokenizing gigabytes.
_DOCUMENT_CHARACTERS = 1_000_000
# Of a file or folder, its first ones; they are held in memory.
_MOST_CHARACTERS = 500_000_000
# Tokens: even blocks of the builtin text are for calibration, odd ones for perplexity, whatever the window lengths.
_BUILTIN_BLOCK = 2_048


@dataclass(frozen=True)
class Calibration:
    """What a model is shown.

    Attributes:
        tokens: int64 [S, T]; zeros behind the end of a row that is shorter.
        provenance: source, how the samples were taken, and a hash of the tokens; no path, no time.
        notes: what the user should know (documents joined, windows overlap ...).
        mask: uint8 [S, T], which tokens are there, and count (:func:`dicer.measure.batches.own_batches`); None: all.
    """

    tokens: Tensor
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()
    mask: Tensor | None = None

    def same_tokens(self, other: Calibration) -> bool:
        """Whether a model would be shown the same."""
        if not torch.equal(self.tokens, other.tokens) or (self.mask is None) != (other.mask is None):
            return False
        return self.mask is None or other.mask is None or torch.equal(self.mask, other.mask)


def load_calibration(text: Text, tokenize: Tokenize | None) -> Calibration:
    """Take the samples that are asked for (docs/methods.md).

    Args:
        text: what is read, and how.
        tokenize: text -> token ids without special tokens; not needed for ready ``input_ids``. For chats it needs a
            ``template`` (:class:`dicer.model.source.Tokenize`).

    Raises:
        CalibrationError: the source cannot be had, or is too short for one sample.
    """
    found = _loaded(text, tokenize)
    return _without_first(found, text.skip_first) if text.skip_first else found


def _loaded(text: Text, tokenize: Tokenize | None) -> Calibration:
    if len(sources := sources_of(text.source)) > 1:
        return _mixed(text, sources, tokenize)
    if text.source == "builtin":
        return _builtin(text, _need(tokenize))
    if not is_local(text.source):
        return _sample(hub_documents(text, template_of(tokenize)), text.source, text, _need(tokenize))
    path = Path(text.source)
    found = entries(path, text.split)
    first = list(itertools.islice(found, 1))
    every = itertools.chain(first, found)
    if first and isinstance(first[0], Row) and first[0].values.get("input_ids") is not None:
        return _ready(path, every, first[0], text)
    documents = as_documents(every, text.field, template_of(tokenize))
    return _sample(documents, path.resolve().name, text, _need(tokenize))


def _mixed(text: Text, sources: Sequence[str], tokenize: Tokenize | None) -> Calibration:
    """Samples of several texts in equal shares, the first texts one more where they do not come out even."""
    if text.samples < len(sources):
        raise CalibrationError(f"{text.samples} samples of {len(sources)} texts: ask for one of each at least.")
    each, more = divmod(text.samples, len(sources))
    parts = [_loaded(text.part(source, each + (number < more)), tokenize) for number, source in enumerate(sources)]
    rows = [row for part in parts for row in _rows_of(part)]
    tokens, mask = in_one(rows)
    names = ", ".join(str(part.provenance["source"]) for part in parts)
    provenance = {"source": names, "kind": "mixture", "parts": [part.provenance for part in parts]}
    return _calibration(tokens, provenance, [note for part in parts for note in part.notes], mask)


def _rows_of(part: Calibration) -> Iterator[tuple[list[int], list[bool]]]:
    """Each row without what is not there, and which of its tokens count."""
    mask = torch.full_like(part.tokens, COUNTED) if part.mask is None else part.mask
    for tokens, kinds in zip(part.tokens, mask, strict=True):
        there = kinds != ABSENT
        yield tokens[there].tolist(), (kinds[there] == COUNTED).tolist()


def _without_first(found: Calibration, count: int) -> Calibration:
    """The same, the first tokens of each sample seen by the others and counted in no sum.

    Raises:
        CalibrationError: nothing would count of a sample.
    """
    mask = torch.full_like(found.tokens, COUNTED, dtype=torch.uint8) if found.mask is None else found.mask.clone()
    first = mask[:, :count]
    first[first == COUNTED] = SEEN
    if not bool((mask == COUNTED).any(1).all()):
        raise CalibrationError(
            f"--skip-first {count} leaves nothing to measure of samples that are no longer: give longer ones"
            " (--seq-len), or skip fewer."
        )
    provenance = {**found.provenance, "skip_first": count, "mask_sha256": _digest(mask)}
    tokens = "token" if count == 1 else f"{count} tokens"
    note = f"the first {tokens} of each sample: seen by the others, counted in no sum"
    return replace(found, provenance=provenance, notes=(*found.notes, note), mask=mask)


def template_of(tokenize: Tokenize | None) -> Template | None:
    """The chat template that comes with a way to tokenize, if one does."""
    return getattr(tokenize, "template", None)


def load_windows(source: str, tokenize: Tokenize, length: int, count: int | None, field: str = "text") -> Tensor:
    """The first ``count`` windows of a text, side by side, for perplexity.

    Args:
        source: ``builtin`` (the blocks that calibration never sees, at no window length) or a local file.
        tokenize: text -> token ids without special tokens.
        length: tokens in a window.
        count: most windows to return; None for all.
        field: text field of a file of rows.

    Returns:
        int64 [W, length], 1 <= W <= count.

    Raises:
        CalibrationError: the source cannot be read, or is shorter than one window.
    """
    if source == "builtin":
        windows = _builtin_windows(tokenize, length, first_block=1)
    elif is_local(source):
        documents = read_documents(Path(source), field, template_of(tokenize))
        windows = _side_by_side(tokenize("\n\n".join(documents)), length)
    else:
        raise CalibrationError(
            f"perplexity text '{source}' is neither 'builtin' nor a .txt, .jsonl or .jsonl.gz file, nor any "
            f"other that is read ({', '.join(FILE_ENDINGS[3:])}) or a folder."
        )
    if not windows:
        raise CalibrationError(f"'{source}' is shorter than one window of {length} tokens; use a longer text.")
    return torch.tensor(windows[:count])


def _need(tokenize: Tokenize | None) -> Tokenize:
    if tokenize is None:
        raise CalibrationError(
            "the model has no tokenizer, so text cannot become tokens; give ready input_ids rows in a .jsonl file."
        )
    return tokenize


def _ready(path: Path, found: Iterable[str | Row], first: Row, text: Text) -> Calibration:
    rows = list(ready_rows(_rows_alone(path, found)))
    tokens, mask = in_one(rows)
    lengths = sorted(len(ids) for ids, _ in rows)
    span = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
    notes = [f"{len(rows)} ready samples of {span} tokens are used as they are"]
    if mask is not None and (seen := int((mask != COUNTED).sum()) - int((mask == 0).sum())):
        notes.append(f"{seen} of their tokens are seen by others and count in no sum, as labels or a loss mask say")
    if fields := unread_fields(first.values):
        notes.append(f"of ready samples the fields {', '.join(fields)} are not read")
    asked = [name for name in ("samples", "seq_len") if name in text.model_fields_set]
    if asked:
        notes.append(f"{', '.join(asked)} of the recipe do not apply to ready input_ids")
    return _calibration(tokens, {"source": path.resolve().name, "kind": "input_ids"}, notes, mask)


def _rows_alone(path: Path, found: Iterable[str | Row]) -> Iterator[Row]:
    for entry in found:
        if isinstance(entry, str):
            raise CalibrationError(f"{path} holds ready input_ids and plain texts; give them apart.")
        yield entry


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


def _builtin(text: Text, tokenize: Tokenize) -> Calibration:
    even = _builtin_windows(tokenize, text.seq_len, first_block=0)
    if not even:
        raise CalibrationError(f"the builtin text is shorter than one sample of {text.seq_len} tokens.")
    rng, notes = np.random.default_rng(text.seed), []
    if text.samples > len(even):
        notes.append(f"the builtin text has {len(even)} samples of {text.seq_len} tokens; some are used again")
    order = np.concatenate([rng.permutation(len(even)) for _ in range(-(-text.samples // len(even)))])
    rows = [even[i] for i in order[: text.samples]]
    return _calibration(torch.tensor(rows), {"source": "builtin", "kind": "windows", "seed": text.seed}, notes)


def _sample(documents: Iterable[str], name: str, text: Text, tokenize: Tokenize) -> Calibration:
    """Windows at seeded random places: one of each long document, then of the short ones joined, then more of each.

    Short documents are joined in their order, so that sentences of one book follow each other.
    """
    length, samples, rng = text.seq_len, text.samples, np.random.default_rng(text.seed)
    notes: list[str] = []
    pieces = list(_first_pieces(documents, name, notes))
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
        "seed": text.seed,
        "joined": from_joined > 0,
    }
    return _calibration(torch.tensor(rows), provenance, notes)


def _first_pieces(documents: Iterable[str], name: str, notes: list[str]) -> Iterator[str]:
    """Pieces of the documents until there is enough text to choose from."""
    characters = 0
    for document in documents:
        yield from _pieces(document)
        characters += len(document)
        if characters >= _MOST_CHARACTERS:
            notes.append(f"of '{name}' the first {characters:,} characters are drawn from")
            return


def _pieces(document: str) -> Iterator[str]:
    for start in range(0, len(document), _DOCUMENT_CHARACTERS):
        yield document[start : start + _DOCUMENT_CHARACTERS]


def _side_by_side(ids: Sequence[int], length: int) -> list[list[int]]:
    return [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


def _calibration(
    tokens: Tensor, provenance: dict[str, Any], notes: Sequence[str], mask: Tensor | None = None
) -> Calibration:
    record = {
        **provenance,
        "samples": tokens.shape[0],
        "seq_len": tokens.shape[1],
        "tokens_sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
    }
    if mask is not None:
        record["mask_sha256"] = _digest(mask)
    return Calibration(tokens, record, tuple(notes), mask)


def _digest(mask: Tensor) -> str:
    return hashlib.sha256(mask.numpy().tobytes()).hexdigest()
