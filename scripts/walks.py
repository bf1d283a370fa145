"""Follow a recipe and a model through the program: which files they pass in a real run, and how often the way climbs.

    python scripts/walks.py [SOURCE]        # SOURCE: a folder with another version's ``dicer`` package (default: src)

A tiny model is pruned with every call of the package recorded that is handed the recipe (or what it becomes), or the
model (or what it becomes). The way is the files in the order in which they are entered; a step climbs where the next
file stands on a higher floor than the one before, a floor above all that a file imports. Steps that repeat count once.
"""

from __future__ import annotations

import ast
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "src").resolve()
FOLLOWED = {
    "recipe": (
        "Recipe",
        "Wanted",
        "Method",
        "Text",
        "Compute",
        "Job",
        "Asked",
        "Decided",
        "Budget",
        "Decision",
        "Amounts",
    ),
    "model": ("ModelSource", "SafetensorsSource", "Family", "Cut", "PrunePlan", "CheckpointSink"),
}


def floors() -> dict[str, int]:
    """File -> floor of its folder (a file of the root is alone): 1 for what imports nothing of the package."""
    files = {
        path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): path for path in SOURCE.rglob("*.py")
    }
    room = {name: ".".join(name.split(".")[:2]) for name in files}
    imports: dict[str, set[str]] = {own: set() for own in room.values()}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys() or {node.module}
                imports[room[name]] |= {room[other] for other in found & files.keys()} - {room[name]}
    floor: dict[str, int] = {}

    def floor_of(own: str) -> int:
        if own not in floor:
            floor[own] = 1 + max(map(floor_of, imports[own]), default=0)
        return floor[own]

    return {str(path): floor_of(room[name]) for name, path in files.items()}


def way(kind: str) -> list[str]:
    """The files that one kind of value enters, in order, from ``dicer.prune`` on a tiny model's folder."""
    import dicer

    entered: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(SOURCE)) and not frame.f_code.co_name.startswith("<"):
            count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
            values = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:count]]
            followed = any(c.__name__ in FOLLOWED[kind] for value in values for c in type(value).__mro__)
            if followed and entered[-1:] != [file]:
                entered.append(file)

    with tempfile.TemporaryDirectory() as scratch:
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny import save_tiny

        model = save_tiny(Path(scratch) / "model")
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n')
        recipe = dicer.Recipe(method="rc-a", layers="1-2", calib=str(rows))
        sys.setprofile(watch)
        try:
            dicer.prune(model, recipe, output=Path(scratch) / "out")
        finally:
            sys.setprofile(None)
    return entered


def main() -> None:
    """Print the way of both, and what it comes to."""
    sys.path.insert(0, str(SOURCE))
    floor = floors()
    for kind in FOLLOWED:
        entered = way(kind)
        steps = dict.fromkeys(itertools.pairwise(entered))
        climbs = sum(floor[b] > floor[a] for a, b in steps)
        names = dict.fromkeys(Path(file).relative_to(SOURCE / "dicer").with_suffix("").as_posix() for file in entered)
        print(f"{kind}: {len(names)} files, {len(steps)} different steps, {climbs} of them climb")
        print("  " + " > ".join(names))


if __name__ == "__main__":
    main()
