"""Only plain files are opened, nothing waits, and no more is read than a limit."""

from __future__ import annotations

import ast
import gzip
import json
import os
import socket
from pathlib import Path

import pytest

import dicer
from dicer.reading import check_plain, open_plain, read_bytes, read_json, read_text, read_toml

SOURCE = Path(dicer.__file__).parent


def special(path: Path, kind: str) -> Path:
    """Something that is no plain file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(before)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    else:
        path.mkdir()
    return path


SPECIAL = ["pipe", "socket", "device", "terminal", "folder"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("read", [open_plain, check_plain, read_bytes, read_text, read_json, read_toml])
def test_no_plain_file(tmp_path, kind, read):
    if kind == "terminal" and not Path("/dev/tty").exists():
        pytest.skip("no terminal here")
    says = "Is a directory" if kind == "folder" else "only plain files are read"
    with pytest.raises(OSError, match=says):
        read(special(tmp_path / "thing", kind))


def test_plain_file_and_link_to_one(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_plain(tmp_path / name) as file:
            assert file.read() == b"content"
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        open_plain("a\0b")


def test_what_is_put_in_its_place(tmp_path, monkeypatch):
    """A pipe that takes the place of a file after the look at it is not waited for, either."""
    (tmp_path / "file").touch()
    stat = Path.stat

    def look(path, **options):
        found = stat(path, **options)
        path.unlink()
        os.mkfifo(path)
        return found

    monkeypatch.setattr(Path, "stat", look)
    with pytest.raises(OSError, match="it is a pipe"):
        open_plain(tmp_path / "file")


def test_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 2**20)
    assert len(read_bytes(tmp_path / "file", 2**20)) == 2**20
    with pytest.raises(OSError, match="more than the 0 MB"):
        read_bytes(tmp_path / "file", 2**20 - 1)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for read in (read_bytes, read_text, read_json, read_toml):
        with pytest.raises(OSError, match="MB that are read"):
            read(tmp_path / "sparse")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'"\\ud800"', "half a surrogate"),
        (b'{"\\udfff": 1}', "half a surrogate"),
        (b"[" * 10**5, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b"\xff", "utf-8"),
        (b"9" * 5000, "4300 digits|Exceeds the limit"),
        (b"{", "Expecting"),
    ],
)
def test_bad_json(tmp_path, content, says):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_json(tmp_path / "file")


def test_good_json(tmp_path):
    value = {"a": ["\U0001f600", None, 1.5], "é": {"\x1b": "\\ud83d"}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        (tmp_path / "file").write_text(text, encoding="utf-8")
        assert read_json(tmp_path / "file") == value


@pytest.mark.parametrize(
    "content",
    [
        ".".join(["a"] * 10**5) + " = 1",
        "[" + " . ".join(["a"] * 10**5) + "]",
        "[[" + ".".join(['"a"'] * 10**5) + "]]",
        "x = 1\n" + ".".join(["'a'"] * 300) + " = 1",
        "a = " + "[" * 10**5,
        "a = " + "{a = " * 10**4,
        "a = " + "{a.b.c.d.e = " * 20 + "1" + "}" * 20,
        "a = " + "[" * 100 + "]" * 100,
        "a = " + "9" * 5000,
    ],
)
def test_bad_toml(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=r"nested too deeply|Exceeds the limit"):
        read_toml(tmp_path / "file")


def test_good_toml(tmp_path):
    text = 'x = [0.1, 0.25, 0.5]\n[a.b."c.d"]\ny = "' + "see a.b, " * 100 + '"\n'
    (tmp_path / "file").write_text("z = " + str([0.25] * 1000) + "\n" + text)
    assert len(read_toml(tmp_path / "file")["z"]) == 1000


def test_every_file_of_others_is_read_there():
    """No module opens, reads or unpacks a file by itself; what is dicer's own data, or a scratch file, may be."""
    own = {"reading", "files", "machine", "study.report.paper"}
    scratch = ("write/verify/", "write/export/modeling_pruned.py")
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if place.removesuffix(".py").replace("/", ".") in own or place.startswith(scratch):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or (node.args and ast.unparse(node.args[0]) == "os.devnull"):
                continue
            if node.args and ast.unparse(node.args[0]) == "'xb'":  # a new one, to write
                continue
            name = ast.unparse(node.func)
            opens = name in ("open", "gzip.open", "os.open", "json.load", "tomllib.load", "tomllib.loads")
            if opens or (name.endswith((".read_text", ".read_bytes", ".open")) and "importlib.resources" not in name):
                found.append(f"{place}:{node.lineno} {name[:60]}")
    assert [line for line in found if not any(word in line for word in _MAY)] == []


# Files of dicer itself, new ones that are written, and opening with the limits of this module.
_MAY = ("family_file.py", "checkpoint.py", "self._open", "_open(", "study/worker.py")


def test_zipped_text_is_a_stream(tmp_path, monkeypatch):
    from dicer.errors import CalibrationError
    from dicer.measure import rows

    monkeypatch.setattr(rows, "_LONGEST_LINE", 2**20)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        for _ in range(64):
            file.write(b"0" * 2**20)
    with pytest.raises(CalibrationError, match="a line has more than"):
        list(rows.read_rows(tmp_path / "bomb.jsonl.gz"))
