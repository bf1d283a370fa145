"""Family files: the printed row, what is not found and said by one, and files that are wrong."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dicer.decide.plan import load_plan
from dicer.errors import UnknownFamily
from dicer.model.structure import find
from families.independent import masked_logits
from families.test_whole import Command, Pruned, Refused, held, words_for, written
from families.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_family_file(refused: Refused, command: Command, tmp_path: Path) -> None:
    """The printed row is a file that is taken; with a tensor that is not there it is refused."""
    model, file = tmp_path / "model", tmp_path / "family.toml"
    tiny_model("granite").save_pretrained(model)
    row = command("info", model, "--family-row").out
    file.write_text(row)
    held([written(command, "granite", model, tmp_path / "out", *words_for("N", ""), "--family", file)])
    file.write_text(re.sub(r"mlp\.up_proj\.weight", "mlp.upper.weight", row))
    shutil.rmtree(tmp_path / "out")
    says = (file.name, "mlp.upper.weight", "axis 'mlp'")
    refused("prune", model, *words_for("N", ""), "--family", file, "-o", tmp_path / "out", says=says)


def test_family_file_of_other_rows(refused: Refused, command: Command, tmp_path: Path) -> None:
    """A file that is wrong, and fits the shapes: the norm's scale called a part of the neurons of another width."""
    model, file = tmp_path / "model", tmp_path / "family.toml"
    tiny_model("starcoder2").save_pretrained(model)
    row = command("info", model, "--family-row").out
    wrong = "\n".join(line for line in row.splitlines() if "c_fc.bias" not in line)
    assert wrong != row.rstrip("\n")
    file.write_text(wrong)
    refused("prune", model, *words_for("N", ""), "--family", file, "-o", tmp_path / "out", says=("mlp",))


def test_family_file_of_what_is_not_found(
    command: Command, calib: str, own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that no key changes, and layers that follow none: the file holds for the twin and what is written, too."""
    opt, smollm3 = (tmp_path / name for name in ("opt", "smollm3"))
    tiny_model("opt").save_pretrained(opt)
    tiny_model("smollm3").save_pretrained(smollm3)
    own = importlib.resources.files("dicer.model.structure").joinpath("exceptions", "opt.toml")
    heads, layers = tmp_path / "heads.toml", tmp_path / "layers.toml"
    heads.write_text(own.read_text(encoding="utf-8"))
    layers.write_text(command("info", smollm3, "--family-row").out)
    monkeypatch.setattr(find, "exception_for", lambda model_type: None)
    assert command("prune", opt, *words_for("K", ""), "-o", tmp_path / "out").code == 2
    runs = [written(command, "opt", opt, tmp_path / "opt_out", *words_for("K", ""), "--family", heads)]

    plan, out = tmp_path / "plan", tmp_path / "applied"
    assert command("plan", opt, *words_for("K", ""), "--family", heads, "-o", plan).code == 0
    assert command("apply", plan, opt, "-o", out).code == 2
    assert command("apply", plan, opt, "-o", out, "--family", heads).code == 0
    runs.append(Pruned("applied", "opt", out, masked_logits("opt", opt, out, load_plan(out))))

    def none_found(*_: Any) -> None:
        raise UnknownFamily("no list of decoder layers is found.")

    monkeypatch.setattr(find, "find_layers", none_found)
    assert command("prune", smollm3, *words_for("B", calib), "-o", tmp_path / "out").code == 2
    for letter in "NB":
        out, words = tmp_path / f"smollm3_{letter}", (*words_for(letter, calib), "--family", layers)
        runs.append(written(command, "smollm3", smollm3, out, *words))
    held(runs)


def test_family_file_with_a_key_that_is_not_there(refused: Refused, command: Command, tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / "family.toml"
    tiny_model("granite").save_pretrained(model)
    row = command("info", model, "--family-row").out
    file.write_text(row.replace('layers_key = "num_hidden_layers"', 'layers_key = "num_hiden_layers"'))
    says = (file.name, "layers_key", "num_hiden_layers", "Did you mean 'num_hidden_layers'?")
    refused("prune", model, *words_for("N", ""), "--family", file, "-o", tmp_path / "out", says=says)
