"""Good files of every kind that dicer reads, and the commands that read them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import recorded
from reading import know_tiny_tokenizer, save_stock
from tiny import save_tiny, tiny_tokens

from dicer.cli.main import main
from dicer.decide.kept import Kept
from fuzz.mutators import Mutator, as_bytes, as_header, as_json, as_lines, as_start, as_toml, as_zip

QUICK = ("--method", "weight-l2", "--layers", "1-2")
SMALL = ("--samples", "2", "--seq-len", "16")

RECIPE = """\
method = "rc-a"
axis = "mlp"
ratio = 0.25
allocate = "uniform"
layers = "0-2"
seed = 3
calib = "texts.jsonl"
samples = 2
seq_len = 16
min_width = 2
"""
EXPERIMENT = """\
models = ["model"]
methods = ["random", { method = "weight-l2", layers = "1-2" }]
ratios = [0.25, 0.5]
seeds = [1]
calib = ["texts.jsonl"]
samples = [2]

[recipe]
seq_len = 16

[evaluation]
perplexity = "texts.jsonl"
window = 16
windows = 1
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file: one of the good ones, how it is damaged, and what then reads it.

    Attributes:
        file: the one that is damaged.
        needs: what else a command reads.
        mutators: of which one is chosen.
        commands: of which one is chosen; what they write begins with ``out``.
    """

    file: str
    needs: tuple[str, ...]
    mutators: tuple[Mutator, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def parts(self) -> list[str]:
        """Files and folders to be there."""
        return list(dict.fromkeys(name.partition("/")[0] for name in (self.file, *self.needs)))


INFO, PLAN, PRUNE = (
    ("info", "model"),
    ("plan", "model", "-o", "out", *QUICK),
    ("prune", "model", "-o", "out", *QUICK),
)
CALIBRATED = ("plan", "model", "-o", "out", "--calib", "texts.jsonl", *SMALL)
RESUME = ("prune", "model", "-o", "out", "--calib", "texts.jsonl", *SMALL, "--resume")
APPLY = ("apply", "plan", "model", "-o", "out")
DIFF = ("diff", "plan", "plan")
RATIOS = ("plan", "model", "-o", "out", "--method", "weight-l2", "--allocate")

KINDS = {
    "config": Kind("model/config.json", (), (as_json, as_json, as_bytes), (INFO, PRUNE, PRUNE)),
    "config of experts": Kind(
        "experts/config.json", (), (as_json,), (("info", "experts"), ("prune", "experts", "-o", "out", *QUICK))
    ),
    "header": Kind("model/model.safetensors", (), (as_header, as_header, as_start), (INFO, PLAN, PRUNE)),
    "weights": Kind("model/model.safetensors", ("texts.jsonl",), (as_bytes,), (PRUNE, CALIBRATED)),
    "index": Kind(
        "shards/model.safetensors.index.json",
        (),
        (as_json, as_bytes),
        (("info", "shards"), ("prune", "shards", "-o", "out", *QUICK)),
    ),
    "tokenizer": Kind("model/tokenizer.json", ("texts.jsonl",), (as_json, as_json, as_bytes), (CALIBRATED, PRUNE)),
    "tokenizer's config": Kind(
        "model/tokenizer_config.json", ("texts.jsonl",), (as_json, as_bytes), (CALIBRATED, PRUNE)
    ),
    "generation config": Kind("model/generation_config.json", (), (as_json, as_bytes), (PRUNE,)),
    "config of ours": Kind(
        "pruned/config.json",
        (),
        (as_json, as_json, as_bytes),
        (
            ("info", "pruned"),
            ("prune", "pruned", "-o", "out", *QUICK),
            ("export", "pruned", "--to", "stock", "-o", "out"),
            ("export", "pruned", "--to", "gguf", "-o", "out.gguf"),
        ),
    ),
    "plan": Kind("plan/dicer_plan.json", ("model",), (as_json, as_json, as_bytes), (APPLY, APPLY, DIFF)),
    "plan's tensors": Kind("plan/dicer_plan.tensors", ("model",), (as_header, as_bytes), (APPLY, DIFF)),
    "record": Kind(
        "results/model/rc-a/logs/record.json", (), (as_json, as_json, as_bytes), (("report", "results", "-o", "out"),)
    ),
    "packed records": Kind(
        "packed.jsonl.gz",
        (),
        (as_zip,),
        (("report", "packed.jsonl.gz", "-o", "out"), ("pack", "packed.jsonl.gz", "-o", "out")),
    ),
    "recipe": Kind(
        "recipe.toml",
        ("model", "texts.jsonl"),
        (as_toml, as_toml, as_bytes),
        (("plan", "model", "-o", "out", "--recipe", "recipe.toml"),),
    ),
    "experiment": Kind(
        "experiment.toml",
        ("model", "texts.jsonl"),
        (as_toml, as_toml, as_bytes),
        (("run", "experiment.toml", "-o", "out"), ("run", "experiment.toml", "-o", "out", "--no-code")),
    ),
    "texts": Kind("texts.jsonl", ("model",), (as_lines, as_bytes), (CALIBRATED,)),
    "packed texts": Kind(
        "texts.jsonl.gz", ("model",), (as_zip,), (("plan", "model", "-o", "out", "--calib", "texts.jsonl.gz", *SMALL),)
    ),
    "rows": Kind(
        "rows.jsonl", ("model",), (as_lines, as_bytes), (("plan", "model", "-o", "out", "--calib", "rows.jsonl"),)
    ),
    "plain text": Kind(
        "text.txt", ("model",), (as_bytes,), (("plan", "model", "-o", "out", "--calib", "./text.txt", *SMALL),)
    ),
    "GGUF": Kind(
        "model.gguf",
        (),
        (as_start, as_start, as_bytes),
        (("info", "model.gguf"), ("prune", "model.gguf", "-o", "out", *QUICK)),
    ),
    "ratios": Kind("ratios.json", ("model",), (as_json, as_bytes), ((*RATIOS, "ratios.json"),)),
    "profile": Kind(
        "profile.json",
        ("model",),
        (as_json, as_json, as_bytes),
        ((*RATIOS, "transfer-entropy", "--entropy-profile", "profile.json"),),
    ),
    "family": Kind(
        "family.toml",
        ("model",),
        (as_toml, as_toml, as_bytes),
        (
            ("info", "model", "--family", "family.toml"),
            ("prune", "model", "-o", "out", "--family", "family.toml", *QUICK),
        ),
    ),
    "stopped run": Kind("out.resume/run.json", ("model", "texts.jsonl"), (as_json, as_bytes), (RESUME,)),
    "stopped run's tensors": Kind(
        "out.resume/walk-1/hidden.safetensors", ("model", "texts.jsonl"), (as_header, as_bytes), (RESUME,)
    ),
    "plan in a checkpoint": Kind(
        "pruned/dicer_plan.json", (), (as_json,), (("info", "pruned"), ("prune", "pruned", "-o", "out", *QUICK))
    ),
}


def make_goods(folder: Path) -> None:
    """Write one of each into a folder, which must be the current one."""
    save_tiny(folder / "model")
    save_tiny(folder / "experts", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    save_tiny(folder / "shards", shards=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"The {n}th text " * 20}) + "\n" for n in range(8)))
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress((folder / "texts.jsonl").read_bytes()))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()))
    (folder / "text.txt").write_text("A plain text of some length. " * 100)
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "experiment.toml").write_text(EXPERIMENT)
    (folder / "ratios.json").write_text(json.dumps({"mlp": [0.1, 0.2, 0.3, 0.5]}))
    recorded.save([recorded.record("rc-a", 0.25), recorded.record("random", 0.5)], folder / "results")
    some = next((folder / "results").rglob("rc-a*.json"))
    (folder / "results" / "model" / "rc-a" / "logs").mkdir(parents=True)
    some.rename(folder / "results" / "model" / "rc-a" / "logs" / "record.json")
    save_stock(folder / "known")
    with pytest.MonkeyPatch.context() as patch:
        know_tiny_tokenizer(patch)
        _typed("export", "known", "--to", "gguf", "-o", "model.gguf")
    _typed(*PLAN[:2], "-o", "plan", *PLAN[4:])
    _typed("prune", "model", "-o", "pruned", "--method", "weight-l2", "--layers", "1-2", "--ratio", "0.3")
    _typed("entropy", "model", "-o", "profile.json", "--calib", "texts.jsonl", *SMALL)
    _typed("pack", "results", "-o", "packed.jsonl.gz")
    _typed("report", "results", "-o", "report")  # matplotlib is imported, and its list of fonts made, once for all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kept, "remove", lambda _: None)  # as a kill at the end leaves it
        _typed(*RESUME)
    (folder / "family.toml").write_text(_typed("info", "model", "--family-row"))


def _typed(*words: str) -> str:
    printed, refused = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(refused):
        code = main(words)
    assert code == 0, f"{words}: {refused.getvalue()}"
    return printed.getvalue()
