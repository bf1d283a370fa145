"""Layer lists, as in ``5-26`` or ``5,6,9-12,-1``."""

from __future__ import annotations

import re

from dicer.errors import RecipeError


def select_layers(text: str, count: int) -> list[int]:
    """The layer indices that ``--layers`` names, sorted, each once.

    Args:
        text: as in ``5-26``, ``5,6,9-12``, ``all``, ``5-`` (to the last), ``-4--1``; ranges include both ends.
        count: how many layers the model has.

    Raises:
        RecipeError: a layer that does not exist, or a range that runs backwards.
    """
    if text.strip() == "all":
        return list(range(count))
    chosen: set[int] = set()
    for first, last in layer_ranges(text):
        ends = []
        for index in (first, last):
            if not -count <= index < count:
                raise RecipeError(f"layer {index} does not exist: the model has layers 0 to {count - 1}.")
            ends.append(index % count)
        if ends[0] > ends[1]:
            raise RecipeError(f"layer range '{first}-{last}' runs backwards (layers {ends[0]} to {ends[1]}).")
        chosen.update(range(ends[0], ends[1] + 1))
    return sorted(chosen)


def layer_ranges(text: str) -> list[tuple[int, int]]:
    """(first, last) of every range that a layer list names; nothing for ``all``.

    Raises:
        RecipeError: it cannot be read.
    """
    if text.strip() == "all":
        return []
    ranges = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,6})(-(-?\d{1,6})?)?\s*", piece)
        if match is None:
            raise RecipeError(
                f"layers '{text}' cannot be read at '{piece}'; write 'all', or as in 5,6,9-12,15- or -4--1."
            )
        last = match[3] or "-1" if match[2] else match[1]
        ranges.append((int(match[1]), int(last)))
    return ranges
