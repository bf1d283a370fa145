"""SECURITY.md: every line has a test that is there; what no code of strangers can do, seen in the source itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from texts import jsonl
from tiny import save_tiny

import dicer
from dicer.ask.evaluation import Evaluation
from dicer.ask.recipe import Recipe
from dicer.ask.spelling import FIELDS

ROOT = Path(__file__).parents[1]
SOURCE = Path(dicer.__file__).parent
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROMISES = [line for part in PAGE.split("\n## ")[2:-1] for line in re.split(r"\n- ", part)[1:]]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text("utf-8")) for path in SOURCE.rglob("*.py")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_named_tests(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_line_has_one():
    assert len(PROMISES) > 30
    assert [line for line in PROMISES if not re.search(r"`tests/[\w/]+\.py::\w+`", line)] == []
    assert len(NAMED) == PAGE.count("::")


def test_code_of_others_is_never_trusted():
    """In dicer's own process; what runs in another one was seen to be dicer's own code before."""
    trusted = []
    for file, tree in TREES.items():
        pairs = [(word.arg, word.value) for word in ast.walk(tree) if isinstance(word, ast.keyword)]
        for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
            pairs += [(key.value, v) for key, v in zip(table.keys, table.values, strict=True) if hasattr(key, "value")]
        values = [value for name, value in pairs if name == "trust_remote_code"]
        trusted += [file for value in values if not (isinstance(value, ast.Constant) and value.value is False)]
    assert sorted(trusted) == ["write/verify/by_transformers.py", "write/verify/by_vllm.py"]


def test_nothing_that_runs_what_it_reads():
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [(file, name) for name in names if name in ("pickle", "marshal", "shelve", "dill", "yaml")]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                found += [(file, called)] if called in ("eval", "exec", "compile", "torch.load", "os.system") else []
                found += [(file, "shell") for word in node.keywords if word.arg == "shell"]
                # One place runs a file that the user named.
                found += [(file, called)] if called.endswith("exec_module") else []
    assert found == [("measure/parts.py", "spec.loader.exec_module")]


def test_plan_runs_no_code(model, tmp_path):
    ran = tmp_path / "ran"
    code = (
        "import pathlib\n"
        "from dicer.measure.criteria import criterion\n"
        f"pathlib.Path({str(ran)!r}).touch()\n"
        "@criterion(needs=())\n"
        "def score(layer, sums):\n    return layer.weight('down').norm(dim=0)\n"
    )
    (tmp_path / "own.py").write_text(code)
    plan = dicer.make_plan(model, Recipe(method="weight-l2"))
    plan.recipe["criterion"] = f"{tmp_path / 'own.py'}:score"
    plan.save(tmp_path / "plan")
    assert "own.py:score" in (tmp_path / "plan" / "dicer_plan.json").read_text()
    dicer.apply_plan(tmp_path / "plan", model, tmp_path / "out")
    assert not ran.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ messages.append.__self__.__class__.__base__ }}",
    ],
)
def test_chat_template_in_its_sandbox(refused, tmp_path, template):
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    text = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "Hi " * 200}]}] * 4)
    said = refused("prune", model, "-o", tmp_path / "out", "--calib", text, "--seq-len", 8)
    assert "the model's chat template refuses it" in said


def test_recipe_names_no_output():
    """What can be written into a recipe or an experiment: nothing that says where something is to be made."""
    files = {name for name in [*FIELDS, *Evaluation.model_fields] if re.search(r"out|path|file|save|folder|dir", name)}
    assert files == {"entropy_profile", "include_path"}  # both are read
