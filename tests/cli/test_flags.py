"""Fields of a model become flags."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import typer
from pydantic import BaseModel, Field

from dicer.ask.evaluation import Evaluation
from dicer.ask.panels import PANELS
from dicer.ask.spelling import FIELDS
from dicer.cli.flags import fields_of, with_flags

MOST_USED = ["output", "method", "axis", "ratio", "allocate", "layers", "calib", "samples", "seq-len", "device", "help"]


class Asked(BaseModel):
    """One field of every kind."""

    count: int | None = Field(default=None, description="how many")
    share: float = Field(default=0.5, description="how much")
    thorough: bool = Field(default=False, description="how well")
    size: int | Literal["auto"] = Field(default="auto", description="how large", json_schema_extra={"metavar": "N"})
    names: tuple[str, ...] = Field(default=(), description="which", json_schema_extra={"panel": "Text", "repeat": True})


@pytest.fixture
def typed():
    """Type words to a command with two sets of flags; what of each arrives."""
    app, arrived = typer.Typer(rich_markup_mode="markdown"), []

    @app.command()
    @with_flags(fields_of(Asked, "share"), into="machine")
    @with_flags(fields_of(Asked, "count", "thorough", "size", "names"))
    def command(*, flags: dict, machine: dict) -> None:
        """Do nothing."""
        arrived.append((flags, machine))

    def run(*words):
        app(list(words), standalone_mode=False)
        return arrived.pop() if arrived else None

    return run


@pytest.mark.parametrize(
    ("words", "flags", "machine"),
    [
        ((), {}, {}),
        (("--count", "0"), {"count": 0}, {}),
        (("--thorough", "--share", "1"), {"thorough": True}, {"share": 1.0}),
        (("--size", "3"), {"size": "3"}, {}),  # the field's own validator reads it
        (("--names", "a", "--names", "b"), {"names": ["a", "b"]}, {}),
    ],
)
def test_typed_flags_alone_arrive(typed, words, flags, machine):
    assert typed(*words) == (flags, machine)


def test_types_of_fields(typed):
    with pytest.raises(Exception, match="valid integer"):
        typed("--count", "many")


def test_help_of_fields(typed, capsys):
    typed("--help")
    shown = capsys.readouterr().out
    for flag, says in (("share", "<float> how much (default: 0.5)"), ("size", "N how large"), ("thorough", "how well")):
        assert re.search(rf"--{flag} +{re.escape(says)}".replace(r"\ ", " +"), shown), shown
    assert shown.index("how large") < shown.index("─ Text ─") < shown.index("which")


def _boxes(shown):
    """Title of a box of a help -> the flags in it."""
    boxes = re.findall(r"╭─ ([\w ]+?) ─+╮\n(.*?)╰", shown, re.DOTALL)
    return {title: re.findall(r"^│ +\*? *--([\w-]+)", body, re.MULTILINE) for title, body in boxes}


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize(("words", "fields"), [("prune", FIELDS), ("plan", FIELDS), ("eval", Evaluation.model_fields)])
def test_boxes_of_a_help(command, monkeypatch, words, fields, columns):
    monkeypatch.setenv("COLUMNS", columns)
    shown = re.sub(r"\x1b\[[\d;]*m", "", command(words, "--help").out)
    assert max(map(len, shown.splitlines())) == int(columns)
    boxes = _boxes(shown)
    assert list(boxes) == ["Arguments", "Options", *(panel for panel in PANELS if panel in boxes)]
    flags = [flag for box in boxes.values() for flag in box]
    assert len(flags) == len(set(flags))
    assert {name.replace("_", "-") for name in fields} <= {*flags}
    if fields is FIELDS:
        assert boxes["Options"] == MOST_USED
        assert list(boxes)[2:] == [*PANELS[:4], *PANELS[5:]]
