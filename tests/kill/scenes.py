"""The commands that are killed: what each is told, and what lies there before it.

Each runs on a *stage* of its own, a folder with ``place/`` (where the output goes), ``cache/`` (``DICER_CACHE``) and
``tmp/`` (the system's temporary folder), so that whatever it leaves is seen, wherever that is. What it reads is
*given*: made once, and the same after all kills as it was before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PARTS = ("place", "cache", "tmp")  # of a stage
_DATA_FREE = "--method weight-l2 --layers 1"
_ON_TEXT = "--method rc-a --layers 1 --calib {given}/rows.jsonl"


@dataclass(frozen=True)
class Scene:
    """A command.

    Attributes:
        words: what is typed; ``{given}`` and ``{place}`` are folders.
        before: what is typed before, so that something lies there already.
        again: what is typed behind the words when the run is done once more, as something may lie there by then.
        keeps: what a user keeps in the output, if it is a folder that more than the command fills.
        patches: what the run is to find otherwise than it is: ``module:name`` -> value.
        grows: files of the output appear one after the other.
        slow: what takes hours, ``module:name``, where several runs at once are tried.
    """

    words: str
    before: tuple[str, ...] = ()
    again: str = ""
    keeps: str = ""
    patches: tuple[tuple[str, Any], ...] = ()
    grows: bool = False
    slow: str = ""

    @property
    def command(self) -> str:
        """Its name."""
        return self.words.split()[0]

    @property
    def states(self) -> set[str]:
        """What the output may be after a kill; aside: the old one lies where the next run finds it."""
        grows = {"part"} if self.grows else set()
        return {"new", "old" if self.before else "none"} | grows | ({"aside"} if self.patches == _APART else set())


# Where names cannot be exchanged, two renames do it, and there is a moment without an output.
_APART = (("dicer.holds:exchange", lambda *_: False),)
_ON_DISK = (("dicer.decide.cost:_IN_MEMORY", 0),)  # hidden states lie in files, as if they were large
_PRUNE = "prune {given}/llama -o {place}/out " + _DATA_FREE
_OLD = ("prune {given}/llama -o {place}/out --method random",)
_REPORT = "report {given}/results -o {place}/out"
_OLD_REPORT = ("report {given}/others -o {place}/out",)

SCENES: dict[str, Scene] = {
    "prune": Scene(_PRUNE, again="--overwrite", slow="dicer.pipeline:score"),
    "prune-over": Scene(_PRUNE + " --overwrite", _OLD),
    "prune-apart": Scene(_PRUNE + " --overwrite", _OLD, patches=_APART),
    "prune-resume": Scene("prune {given}/llama -o {place}/out --resume " + _ON_TEXT, again="--overwrite"),
    "prune-streamed": Scene(
        "prune {given}/llama -o {place}/out --stream " + _ON_TEXT, again="--overwrite", patches=_ON_DISK
    ),
    "prune-fidelity": Scene(_PRUNE + " --fidelity {given}/text.txt", again="--overwrite"),
    "plan": Scene(
        "plan {given}/llama -o {place}/out --overwrite --resume " + _ON_TEXT,
        (f"plan{_PRUNE[5:]}",),
        slow="dicer.pipeline:score",
    ),
    "plan-of-gguf": Scene("plan {given}/tiny.gguf -o {place}/out --method weight-l2", again="--overwrite"),
    "apply": Scene("apply {given}/plan {given}/llama -o {place}/out --overwrite", _OLD),
    "entropy": Scene(
        "entropy {given}/llama -o {place}/out --calib {given}/rows.jsonl --lists mlp,blocks", again="--overwrite"
    ),
    "run": Scene("run {given}/grid.toml -o {place}/out", grows=True, slow="dicer.study.run:run_model"),
    "report": Scene(_REPORT, _OLD_REPORT, keeps="notes.txt", slow="dicer.study.report.pages:_files"),
    "report-apart": Scene(_REPORT, _OLD_REPORT, keeps="notes.txt", patches=_APART),
    "export-stock": Scene("export {given}/wide --to stock -o {place}/out", again="--overwrite"),
    "export-gguf": Scene(
        "export {given}/merging --to gguf -o {place}/out --overwrite",
        ("export {given}/merging --to gguf --type f16 -o {place}/out",),
    ),
}

_GRID = """models = ["{given}/llama"]
methods = ["weight-l2"]
ratios = [0.25, 0.5]
calib = ["{given}/rows.jsonl"]
[recipe]
layers = "1"
[evaluation]
against = "original"
text = "{given}/text.txt"
windows = 2
window = 32
"""


def make_given(given: Path, run: Callable[[str], None]) -> None:
    """Make all that the commands read.

    Args:
        given: the folder, which is empty.
        run: runs a command, typed in one line.
    """
    from model.test_find import tiny_gguf
    from reading import know_tiny_tokenizer, save_stock
    from recorded import grid, record, save
    from tiny import save_tiny, tiny_tokens

    know_tiny_tokenizer(pytest.MonkeyPatch())
    save_tiny(given / "llama", num_hidden_layers=2)
    save_stock(given / "merging", num_hidden_layers=2)
    tiny_gguf(given / "tiny.gguf")
    rows = [json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()]
    (given / "rows.jsonl").write_text("".join(rows))
    (given / "text.txt").write_text("A text of a few words, and another one behind it. " * 40)
    (given / "grid.toml").write_text(_GRID.format(given=given))
    save(grid()[:5], given / "results")
    save([record("rc-a", 0.25)], given / "others")
    run(f"prune {given}/llama -o {given}/wide --method weight-l2 --layers 1")
    run(f"plan {given}/llama -o {given}/plan {_DATA_FREE}")
