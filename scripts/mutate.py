"""Break the library on purpose, one thing at a time, and see that a test falls for each (``make mutants``).

Each row of the table replaces one text, which must stand exactly once in its file, in a copy of the tree, and runs the
tests that should notice. At the end the tests that fell run once more on the whole library: there they must pass.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_COPIED = ("src", "tests", "docs", "examples", "experiments", "scripts", "pyproject.toml", "README.md")


class Mutation(NamedTuple):
    """One thing that is broken.

    Attributes:
        what: in a few words.
        file: below ``src/dicer``.
        old: what stands there; once.
        new: what is put there instead.
        tests: below ``tests``, with options for pytest; what should notice.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str


_CONTRACT = "contract/test_contract.py"
MUTATIONS = (
    Mutation(
        "a unit's rows begin one too late",
        *("model/units.py", "+ torch.arange(block)).reshape(-1))", "+ torch.arange(1, block + 1)).reshape(-1))"),
        "model/test_units.py",
    ),
    Mutation(
        "a fused tensor's second segment begins too early",
        *("model/units.py", "start += count * block", "start += count"),
        f"{_CONTRACT} -k cut_equals",
    ),
    Mutation(
        "output-l2 sums over the units, not over the hidden size",
        *("measure/criteria/output.py", "square_sums(weights.down, 0)", "square_sums(weights.down, 1)[0]"),
        "measure/test_criteria.py",
    ),
    Mutation(
        "old buffers and tied copies stay in the files",
        *("model/structure/account.py", "leave_out([*ahead, *old])", "leave_out(ahead)"),
        "contract/test_on_disk.py",
    ),
    Mutation(
        "a layer behind one that goes keeps its number",
        *("write/surgery.py", "target = family.renumbered(name, new)", "target = name"),
        f"{_CONTRACT} -k cut_equals",
    ),
    Mutation(
        "sums of the last batch alone",
        *("measure/statistics.py", "self._totals.get(need, 0.0) + batch.to(", "batch.to("),
        f"{_CONTRACT} -k statistics",
    ),
    Mutation(
        "the first groups keep no unit more",
        *("decide/merging.py", " + (np.arange(len(sizes)) < keep % len(sizes))", ""),
        "decide",
    ),
    Mutation(
        "one cluster too many",
        *("decide/grouping.py", "tree[: units - groups, :2]", "tree[: units - groups - 1, :2]"),
        "decide",
    ),
    Mutation(
        "the means of what stays are compensated too",
        *("decide/layer_plan.py", "lost[self.rows(len(lost) // self.units)] = 0.0", "pass"),
        "write/test_compensation.py",
    ),
    Mutation(
        "what is copied begins a byte later",
        *("model/tensors.py", "8 + length + start for", "9 + length + start for"),
        "write/test_tensor_file.py",
    ),
    Mutation(
        "outputs are merged as inputs are",
        *("write/surgery.py", "matrices[1] if piece.is_output else matrices[0]", "matrices[0]"),
        "decide/test_merging.py",
    ),
    Mutation(
        "every layer is called as the first one is",
        *("measure/walk.py", "recording.arguments_of(hidden)[index]", "recording.arguments_of(hidden)[0]"),
        f"{_CONTRACT} -k statistics",
    ),
    Mutation(
        "a plan is applied to any weights",
        *("decide/plan.py", 'if self.model["fingerprint"] != fingerprint:', "if False:"),
        "decide/test_plan.py",
    ),
    Mutation(
        "the index is there before the shards are",
        *(
            "write/sink.py",
            "        done, one_by_one, stop =",
            "        _ = len(shards) > 1 and self.write_json(INDEX, {})\n        done, one_by_one, stop =",
        ),
        "write/test_sink.py",
    ),
    Mutation(
        "what is made is made under its final name",
        *("holds.py", "self.new = self.folder / _NEW", "self.new = self.path"),
        "test_holds.py -k what_is_made",
    ),
    Mutation(
        "pipes and devices are read like files",
        *("reading.py", "if not stat.S_ISREG(found.st_mode):", "if False:"),
        "test_reading.py -k no_plain_file",
    ),
    Mutation(
        "links lead out of a model folder",
        *("model/beside.py", "return not any(path.resolve()", "return False and any(path.resolve()"),
        "write/test_side_files.py -k links",
    ),
    Mutation(
        "attention that is gone counts no tokens in the cache",
        *("write/export/modeling_pruned.py", "past_key_values.update(count, count, self.layer_idx)", "pass"),
        f"{_CONTRACT} -k cache",
    ),
    Mutation(
        "one ranking of raw scores",
        *(
            "decide/amounts/by_rank.py",
            "    return standard(values)",
            "    return values",
        ),
        "decide/test_amounts.py",
    ),
)


def break_it(tree: Path, mutation: Mutation) -> str:
    """Put the new text in place of the old; the file's own text, to be put back.

    Raises:
        SystemExit: the old text does not stand there exactly once, so the table is out of date.
    """
    file = tree / "src" / "dicer" / mutation.file
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text.count(mutation.old) != 1:
        sys.exit(
            f"{mutation.what}: {mutation.file} has {mutation.old!r} {text.count(mutation.old)} times; mend the table"
        )
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return text


def failing(tree: Path, tests: list[str]) -> tuple[str, float]:
    """The first test that fails, or nothing, and the seconds until then."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    fell = re.search(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - |$)", done.stdout, flags=re.MULTILINE)
    if done.returncode and not fell:
        sys.exit(f"pytest says nothing that can be read:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return (fell[1] if fell else "", time.perf_counter() - start)


def main() -> int:
    """Print mutation, test, seconds; 1 where one survived, or where its test does not pass without it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations with one of these words in what they are")
    asked = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not asked or any(word in m.what for word in asked)]
    survived, fallen = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        for mutation in MUTATIONS:  # all, so that none of the table is out of date
            (tree / "src" / "dicer" / mutation.file).write_text(break_it(tree, mutation), encoding="utf-8")
        for mutation in chosen:
            text = break_it(tree, mutation)
            first, *options = mutation.tests.split(" -k ")
            tests = [*(f"tests/{name}" for name in first.split()), *(f"-k{option}" for option in options)]
            fell, seconds = failing(tree, tests)
            (tree / "src" / "dicer" / mutation.file).write_text(text, encoding="utf-8")
            survived += not fell
            fallen += [fell] if fell else []
            print(f"| {mutation.what} | {fell.removeprefix('tests/') or 'NONE'} | {seconds:.0f} |", flush=True)
        wrong, _ = failing(tree, sorted(set(fallen))) if fallen else ("", 0.0)
    print(
        f"{len(chosen) - survived} of {len(chosen)} were seen"
        + f"; but {wrong} fails on the whole library" * bool(wrong)
    )
    return 1 if survived or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
