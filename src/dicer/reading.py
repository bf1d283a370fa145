"""Files that somebody else wrote: only plain ones are opened, no more of them is read than they may need."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

SETTINGS = 16 * 2**20  # bytes: of configs, recipes, experiments, profiles, plans and records
TABLES = 256 * 2**20  # bytes: of tokenizers and of indices of weights; the largest have 40 MB

_DEEPEST, _TOO_DEEP = 64, "its tables or lists are nested too deeply"
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells the halves of a surrogate pair
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_DEEP_KEY = re.compile(rf"""(?<![\w."'-])(?:{_PART}){{32}}""")  # tomllib's time grows with the square of their number


def open_plain(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a plain file to read its bytes. A pipe, a socket or a device is never waited for, and never opened.

    Raises:
        OSError: it cannot be opened, or is no plain file; ``strerror`` says why.
    """
    try:
        _check_plain(Path(path).stat(), path)
        # Should another thing take its place just now, the opening does not wait for it, either.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(path, flags)
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from None
    try:
        _check_plain(os.fstat(descriptor), path)
        return open(descriptor, "rb")  # noqa: PTH123 - it is open already
    except BaseException:
        os.close(descriptor)
        raise


def _check_plain(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, and only plain files are read", os.fspath(path))


def check_plain(path: str | os.PathLike[str]) -> None:
    """See to it that a file can be opened, without reading it.

    Raises:
        OSError: as :func:`open_plain` does.
    """
    open_plain(path).close()


def read_bytes(path: str | os.PathLike[str], most: int = SETTINGS) -> bytes:
    """The content of a plain file.

    Raises:
        OSError: it cannot be opened, or has more than ``most`` bytes.
    """
    with open_plain(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than the {most // 2**20} MB that are read", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], most: int = SETTINGS) -> str:
    """The same as text.

    Raises:
        OSError: as for the bytes.
        ValueError: it is no UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def read_json(path: str | os.PathLike[str], most: int = SETTINGS) -> Any:
    """The value of a JSON file, whose texts can all be written again.

    Raises:
        OSError: it cannot be opened, or is too long.
        ValueError: it is no JSON.
    """
    text = read_text(path, most)
    try:
        value = json.loads(text)
        _check_depth(value)
        if _HALVES.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in a text") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        OSError: it cannot be opened, or is too long.
        ValueError: it is no TOML.
    """
    text = read_text(path, 2**20)
    if _DEEP_KEY.search(text):
        raise ValueError(_TOO_DEEP)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(values)
    return values


def _check_depth(value: Any) -> None:
    """Refuse what is deeper than those who copy, compare and write it can go."""
    inner = [value]
    for _ in range(_DEEPEST):
        held = [one for one in inner if isinstance(one, dict | list)]
        inner = [part for one in held for part in (one.values() if isinstance(one, dict) else one)]
        if not inner:
            return
    raise ValueError(_TOO_DEEP)


def reason(error: OSError | ValueError) -> str:
    """Why something could not be read, in a few words."""
    return str(getattr(error, "strerror", None) or error)
