"""Words of others, as they are shown: what a file says never moves a cursor, begins a line or becomes a link."""

from __future__ import annotations

import re

LINE = 400  # characters of a line that is shown; a message says what was asked, found and to do in fewer


def plain(value: object, most: int | None = None, *, keep: str = "") -> str:
    """A value as it can be printed: what moves, colours or hides is spelled out, and a break is a space.

    Args:
        value: whatever a file, or a user, may say.
        most: characters; of more the middle goes.
        keep: characters that stay as they are.
    """
    text = str(value)
    text = text if text.isprintable() else "".join(_spelled(c, keep) for c in text)
    if most is None or len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]} … {text[-end:]}"


def _spelled(character: str, keep: str) -> str:
    if character.isprintable() or character in keep:
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")


def one_line(value: object) -> str:
    """A value on one line of a page: what cannot be printed is a space, and spaces are one."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def markdown(value: object) -> str:
    """A value that Markdown shows as it is, and no reader takes for a link, a picture or HTML."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", one_line(value))


def code(value: object) -> str:
    """A value as inline code of Markdown, between more backticks than it has in a row itself."""
    line = one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
