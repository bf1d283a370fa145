"""Rows that are tokens already, with whatever they say of which tokens are there, and which count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dicer.errors import CalibrationError
from dicer.measure.rows import Row

_LOSS_MASKS = ("loss_mask", "assistant_masks", "assistant_mask", "assistant_tokens_mask", "completion_mask")
_KNOWN = {"input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", *_LOSS_MASKS}
# What says that a row is several in one, which no pass of one row computes.
_PACKED = ("seq_lengths", "seq_lens", "cu_seqlens", "cu_seq_lens", "segment_ids", "sequence_ids", "document_ids")
_UNSEEN = -100  # in labels: no loss here


class Ready(NamedTuple):
    """One row: its tokens without those that are masked, and which of them count."""

    ids: list[int]
    counted: list[bool]


def ready_rows(rows: Iterable[Row]) -> Iterator[Ready]:
    """Rows with ``input_ids``, as they are meant.

    What ``attention_mask`` leaves out at either end is not there: nothing sees it, and positions begin behind it. What
    ``labels`` (-100) or a loss mask leave out is seen by the tokens behind it and counts in no sum and no loss.

    Raises:
        CalibrationError: with file and row, for what is no row of tokens, or says what cannot be honoured.
    """
    for where, row in rows:
        ids = row.get("input_ids")
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**63 for i in ids):
            raise CalibrationError(f"{where}: input_ids must be a list of token ids.")
        _refuse_packed(where, row)
        first, last = _there(where, row, len(ids))
        counted = _counted(where, row, ids, first, last)
        if last - first < 2:
            raise CalibrationError(f"{where}: rows of one token are too short for a sample.")
        if not any(counted[first:last]):
            raise CalibrationError(f"{where}: every token is masked, so there is nothing to measure. Leave it out.")
        yield Ready(ids[first:last], counted[first:last])


def unread_fields(row: dict[str, Any]) -> list[str]:
    """The fields of a row, besides plain texts and numbers about it, that nothing here reads."""
    return [name for name, value in row.items() if name not in _KNOWN and isinstance(value, list | dict)]


def _refuse_packed(where: str, row: dict[str, Any]) -> None:
    if name := next((name for name in _PACKED if _varied(row.get(name))), None):
        raise CalibrationError(f"{where}: {name} says that the row is several texts in one; give each its own row.")
    if _varied(row.get("token_type_ids")):
        raise CalibrationError(
            f"{where}: token_type_ids tell kinds of tokens apart, which is not honoured; take them out."
        )


def _varied(value: Any) -> bool:
    return isinstance(value, list) and len({str(item) for item in value}) > 1


def _flags(where: str, row: dict[str, Any], name: str, length: int) -> list[bool] | None:
    """A mask of zeros and ones as long as the row; None where it is not there."""
    found = row.get(name)
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != length
        or any(type(i) not in (int, bool) or i not in (0, 1) for i in found)
    ):
        raise CalibrationError(f"{where}: {name} must be a list of 0 and 1, as long as input_ids ({length}).")
    return [bool(i) for i in found]


def _there(where: str, row: dict[str, Any], length: int) -> tuple[int, int]:
    """Where the tokens begin and end that attention_mask keeps."""
    mask = _flags(where, row, "attention_mask", length) or [True] * length
    if not any(mask):
        raise CalibrationError(f"{where}: every token is masked, so there is nothing to measure. Leave it out.")
    first, last = mask.index(True), length - mask[::-1].index(True)
    if not all(mask[first:last]):
        raise CalibrationError(
            f"{where}: attention_mask has a hole; only tokens in front of and behind a row can be masked. Take the "
            "masked ones out, or mark them in labels (-100)."
        )
    positions = row.get("position_ids")
    if positions is not None and (
        not isinstance(positions, list) or positions[first:last] != list(range(last - first))
    ):
        raise CalibrationError(f"{where}: position_ids are not 0, 1, 2 ...; other positions are not honoured.")
    return first, last


def _counted(where: str, row: dict[str, Any], ids: list[int], first: int, last: int) -> list[bool]:
    """Which tokens count: those that every mask of the loss keeps."""
    counted = [True] * len(ids)
    for name in _LOSS_MASKS:
        if flags := _flags(where, row, name, len(ids)):
            counted = [a and b for a, b in zip(counted, flags, strict=True)]
    labels = row.get("labels")
    if labels is None:
        return counted
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise CalibrationError(f"{where}: labels must be a list as long as input_ids ({len(ids)}).")
    if any(label not in (_UNSEEN, token) for label, token in list(zip(labels, ids, strict=True))[first:last]):
        raise CalibrationError(f"{where}: labels must be input_ids, or -100 where a token does not count.")
    return [kept and label != _UNSEEN for kept, label in zip(counted, labels, strict=True)]
