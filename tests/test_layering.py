"""A module imports only from lower rows of the design's table, sideways only where the table says so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dicer

SOURCE = Path(dicer.__file__).parent

# Row -> module -> what it may import of dicer. Departures from the design's first sketch: layer_statistics and sources
# read families (gradients have the form of the weights, and a model is checked against its row); surgery raises errors;
# evaluate borrows walk's switch to eval mode; scoring is the part of the pipeline that
# decides; pipeline also measures, writes the card and carries the model file along.
LOW = {
    "errors",
    "presets",
    "recipe",
    "axes",
    "families",
    "layer_statistics",
    "checkpoint",
    "sources",
    "calibration",
    "criteria",
}
LOW |= {"machine", "sink", "grouping", "merging", "plan", "profile", "moments", "stores", "walk", "forms", "surgery"}
LOW |= {"entropy", "model_files"}  # all of L0 to L2
CRITERION = {"criteria.registry", "axes", "layer_statistics"}
TABLE = {
    0: {
        "errors": set(),
        "recipe": {"errors", "presets"},
        "axes": {"errors"},
        "presets": set(),
        "families": {"errors", "axes"},
        "protocols": {"errors", "recipe"},
        "distributed": set(),
        "paper": set(),
    },
    1: {
        "layer_statistics": {"errors", "axes", "distributed"},
        "checkpoint": {"errors"},
        "sink": {"errors", "checkpoint"},
        "model_files": {"errors", "families"},
        "sources": {"errors", "families", "checkpoint", "model_files"},
        "calibration": {"errors", "recipe"},
        "criteria.registry": {"errors", "axes", "layer_statistics"},
        "criteria.activation": CRITERION,
        "criteria.output": CRITERION,
        "criteria.random": CRITERION,
        "criteria.taylor": CRITERION,
        "criteria.weight": CRITERION,
        "criteria": {f"criteria.{name}" for name in ("activation", "output", "random", "registry", "taylor", "weight")},
        "machine": {"errors"},
        "profile": {"errors"},
        "moments": {"distributed"},
        "grouping": {"errors"},
        "merging": {"errors"},
        "plan": {"errors", "axes", "recipe"},
        "allocation": {"errors", "axes"},
        "ratios": {"errors", "allocation"},
        "ranking": {"errors", "axes", "allocation"},
        "record_form": set(),
        "records": {"errors", "record_form"},
        "measured": {"paper"},
        "grid": {"errors", "presets", "protocols", "recipe"},
    },
    2: {
        "stores": {"axes", "distributed", "families"},
        "walk": {"axes", "layer_statistics", "stores"},
        "forms": {"axes", "families", "sources"},
        "surgery": {"errors", "axes", "families", "forms", "checkpoint", "plan", "sources"},
        "entropy": {"errors", "axes", "distributed", "layer_statistics", "moments", "profile", "stores"},
    },
    3: {
        "entropy_cache": LOW | {"distributed"},
        "budget": {"presets", "profile", "allocation", "ranking", "ratios", "errors", "recipe", "sources", "surgery"},
        "job": LOW | {"budget"},
        "scoring": LOW | {"budget", "distributed", "entropy_cache", "job"},
        "passes": LOW | {"distributed", "job", "scoring"},
        "run_record": {"distributed", "passes", "plan", "records", "surgery"},
        "experiment": LOW | {"distributed", "grid", "job", "passes", "pipeline", "protocols", "records", "run_record"},
        "tables": {"measured", "paper"},
        "plot_style": {"errors", "tables"},
        "plots_layers": {"records", "plot_style"},
        "plots": {"measured", "paper", "tables", "plot_style", "plots_layers"},
        "report": {"errors", "measured", "paper", "records", "tables", "plot_style", "plots"},
        "templates": set(),
        "facts": {"job", "recipe", "sources", "surgery"},
        "card": {"axes", "plan", "surgery"},
        "harness": {"errors"},
        "evaluate": {"errors", "protocols", "calibration", "harness", "sources", "stores"},
        "speed": {"errors", "machine", "stores"},
        "export": set(),
        "export.modeling_pruned": set(),  # lies in the written folder, where there is no dicer
        "export.registration": {"families", "export", "export.modeling_pruned"},
        "pipeline": LOW | {"job", "scoring", "card", "evaluate", "export", "export.modeling_pruned"},
    },
    4: {
        "terminal": {"errors", "records"},
        "recipe_flags": {"recipe"},
        "cli_entropy": LOW | {"entropy_cache", "job", "recipe_flags", "terminal"},
        "cli_measure": {"errors", "evaluate", "machine", "protocols", "sources", "speed", "terminal"},
        "cli_experiments": {"evaluate", "experiment", "grid", "report", "terminal"},
        "cli": LOW
        | {"card", "facts", "job", "pipeline", "cli_entropy", "cli_experiments", "cli_measure"}
        | {"recipe_flags", "terminal"},
        "__init__": LOW | {"evaluate", "harness", "pipeline", "protocols", "speed"},
    },
}
ALLOWED = {module: allowed for row in TABLE.values() for module, allowed in row.items()}
ROW = {module: row for row, modules in TABLE.items() for module in modules}
SIDEWAYS = {  # packages whole
    ("families", "axes"),
    ("surgery", "forms"),
    ("ratios", "allocation"),
    ("records", "record_form"),
    ("sources", "model_files"),
    ("ranking", "allocation"),
    ("scoring", "budget"),
    ("scoring", "job"),
    ("job", "budget"),
    ("walk", "stores"),
    ("passes", "job"),
    ("pipeline", "job"),
    ("experiment", "job"),
    ("scoring", "entropy_cache"),
    ("axes", "errors"),
    ("recipe", "presets"),
    ("recipe", "errors"),
    ("protocols", "errors"),
    ("protocols", "recipe"),
    ("evaluate", "harness"),
    ("cli_measure", "terminal"),
    ("cli_entropy", "recipe_flags"),
    ("cli_entropy", "terminal"),
    ("entropy", "stores"),
    ("cli", "cli_measure"),
    ("cli", "cli_entropy"),
    ("cli", "cli_experiments"),
    ("cli", "recipe_flags"),
    ("cli_experiments", "terminal"),
    ("passes", "scoring"),
    ("run_record", "passes"),
    ("experiment", "passes"),
    ("experiment", "pipeline"),
    ("experiment", "run_record"),
    ("plot_style", "tables"),
    ("plots_layers", "plot_style"),
    ("plots", "tables"),
    ("plots", "plot_style"),
    ("plots", "plots_layers"),
    ("report", "tables"),
    ("report", "plot_style"),
    ("report", "plots"),
    ("cli", "terminal"),
    ("families", "errors"),
    ("criteria", "layer_statistics"),
    ("sources", "checkpoint"),
    ("sink", "checkpoint"),
    ("calibration", "recipe"),
    ("plan", "recipe"),
    ("facts", "job"),
    ("pipeline", "scoring"),
    ("pipeline", "card"),
    ("pipeline", "evaluate"),
    ("pipeline", "export"),
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


def dicer_imports(tree):
    return {name.removeprefix("dicer.") for name in imports_of(tree) if name.split(".")[0] == "dicer"}


def top_level(tree):
    """The statements that run at import time."""
    return ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)], [])


@every_module
def test_a_module_imports_only_what_the_table_allows(module):
    assert module in ALLOWED, "a new module needs a row in the table"
    imported = dicer_imports(MODULES[module]) - (
        {"dicer"} if module in ("cli", "cli_entropy", "cli_measure") else set()
    )
    assert imported <= ALLOWED[module], f"not in the table: {sorted(imported - ALLOWED[module])}"


def test_the_table_has_no_module_that_is_gone():
    assert ALLOWED.keys() <= MODULES.keys()
    assert set().union(*ALLOWED.values()) <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_the_table_itself_points_downwards(module):
    for imported in ALLOWED[module]:
        packages = module.split(".")[0], imported.split(".")[0]
        sideways = packages in SIDEWAYS or packages[0] == packages[1]
        assert ROW[imported] < ROW[module] or (ROW[imported] == ROW[module] and sideways), (module, imported)


def test_no_two_modules_import_each_other_by_any_way_round():
    done, waiting = set(), {module: dicer_imports(tree) - {"dicer", module} for module, tree in MODULES.items()}
    while ready := {module for module, needs in waiting.items() if needs <= done}:
        done |= ready
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert waiting == {}


@every_module
def test_only_the_command_line_prints_or_ends_the_process(module):
    if module in ("cli", "cli_entropy", "cli_experiments", "cli_measure", "recipe_flags", "terminal"):
        return
    names = {ast.unparse(node.func) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)}
    assert not names & {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    assert not {name.split(".")[0] for name in imports_of(MODULES[module])} & {"typer", "rich", "logging", "warnings"}


@every_module
def test_transformers_is_imported_where_it_is_used_and_not_before(module):
    """It takes seconds; only the files that subclass or register its classes are imported after it anyway."""
    at_once = {name.split(".")[0] for name in imports_of(top_level(MODULES[module]))}
    assert ("transformers" in at_once) == (module in ("export.modeling_pruned", "export.registration"))
    assert not {"datasets", "lm_eval", "accelerate"} & at_once


def test_the_model_file_needs_only_transformers_and_torch():
    outside = {name.split(".")[0] for name in imports_of(MODULES["export.modeling_pruned"])} - sys.stdlib_module_names
    assert outside <= {"transformers", "torch"}


def test_every_public_name_is_in_the_module_that_is_said_to_hold_it():
    for name in dicer.__all__:
        assert getattr(dicer, name) is not None
    with pytest.raises(AttributeError, match="module 'dicer' has no attribute 'prunes'"):
        _ = dicer.prunes


IMPORTS = """
import json, sys
import dicer, dicer.cli
heavy = [name for name in ("torch", "transformers", "numpy", "scipy") if name in sys.modules]
import transformers
config = transformers.AutoConfig.for_model("pruned_llama")
print(json.dumps([heavy, type(config).__module__]))
"""


def test_importing_dicer_is_cheap_and_teaches_transformers_as_soon_as_it_comes():
    process = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == [[], "dicer.export.modeling_pruned"]
