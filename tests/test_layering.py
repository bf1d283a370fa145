"""The way of a model through the folders, and who may look where (docs/architecture.md says why)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dicer

SOURCE = Path(dicer.__file__).parent

# Folder -> what it may import besides itself and the ground; "" is the door: pipeline and the public names.
GROUND = {"errors", "progress", "processes", "machine", "files"}
MAY = {
    "ask": (),
    "model": ("ask",),
    "measure": ("ask", "model"),
    "decide": ("ask", "model", "measure"),
    "evaluate": ("ask", "model", "measure"),
    "write": ("ask", "model", "decide.plan"),  # of what decides it sees the decision alone
    "": ("ask", "model", "measure", "decide", "evaluate", "write"),
    "study": ("", "ask", "model", "measure", "decide", "write"),
    "cli": ("", "ask", "model", "measure", "decide", "evaluate", "write", "study"),
}


def module_name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
every_module = pytest.mark.parametrize("module", sorted(MODULES))


def imports_of(tree):
    """Every module that is imported anywhere in a file, also inside functions and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if name.removeprefix("dicer.") in MODULES]
            yield from inner
            if len(inner) < len(names):
                yield str(node.module)


def dicer_imports(module):
    found = {name.removeprefix("dicer.") for name in imports_of(MODULES[module]) if name.split(".")[0] == "dicer"}
    return found - {"dicer", module}


def folder_of(module):
    return module.split(".")[0] if "." in module or module in MAY else ""


def arrows():
    """(folder, what it imports of another folder, by the name that MAY has for it): all that is not the ground."""
    for module in MODULES:
        for imported in dicer_imports(module) - GROUND:
            here, there = folder_of(module), folder_of(imported)
            if here != there and module not in ("__main__", "cli.__main__"):
                yield here, imported if imported in MAY[here] else there, module


def test_a_folder_imports_only_from_those_that_it_may():
    assert [a for a in arrows() if a[1] not in MAY[a[0]]] == []
    assert {name for module in GROUND & MODULES.keys() for name in dicer_imports(module)} <= GROUND


def test_no_permission_is_unused():
    used = {(here, there) for here, there, _ in arrows()}
    assert {(here, there) for here, may in MAY.items() for there in may} - used == set()


def test_drawing_of_the_architecture():
    """docs/architecture.md draws each arrow between folders that does not follow from others, and no false one."""
    lines = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    drawn = {(line.split()[0], line.split()[-1]) for line in lines if "-->" in line}
    real = {(here or "pipeline", there.split(".")[0] or "pipeline") for here, there, _ in arrows()}
    direct = {(a, b) for a, b in real if not any((a, c) in real and (c, b) in real for c in {x for _, x in real} - {b})}
    assert direct <= drawn <= real


def test_no_two_modules_import_each_other_by_any_way_round():
    done, waiting = set(), {module: dicer_imports(module) for module in MODULES}
    while ready := {module for module, needs in waiting.items() if needs <= done}:
        done |= ready
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert waiting == {}


@every_module
def test_only_the_command_line_prints_or_ends_the_process(module):
    if module.split(".")[0] == "cli":
        return
    names = {ast.unparse(node.func) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)}
    assert not names & {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    speaks = {"typer", "rich", "logging"} | ({"warnings"} if module != "ask.recipe" else set())  # of an old spelling
    assert not {name.split(".")[0] for name in imports_of(MODULES[module])} & speaks


def top_level(tree):
    """The statements that run at import time."""
    return ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)], [])


@every_module
def test_transformers_is_imported_where_it_is_used_and_not_before(module):
    """It takes seconds; only the files that subclass or register its classes are imported after it anyway."""
    at_once = {name.split(".")[0] for name in imports_of(top_level(MODULES[module]))}
    subclasses = {"write.export", "write.export.modeling_pruned", "write.export.registration"}
    assert ("transformers" in at_once) == (module in subclasses)
    assert not {"datasets", "lm_eval", "accelerate", "ray"} & at_once


def test_the_model_file_needs_only_transformers_and_torch():
    assert dicer_imports("write.export.modeling_pruned") == set()
    outside = {name.split(".")[0] for name in imports_of(MODULES["write.export.modeling_pruned"])}
    assert outside - sys.stdlib_module_names <= {"transformers", "torch"}


def names_of(node):
    return {alias.asname for line in node.body for alias in line.names}


def test_every_public_name_is_in_the_module_that_is_said_to_hold_it():
    for name in dicer.__all__:
        assert getattr(dicer, name) is not None
    for_checkers = {name for node in MODULES["__init__"].body if isinstance(node, ast.If) for name in names_of(node)}
    assert for_checkers == set(dicer.__all__)
    with pytest.raises(AttributeError, match="module 'dicer' has no attribute 'prunes'"):
        _ = dicer.prunes


IMPORTS = """
import json, sys
import dicer, dicer.cli.main
heavy = [name for name in ("torch", "transformers", "numpy", "scipy") if name in sys.modules]
import transformers
config = transformers.AutoConfig.for_model("pruned_llama")
print(json.dumps([heavy, type(config).__module__]))
"""


def test_importing_dicer_is_cheap_and_teaches_transformers_as_soon_as_it_comes():
    process = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == [[], "dicer.write.export.modeling_pruned"]
