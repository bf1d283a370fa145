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
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import dicer
from dicer.ask.axes import kind_name
from dicer.decide.plan import LayerPlan, PrunePlan, load_plan
from dicer.errors import DicerError
from dicer.model.families import Family
from dicer.model.source import ModelSource, open_model
from dicer.model.structure.find import find_family
from dicer.write.prove import Proof, prove
from families.independent import Wrong, masked_logits, tensors_of
from families.load_elsewhere import logits_elsewhere
from families.sizes import CANNOT_BUILD
from families.tiny import TYPES, auto_class, tiny_input, tiny_model

COLUMNS = ("neurons", "heads", "blocks", "experts", "expert neurons")
FORMS = ("uniform", "differing")
EXPECTED = Path(__file__).with_name("expected.json")
PASS, NONE, NOT_BUILT = "PASS", "-", "not built"
_SAME = 1e-4  # of the logits' standard deviation
_CHUNK = 16  # types that are loaded by one process
# What a tensor's name has where there are such units, found or not.
_HINTS = {
    "neurons": re.compile(
        r"^(?!.*(expert|router|gate\.weight|vision|visual|audio)).*(mlp|ffn|feed_forward|fc1|\.ff\.|intermediate|lin1)"
    ),
    "heads": re.compile(
        r"^(?!.*(vision|visual|audio)).*\.(q_proj|query|c_attn|qkv|query_key_value|q_lin|q_b_proj|Wqkv|c_q|wq)\b"
    ),
    "experts": re.compile(r"experts\b"),
    "expert neurons": re.compile(r"experts\b"),
}
# Reasons in few words, that stay the same from run to run; the first that is found in what dicer says.
_WORDS = (
    (r"saved and loaded uncut", "saved and loaded uncut it is another model"),
    (r"something goes by the layer's number", "something goes by the layer's number"),
    (r"differs from the one in which they are zero", "cut is not masked"),
    (r"a layer does nothing", "a layer does nothing in text alone"),
    (r"its units do nothing", "its units do nothing"),
    (r"change nothing, so no comparison", "units cannot be told apart"),
    (r"has other tensors there", "a small twin has other tensors"),
    (r"same number in every layer, and of one width", "one number and one width for all layers"),
    (
        r"written, as it could not be opened again: no list of decoder layers",
        "in the pruned folder no layers are found",
    ),
    (r"no list of decoder layers", "no list of decoder layers"),
    (r"others that are none \(zero or skip", "its router has rows for more than its experts (zero or skip experts)"),
    (r"is a table of whole numbers", "a table of whole numbers gives tokens their experts"),
    (r"do not lie side by side", "its experts do not lie in gate_up_proj and down_proj"),
    (r"has no language model for a '(\w+)'", "saved, it is a type that has no language model"),
    (r"can be built with the widths that are left", "no class of transformers takes the config that is left"),
)
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
    return [f"{column} {form}" for column in COLUMNS for form in FORMS]


def few_words(why: str) -> str:
    """A reason without what may differ from run to run."""
    for pattern, words in _WORDS:
        if re.search(pattern, why):
            return words
    inner = re.search(r"cannot be built \((.*)\)$", why)
    said = re.sub(r"/\S+", "", inner[1] if inner else why).removeprefix("PlanError: ").split(". ")[0]
    said = re.sub(r"(?<![A-Za-z_\d])\d+(?:[x.]\d+)*(?:e[-+]?\d+)?", "#", said).split("; choose")[0]
    return ("cannot be built: " if inner else "") + textwrap.shorten(said, 130, placeholder=" ...")


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
        found = source.family
        if not isinstance(found, Family):
            found = find_family(source.config, found.stock_class)
        family = found
        proven = replace(source, family=family)
        proofs = {proof.axis: proof for proof in prove(proven, [*family.axes, "block"])}
    except Exception as error:
        return Found(dict.fromkeys(cells(), few_words(str(error))))
    return _examined(model_type, dense, proven, proofs, stock=source)


def _examined(
    model_type: str, dense: Path, source: ModelSource, proofs: Mapping[str, Proof], stock: ModelSource
) -> Found:
    family = source.family
    assert isinstance(family, Family)
    names = [*tensors_of(dense)]
    found = Found({})
    by_column = {column: [a for a in family.axes if column_of(family, a) == column] for column in COLUMNS}
    for column, axes in by_column.items():
        asked = ["block"] if column == "blocks" else _proof_names(axes, proofs)
        own = [proofs[name] for name in asked]
        uniform, differing = _said(column, own, family, names)
        found.row |= {f"{column} uniform": uniform, f"{column} differing": differing}
    # The same model for all runs: to open it and to prove it once is enough.
    opened = patch("dicer.pipeline.open_model", lambda *_: stock)
    with opened, patch("dicer.pipeline.prove", _of_proofs(family, proofs)):
        for cell, write in _runs(dense, stock, family, by_column, found.row):
            _run(found, cell, model_type, dense, write)
    return found


def _of_proofs(family: Family, proofs: Mapping[str, Proof]) -> Callable[..., list[Proof]]:
    def proven(source: ModelSource, axes: Sequence[str]) -> list[Proof]:
        row = not isinstance(source.family, Family)
        return [] if row else [proofs[n] for n in _proof_names(axes, proofs) if n in proofs]

    return proven


def _proof_names(axes: Sequence[str], proofs: Mapping[str, Proof]) -> list[str]:
    """By what name each axis was proven: the neurons of all experts are proven at once."""
    return list(dict.fromkeys(axis if axis in proofs else "mlp.experts" for axis in axes))


