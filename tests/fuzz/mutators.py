"""Damages to good files, as a stranger or a bad disk would do them; each is decided by a random generator alone."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

LARGE = (2**31, 2**32 - 1, 2**62, 2**63, 10**30, -(10**30), 1e20, 1e308, -1, 0, 3)
WORDS = (
    "",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb\r\nc\x85d",
    "\u202eabc\u2066",
    "\ud800",
    "x" * 5000,
    "../../outside",
    "/etc/passwd",
    "~/.ssh/id_rsa",
    "{{ 7 * 7 }}{% raw %}",
    "---\nlicense: mit\n---\n<script>alert(1)</script>![a](javascript:b)",
    "a" * 300 + "/" + "b",
    "NaN",
    "os.system",
    "\x00",
    "1e400",
    "名前",
)


def _deep(rng: Random) -> Any:
    value: Any = rng.choice(WORDS)
    for _ in range(rng.choice((3, 70, 900))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def hostile(rng: Random) -> Any:
    """A value that nobody would expect."""
    return rng.choice(
        (
            lambda: rng.choice(LARGE),
            lambda: rng.choice(WORDS),
            lambda: rng.choice((None, True, False, [], {}, [[]], {"": None}, float("nan"), float("inf"))),
            lambda: [rng.choice(LARGE)] * rng.choice((1, 3, 2000)),
            lambda: {rng.choice(WORDS): rng.choice(LARGE)},
            lambda: _deep(rng),
        )
    )()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside: (what holds it, key or index)."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in list(inner):
        yield value, key
        yield from _places(held)


def _near(value: Any, rng: Random) -> Any:
    """A value like the one that is there, a little wrong."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice(
            (value + 1, value - 1, value * 2, -value, str(value), float(value) if value < 1e9 else 0, value // 3)
        )
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(WORDS)[:200] + value[at + rng.randrange(3) :]
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value, value[::-1], [value], [*value, rng.choice(LARGE)]))
    if isinstance(value, dict):
        return rng.choice((list(value.values()), list(value), {**value, rng.choice(WORDS): hostile(rng)}))
    return 0


def change_value(value: Any, rng: Random) -> Any:
    """One place of a JSON value is replaced, removed, renamed, or exchanged with another."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return hostile(rng)
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how < 2:
        holder[key] = hostile(rng)
    elif how < 4:
        holder[key] = _near(holder[key], rng)
    elif how == 4 and isinstance(holder, dict):
        held = holder.pop(key)
        if rng.random() < 0.5:
            holder[rng.choice((rng.choice(WORDS), key + " ", key.upper(), key + ".x"))] = held
    else:
        other, place = rng.choice(places)
        holder[key], other[place] = json.loads(json.dumps([other[place], holder[key]]))
    return value


def as_json(data: bytes, rng: Random) -> bytes:
    """A JSON file with one to three such changes."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = change_value(value, rng)
    return json.dumps(value).encode()


def as_bytes(data: bytes, rng: Random) -> bytes:
    """Bits that flip, parts that are missing, doubled, zero or strange; a file that ends."""
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 8, 64, 1000))
    return rng.choice(
        (
            lambda: data[:at],
            lambda: data[:at] + bytes([data[at % len(data)] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
            lambda: data[:at] + rng.randbytes(length) + data[at + length :],
            lambda: data[:at] + bytes(length) + data[at + length :],
            lambda: data[:at] + data[at + length :],
            lambda: data[:at] + data[at : at + length] * rng.choice((2, 50)) + data[at:],
            lambda: data[:at] + struct.pack("<Q", rng.choice((2**62, 2**40, 2**31, 2**64 - 1))) + data[at + 8 :],
            lambda: data[:at] + rng.choice(WORDS).encode("utf-8", "surrogatepass") + data[at:],
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data + data,
            lambda: b"",
        )
    )()


def as_start(data: bytes, rng: Random) -> bytes:
    """The same within the first two thousand bytes, where a binary file says what it has."""
    end = rng.choice((24, 200, 2000))
    return as_bytes(data[:end], rng) + data[end:]


def as_header(data: bytes, rng: Random) -> bytes:
    """Safetensors: its header says something else, or its length does."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.15:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 8, 2**40, 2**63))) + data[8:]
    header = as_json(data[8 : 8 + length], rng)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


_LITERALS = (
    *(
        "1e20",
        "-1",
        "0",
        "nan",
        "inf",
        "true",
        "[]",
        "{}",
        '""',
        "9" * 400,
        "1979-05-27T07:32:00Z",
        "0x7fffffffffffffff",
    ),
    *('"\\u001b[2J"', '"../../outside"', '"/etc/passwd"', '"' + "x" * 5000 + '"', "[1, [2, [3]]]", "{ a = { b = 1 } }"),
    *(
        '["random", "random"]',
        "[1e20]",
        '"FILE.py:NAME"',
        '"a\\nb"',
        "[" * 80 + "]" * 80,
        "a.b.c",
        "[0.25, -3, 7]",
        "null",
    ),
)


def as_toml(data: bytes, rng: Random) -> bytes:
    """A TOML file in which a line says something else, is missing, doubled, or of another table."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    name, sets, _ = lines[at].partition("=")
    if sets and rng.random() < 0.7:
        lines[at] = f"{name}= {rng.choice(_LITERALS)}"
    else:
        lines[at : at + 1] = rng.choice(
            (
                [],
                [lines[at], lines[at]],
                [lines[at], f"{rng.choice(('seed', 'odd', 'ratio', 'criterion', 'a.b.c'))} = {rng.choice(_LITERALS)}"],
                [re.sub(r"\w", "a", lines[at], count=1)],
                ["[recipe]", lines[at]],
                [".".join("a" * 3000) + " = 1"],
            )
        )
    return "\n".join(lines).encode()


def as_lines(data: bytes, rng: Random) -> bytes:
    """A file with a JSON value a line, of which one is damaged, missing, or there many times."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    changed = as_json(lines[at], rng) if rng.random() < 0.7 else as_bytes(lines[at], rng)
    lines[at : at + 1] = rng.choice(([changed], [changed] * 500, [lines[at], changed], []))
    return b"\n".join(lines)


def as_zip(data: bytes, rng: Random) -> bytes:
    """The same of what is packed in there; or the packed bytes are damaged, or unpack to very much."""
    plain = gzip.decompress(data)
    return rng.choice(
        (
            lambda: gzip.compress(as_lines(plain, rng)),
            lambda: as_bytes(data, rng),
            lambda: data + data,
            lambda: gzip.compress(plain + b" " * 2**27, 1),
            lambda: gzip.compress(plain[:20] + b"a" * 2**27 + plain[20:], 1),
        )
    )()
