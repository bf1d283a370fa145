"""``docs/families.md`` from the rows of the matrix."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import transformers

from families.tiny import CAUSAL

WHOLE = "sub-layers whole"  # a cell of its own: which of the proven axes cannot be cut down to nothing, and why
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ANY = "neurons, of MLPs or inside experts"  # a type whose MLPs are all experts has no others
_SHOWN = {  # cell -> heading; what can never differ has no column of its own
    "neurons uniform": "neurons",
    "neurons differing": "differing",
    "heads uniform": "heads",
    "heads differing": "differing",
    "blocks uniform": "blocks",
    "experts uniform": "experts",
    "expert neurons uniform": "neurons in experts",
}
GOALS = {  # of the types in AutoModelForCausalLM
    "neurons uniform": 160,
    "neurons differing": 155,
    "heads uniform": 100,
    "blocks uniform": 130,
    "experts uniform": 54,
    "expert neurons uniform": 56,
}
_TOP = """# Which families, and what of them

Written by `make families-update`: not by hand. dicer has no list of models. It finds where the units lie by building
a model's class without weights and looking at which tensors follow which key of the config, and proves on the spot
that they do. This is what comes of it for every type of transformers {version} that has a class for text (and for
images and text): {built} types that can be built here as tiny models, {unbuilt} that cannot.

| | PASS | in AutoModelForCausalLM alone ({causal} types) | have such units |
| --- | --- | --- | --- |
{totals}

Silently wrong: {wrong}.

## What PASS means
Two things, both of them.

- **dicer's proof**, which also runs on every user's model before anything is scored: on a small twin, the model that
  is cut is the dense one in which the removed units are zero (of experts: the router's logits are minus infinity; of
  whole layers: the layer hands on what it is given), within 1e-4 of the logits' standard deviation; the cut changes
  the logits; and other units than those that went would not give the same.
- **a check that shares no code with it**: a tiny checkpoint is pruned from folder to folder, at random units, and
  loaded by a process in which dicer cannot be imported: plainly, or with the model file in the folder where that says
  "own code" or the layers differ. Where units lie is then found again by comparing the two folders' rows, which are
  random and so all different; the dense model without these is run by transformers. Again 1e-4.

What that does not show: the twin has random weights, few layers (each kind once or twice), few tokens, narrow MLPs
and few heads. The hidden size, activations, norms, rotary settings, sparsities and scales are those of the user's
config, as a wrong structure shows in them (BitNet's norm over neurons and the sparse activations of Gemma 3n load
cleanly and are wrong: only the numbers see it). It shows that the cut is exact; it says nothing of how good a pruned
model is, nor of a config whose settings are other than the ones here: that is why the proof is made anew for each
model.

## How to read it
`-`: it has no such units. *differing*: layers of different widths. Experts are the same number in every layer and of
one width, as the classes hold all of a layer in one tensor; so they have no such column. *not the first*: every layer
but the first can go. *own code*: also with one width for all layers the folder carries `modeling_pruned.py`, as no
config can say it (heads by `hidden_size / heads`, say). A number is a reason below; what is refused is refused in one
line before anything is computed, and `--family FILE.toml` says a structure that is not found.

"""


def write_page(rows: Mapping[str, Mapping[str, str]]) -> None:
    """Write the page."""
    PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The page as text."""
    built = {name: row for name, row in rows.items() if not row["neurons uniform"].startswith("not built")}
    causal = {name: rows[name] for name in CAUSAL}
    totals = "\n".join(
        f"| {_title(cell)} | {passed(rows, cell)} | {passed(causal, cell)} | {_have(built, cell)} |"
        for cell in (ANY, *_SHOWN)
    )
    wrong = sorted(
        {f"{name} ({cell})" for name, row in rows.items() for cell, s in row.items() if s.startswith("WRONG")}
    )
    version = ".".join(transformers.__version__.split(".")[:2])
    top = _TOP.format(
        version=version,
        built=len(built),
        unbuilt=len(rows) - len(built),
        causal=len(causal),
        totals=totals,
        wrong=", ".join(wrong) or "none",
    )
    numbers = _numbers(built)
    head = ["| type | " + " | ".join(_SHOWN.values()) + " |", "| --- " * (len(_SHOWN) + 1) + "|"]
    lines = [f"| {name} | " + " | ".join(_cell(row[c], numbers) for c in _SHOWN) + " |" for name, row in built.items()]
    reasons = [f"{number}. {reason}" for reason, number in numbers.items()]
    unbuilt = [
        f"- {name}: {row['neurons uniform'].removeprefix('not built: ')}"
        for name, row in rows.items()
        if name not in built
    ]
    parts = [*head, *lines, "", "## Reasons", *reasons, "", *_whole(built), "", "## Not built", *unbuilt]
    return top + "\n".join(parts) + "\n"


def _whole(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Which sub-layers cannot go whole though some of their units can."""
    can = sum(row[WHOLE] == "PASS" for row in rows.values())
    bad = {name: row[WHOLE] for name, row in rows.items() if row[WHOLE] not in ("PASS", "-", row["neurons uniform"])}
    said = (
        "A sub-layer goes whole where nothing of it stays (`--drop-threshold`, or a ratio of 1 in a file of ratios). "
        "It is proven for each layer by itself, where a plan takes one. Of "
        f"{can} types every attention and every MLP can whose units can go; of {len(bad)} types not all:"
    )
    return [
        "## Sub-layers that cannot go whole",
        *textwrap.wrap(said, 118),
        "",
        *(f"- {n}: {w}" for n, w in bad.items()),
    ]


def passed(rows: Mapping[str, Mapping[str, str]], cell: str) -> int:
    """How many types pass."""
    if cell == ANY:
        pairs = [{row["neurons uniform"].partition(",")[0], row["expert neurons uniform"]} for row in rows.values()]
        return sum(pair in ({"PASS"}, {"PASS", "-"}) for pair in pairs)
    return sum(row[cell].startswith("PASS") for row in rows.values())


def _have(rows: Mapping[str, Mapping[str, str]], cell: str) -> int:
    cells = ("neurons uniform", "expert neurons uniform") if cell == ANY else (cell,)
    return sum(any(row[own] != "-" for own in cells) for row in rows.values())


def _title(cell: str) -> str:
    if cell == ANY:
        return cell
    name, _, form = cell.rpartition(" ")
    name = "neurons in experts" if name == "expert neurons" else name
    return f"{name}, layers that differ" if form == "differing" else name


def _numbers(rows: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Every reason and its number, the commonest first."""
    reasons = [row[cell] for row in rows.values() for cell in _SHOWN if not row[cell].startswith("PASS")]
    common = Counter(reason for reason in reasons if reason != "-")
    return {reason: i for i, (reason, _) in enumerate(sorted(common.items(), key=lambda it: (-it[1], it[0])), 1)}


def _cell(said: str, numbers: Mapping[str, int]) -> str:
    if said.startswith("PASS, "):
        return f"PASS ({said.removeprefix('PASS, ')})"
    return said if said in ("PASS", "-") else f"no ({numbers[said]})"
