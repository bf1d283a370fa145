"""Every type of the installed transformers, and what of it can be pruned: ``python -m families.matrix`` (in ``tests``).

A cell is PASS, ``-`` where the type has no such units, or why it is refused. PASS takes both: dicer's own proof, and a
real run from a folder to a folder that a process without dicer loads, held against the masked dense model (see
:mod:`families.independent`). Where the second fails after the first, the cell begins with WRONG: none may.

``--update`` writes ``expected.json`` and ``docs/families.md``; without it the differences to the former are shown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from dicer.ask.axes import kind_name
from dicer.decide.plan import PrunePlan, load_plan
from dicer.errors import DicerError
from dicer.model.families import Family
from dicer.model.source import ModelSource, open_model
from dicer.model.structure.experts import EXPERT_NEURONS
from dicer.write.proof import Proof
from dicer.write.prove import WHOLE as OF_AXIS
from dicer.write.prove import prove
from families.independent import Wrong, masked_logits, tensors_of
from families.load_elsewhere import logits_elsewhere
from families.page import WHOLE, write_page
from families.reasons import few_words
from families.runs import runs
from families.sizes import CANNOT_BUILD
from families.tiny import TYPES, auto_class, tiny_input, tiny_model

COLUMNS = ("neurons", "heads", "blocks", "experts", "expert neurons")
FORMS = ("uniform", "differing")
EXPECTED = Path(__file__).with_name("expected.json")
_AXIS = {"neurons": "mlp", "heads": "attention", "expert neurons": EXPERT_NEURONS}  # by what name it is refused
PASS, NONE, NOT_BUILT = "PASS", "-", "not built"
_SAME = 1e-4  # of the logits' standard deviation
_CHUNK = 16  # types that are loaded by one process
# What a tensor's name has where there are such units, found or not.
_HINTS = {
    "neurons": re.compile(
        r"^(?!.*(experts|router|\.gate\.|vision|visual|audio)).*(mlp|ffn|feed_forward|fc1|\.ff\.|intermediate|lin1)"
    ),
    "heads": re.compile(
        r"^(?!.*(vision|visual|audio)).*\.(q_proj|query|c_attn|\w*qkv\w*|query_key_value|q_lin|q_b_proj|c_q|wq\w*)\b"
    ),
    "experts": re.compile(r"\bexperts\b"),
    "expert neurons": re.compile(r"\bexperts\b"),
}
Row = dict[str, str]


@dataclass
class Run:
    """One real run, to be held against what another process makes of its folder."""

    cells: tuple[str, ...]
    model_type: str
    folder: Path
    masked: torch.Tensor


@dataclass
class Found:
    """What is known of a type before the other process has loaded anything."""

    row: Row
    runs: list[Run] = field(default_factory=list)


def cells() -> list[str]:
    """The columns of the matrix."""
    return [*(f"{column} {form}" for column in COLUMNS for form in FORMS), WHOLE]


def column_of(family: Family, axis: str) -> str:
    """The column that an axis belongs to."""
    row = family.axes[axis]
    if row.kind.routed:
        return "experts"
    if row.routed is not None:
        return "expert neurons"
    return "heads" if kind_name(axis) == "attention" else "neurons"


def look_at(model_type: str, root: Path) -> Found:
    """Prove all axes of a tiny model of a type, and prune it along those that are proven."""
    if model_type in CANNOT_BUILD:
        return Found(dict.fromkeys(cells(), f"{NOT_BUILT}: {CANNOT_BUILD[model_type]}"))
    dense = root / model_type / "dense"
    try:
        tiny_model(model_type).save_pretrained(dense)
        source = open_model(dense)
        axes = source.family.axes
        whole = [f"{name}{OF_AXIS}" for name, axis in axes.items() if axis.routed is None and not axis.kind.routed]
        proofs = {proof.axis: proof for proof in prove(source, [*axes, "block", *whole])}
    except Exception as error:
        return Found(dict.fromkeys(cells(), few_words(str(error))))
    return _examined(model_type, dense, source, proofs)


def _examined(model_type: str, dense: Path, source: ModelSource, proofs: Mapping[str, Proof]) -> Found:
    family = source.family
    names = [name for name, tensor in tensors_of(dense).items() if tensor.dim() == 2 or "experts" in name]
    found = Found({})
    by_column = {column: [a for a in family.axes if column_of(family, a) == column] for column in COLUMNS}
    for column, axes in by_column.items():
        asked = ["block"] if column == "blocks" else _proof_names(axes, proofs)
        own = [proofs[name] for name in asked]
        uniform, differing = _said(column, own, family, names)
        found.row |= {f"{column} uniform": uniform, f"{column} differing": differing}
    found.row[WHOLE] = _whole(proofs)
    # The same model for all runs: to open it and to prove it once is enough.
    with ExitStack() as stack:
        for module in ("preflight", "pipeline"):
            stack.enter_context(patch(f"dicer.{module}.open_model", lambda *_: source))
            stack.enter_context(patch(f"dicer.{module}.prove", _of_proofs(proofs)))
        for cell, write in runs(dense, source, family, by_column, found.row):
            _run(found, cell, model_type, dense, write)
    return found


def _of_proofs(proofs: Mapping[str, Proof]) -> Callable[..., list[Proof]]:
    def proven(source: ModelSource, axes: Sequence[str]) -> list[Proof]:
        return [proofs[n] for n in _proof_names(axes, proofs) if n in proofs]

    return proven


def _proof_names(axes: Sequence[str], proofs: Mapping[str, Proof]) -> list[str]:
    """By what name each axis was proven: the neurons of all experts are proven at once."""
    return list(dict.fromkeys(axis if axis in proofs else "mlp.experts" for axis in axes))


def _said(column: str, proofs: Sequence[Proof], family: Family, names: Sequence[str]) -> tuple[str, str]:
    """What the proofs come to: (uniform, differing)."""
    if not proofs:
        refused = family.refused.get(_AXIS.get(column, column))
        if not refused and not (column in _HINTS and any(map(_HINTS[column].search, names))):
            return NONE, NONE
        why = few_words(refused) if refused else "not found: no key of the config changes their number"
        return why, why
    bad = [proof for proof in proofs if not proof.holds]
    if bad:
        some = f"{', '.join(p.axis for p in bad)}: " if len(bad) < len(proofs) else ""
        why = few_words(bad[0].why_not)
        return (some + why,) * 2
    if column == "blocks":
        return PASS + (", not the first" if proofs[0].but_first else ""), NONE
    apart = [proof for proof in proofs if proof.differing]
    return PASS, (few_words(apart[0].differing) if apart else PASS)


def _whole(proofs: Mapping[str, Proof]) -> str:
    """What comes of sub-layers that go whole, where fewer units of them can."""
    asked = {name: proofs[name + OF_AXIS] for name, proof in proofs.items() if name + OF_AXIS in proofs and proof.holds}
    bad = [f"{name}: {few_words(proof.why_not)}" for name, proof in asked.items() if not proof.holds]
    return "; ".join(bad) or (PASS if asked else NONE)


def _run(found: Found, own: tuple[str, ...], model_type: str, dense: Path, write: Callable[[Path], PrunePlan]) -> None:
    """Prune, and run the masked model; what fails here was proven and cannot be done."""
    out = dense.with_name(own[0].replace(" ", "_"))
    try:
        write(out)
        masked = masked_logits(model_type, dense, out, load_plan(out))
    except DicerError as error:
        found.row |= dict.fromkeys(own, f"proven, and refused: {few_words(str(error))}")
        return
    except Wrong as error:
        found.row |= dict.fromkeys(own, f"WRONG: {few_words(str(error))}")
        return
    except Exception as error:
        found.row |= dict.fromkeys(own, f"WRONG: {type(error).__name__}: {few_words(str(error))}")
        return
    found.runs.append(Run(own, model_type, out, masked))


def _held_against(row: Row, run: Run, loaded: Any) -> None:
    """Of what another process computed with a folder: the cells of the run that are not what the proof says."""
    if isinstance(loaded, str):
        row |= dict.fromkeys(run.cells, f"WRONG: does not load without dicer: {few_words(loaded)}")
        return
    spread = float(run.masked.std())
    apart = float((loaded - run.masked).abs().max())
    if not (loaded.isfinite().all() and apart <= _SAME * spread):
        row |= dict.fromkeys(
            run.cells, f"WRONG: loaded elsewhere it is not the masked model (off by {apart / spread:.0e})"
        )
    elif (run.folder / "modeling_pruned.py").exists() and "uniform" in run.cells[0]:
        row |= {cell: f"{row[cell]}, own code" for cell in run.cells}


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


def rows(types: Sequence[str], told: Callable[[str], None] = lambda _: None) -> dict[str, Row]:
    """The rows of some types, computed."""
    found: dict[str, Row] = {}
    for start in range(0, len(types), _CHUNK):
        with tempfile.TemporaryDirectory() as name, _quiet():
            runs: list[Run] = []
            for model_type in types[start : start + _CHUNK]:
                begun = time.perf_counter()
                own = look_at(model_type, Path(name))
                found[model_type] = own.row
                runs += own.runs
                told(f"{model_type}: {time.perf_counter() - begun:.1f} s")
            jobs = [(run.folder, auto_class(run.model_type).__name__) for run in runs]
            for run, loaded in zip(runs, logits_elsewhere(jobs, tiny_input()) if jobs else (), strict=True):
                _held_against(found[run.model_type], run, loaded)
    return found


def chosen_types() -> list[str]:
    """A third of the types, another one each day; all of them where ``DICER_FAMILIES`` is ``all``."""
    if os.environ.get("DICER_FAMILIES") == "all":
        return [*TYPES]
    third = datetime.datetime.now(datetime.UTC).timetuple().tm_yday % 3
    return [name for name in TYPES if zlib.crc32(name.encode()) % 3 == third]


def compact(row: Row) -> dict[str, str]:
    """A row as it is checked in: where both forms say the same, it is said once."""
    found = {}
    for column in COLUMNS:
        uniform, differing = row[f"{column} uniform"], row[f"{column} differing"]
        found |= {column: uniform} if uniform == differing else {column: uniform, f"{column} differing": differing}
    return found | {WHOLE: row[WHOLE]}


def expanded(row: Mapping[str, str]) -> Row:
    """The other way round."""
    return {f"{c} {form}": row.get(f"{c} differing", row[c]) if form == "differing" else row[c]
            for c in COLUMNS for form in FORMS} | {WHOLE: row.get(WHOLE, "")}  # fmt: skip


def read_expected() -> dict[str, Row]:
    """The checked-in rows."""
    return {name: expanded(row) for name, row in json.loads(EXPECTED.read_text()).items()}


def differences(found: Mapping[str, Row], expected: Mapping[str, Row]) -> list[str]:
    """One line for each cell that is not what is checked in."""
    return [
        f"{name}, {cell}: {now!r}, and expected.json has {expected.get(name, {}).get(cell)!r}"
        for name, row in found.items()
        for cell, now in row.items()
        if now != expected.get(name, {}).get(cell)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, and show what differs or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="only these")
    parser.add_argument("--update", action="store_true", help="write expected.json and docs/families.md")
    parser.add_argument("--page", action="store_true", help="only write docs/families.md from expected.json")
    asked = parser.parse_args(arguments)
    expected = read_expected() if EXPECTED.exists() else {}
    if not asked.page:
        found = rows(asked.types or TYPES, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        lines = differences(found, expected)
        print("\n".join(lines) or "as expected")  # noqa: T201
        if not asked.update:
            return bool(lines)
        expected = {name: row for name, row in sorted((expected | found).items()) if name in TYPES}
        EXPECTED.write_text(json.dumps({n: compact(row) for n, row in expected.items()}, indent=1) + "\n")
    write_page(expected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