def _said(column: str, proofs: Sequence[Proof], family: Family, names: Sequence[str]) -> tuple[str, str]:
    """What the proofs come to: (uniform, differing)."""
    if not proofs:
        refused = [why for axis, why in family.refused.items() if kind_name(axis) == column]
        if not refused and not (column in _HINTS and any(map(_HINTS[column].search, names))):
            return NONE, NONE
        why = few_words(refused[0]) if refused else "not found: no key of the config changes their number"
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


def _passes(row: Row, cell: str) -> bool:
    return row[cell].startswith(PASS)


def _runs(
    dense: Path, source: ModelSource, family: Family, by_column: Mapping[str, list[str]], row: Row
) -> Iterator[tuple[tuple[str, ...], Callable[[Path], PrunePlan]]]:
    """(cells that it is for, what prunes into a folder) for each run that the proofs allow."""
    inside = bool(by_column["expert neurons"])
    mlp = tuple(f"{c} uniform" for c in ("neurons", "expert neurons") if by_column[c])
    if mlp and all(_passes(row, cell) for cell in mlp):
        yield mlp, _by_recipe(dense, axis="mlp", ratio=0.4)
    else:  # of the two, --axis mlp takes both or none
        for cell in mlp:
            if _passes(row, cell):
                yield (cell,), _by_plan(dense, source, family, by_column[cell.removesuffix(" uniform")], 0.4, 0.4)
    if _passes(row, "neurons differing"):
        yield (
            ("neurons differing",),
            _by_plan(dense, source, family, by_column["neurons"], 0.4, 0.2)
            if inside
            else _by_file(dense, family, by_column["neurons"], "mlp", 0.4, 0.2),
        )
    if _passes(row, "heads uniform"):
        yield ("heads uniform",), _by_recipe(dense, axis="attention", ratio=0.5)
    if _passes(row, "heads differing"):
        yield ("heads differing",), _by_file(dense, family, by_column["heads"], "attention", 0.5, 0.0)
    if _passes(row, "blocks uniform"):
        yield ("blocks uniform",), _without_block(dense, source, family)
    if _passes(row, "experts uniform"):
        yield ("experts uniform",), _by_recipe(dense, axis="experts", ratio=0.25)


def _by_recipe(dense: Path, **recipe: Any) -> Callable[[Path], PrunePlan]:
    def write(out: Path) -> PrunePlan:
        asked = dicer.Recipe(criterion="random", **recipe)
        return dicer.prune(dense, asked, dicer.Compute(device="cpu", dtype="float32"), output=out).plan

    return write


def _by_file(
    dense: Path, family: Family, axes: Sequence[str], kind: str, even: float, odd: float
) -> Callable[[Path], PrunePlan]:
    def write(out: Path) -> PrunePlan:
        there = [i for i in range(family.where.count) if any(family.counts[axis][i] for axis in axes)]
        ratios = {str(layer): even if place % 2 == 0 else odd for place, layer in enumerate(there)}
        out.parent.mkdir(exist_ok=True)
        file = out.with_suffix(".json")
        file.write_text(json.dumps({kind: ratios}))
        return _by_recipe(dense, axis=kind, allocate=str(file))(out)

    return write


def _by_plan(
    dense: Path, source: ModelSource, family: Family, axes: Sequence[str], even: float, odd: float
) -> Callable[[Path], PrunePlan]:
    """For what no recipe says: some of the axes of a kind."""

    def write(out: Path) -> PrunePlan:
        plans: dict[str, dict[int, LayerPlan]] = {}
        for number, axis in enumerate(axes):
            for layer, units in enumerate(family.counts[axis]):
                step = max(family.factors[axis].numerator, 8 if family.axes[axis].routed else 1)
                if units:
                    keep = max(int(units * (1 - (odd if layer % 2 else even))) // step, 1) * step
                    generator = torch.Generator().manual_seed(31 * number + layer)
                    chosen = torch.randperm(units, generator=generator)[:keep].sort().values
                    plans.setdefault(axis, {})[layer] = LayerPlan(units, chosen, torch.zeros(units))
        plan = _plan(source, plans)
        dicer.apply_plan(plan, dense, out)
        return plan

    return write


def _plan(source: ModelSource, axes: dict[str, dict[int, LayerPlan]], blocks: tuple[int, ...] = ()) -> PrunePlan:
    model = {
        "name": source.name,
        "model_type": str(source.config.model_type),
        "fingerprint": source.fingerprint,
    }
    said = {"method": "random", "axis": "block" if blocks else "mlp", "ratio": 0.25}
    return PrunePlan(model, said, {}, {}, axes, blocks)


def _without_block(dense: Path, source: ModelSource, family: Family) -> Callable[[Path], PrunePlan]:
    """Without the last layer but one, as --axis block would take it (which needs a text to choose it by)."""

    def write(out: Path) -> PrunePlan:
        plan = _plan(source, {}, (max(family.where.count - 2, 1),))
        dicer.apply_plan(plan, dense, out)
        return plan

    return write


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
    import warnings

    import transformers

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
    return found


def expanded(row: Mapping[str, str]) -> Row:
    """The other way round."""
    return {f"{c} {form}": row.get(f"{c} differing", row[c]) if form == "differing" else row[c]
            for c in COLUMNS for form in FORMS}  # fmt: skip


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
    from families.page import write_page

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
