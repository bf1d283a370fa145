"""What each recipe loses at the same size, beside the criteria of its peers: perplexity and KL to the dense model.

    python benchmarks/quality.py --model DIR --device cuda --json quality.json [--parts main,ablation] [--seconds 330]
    python benchmarks/quality.py --only "obs solved,flap" --layers 5-28 --ratios 0.25 --sizes 10x128 --draws 1

Calibration is windows of wikitext2's train text, as token ids; the loss is measured on 8 windows of 1,024 tokens of its
test text, raw, and on as many of another domain (a book), all under $DICER_DATA. ``kl`` is the mean over tokens of
KL(dense || pruned) over the whole vocabulary. Every run stands by itself: what the JSON file has is not run again, and
after ``--seconds`` none is begun, so that a long list is done in several calls.

Needs dicer's source on PYTHONPATH, torch, transformers, safetensors, numpy, and pydantic;
without scipy everything but clustering runs.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

try:
    import scipy  # noqa: F401
except ImportError:  # stand-ins for what the recipes below read of it
    _stats: Any = types.ModuleType("scipy.stats")
    _stats.zscore = lambda values: (values - values.mean()) / values.std()
    _stats.rankdata = lambda values: np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1.0
    _modules: dict[str, Any] = {"scipy.stats": _stats}
    _names = {"scipy.cluster.hierarchy": "linkage", "scipy.sparse": "coo_array"}
    for _name, _attribute in {**_names, "scipy.sparse.csgraph": "connected_components"}.items():
        _modules[_name] = types.ModuleType(_name)
        setattr(_modules[_name], _attribute, None)
    sys.modules.update({"scipy": types.ModuleType("scipy"), "scipy.cluster": types.ModuleType("scipy.cluster")})
    sys.modules.update(_modules)

import dicer
from dicer.decide.decide import score
from dicer.decide.kept import Kept
from dicer.decide.plan import PrunePlan
from dicer.decide.task import prepare, with_text
from dicer.measure.batches import own_batches
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.turning import turning
from dicer.model.sizes import layer_parameters
from dicer.model.source import from_memory, open_model
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

SOLVED = {"repair": "least-squares"}
MOD = {"activation": "mod"}
RECIPES: dict[str, dict[str, Any]] = {
    # criteria of others, as they use them
    "weight-l2": {"criterion": "weight-l2"},
    "taylor": {"criterion": "taylor"},
    "optipfair-static": {"criterion": f"{__file__}:optipfair_static"},
    "optipfair-data": {"criterion": "cfsp"},
    "act-weight": {"criterion": "act-weight"},
    "flap": {"criterion": "fluctuation", "allocate": "global", "compensate": "bias"},
    "modegpt": {"criterion": "leverage", **SOLVED, "propagate": "dense", "ridge": 1e-4},
    "blocks": {},
    # the paper's
    "act-l2": {"criterion": "act-l2", **MOD},
    "rc-a": {"method": "rc-a"},
    "rc-a rolls": {"method": "rc-a", "rolls": 64},
    # one step after the other
    "output-l2": {"criterion": "output-l2"},
    "output-l2 propagated": {"criterion": "output-l2", "propagate": "pruned"},
    "output-l2 solved": {"criterion": "output-l2", **SOLVED},
    "rc-a solved": {"method": "rc-a", **SOLVED},
    "rc-a rolls solved": {"method": "rc-a", "rolls": 64, **SOLVED},
    "rc-a on output-l2 rolls solved": {"method": "rc-a", "criterion": "output-l2", "rolls": 64, **SOLVED},
    "rc-a 96 groups rolls solved": {"method": "rc-a", "groups": 96, "rolls": 64, **SOLVED},
    "rc-a on output-l2 96 groups rolls solved": {
        "method": "rc-a",
        "criterion": "output-l2",
        "groups": 96,
        "rolls": 64,
        **SOLVED,
    },
    "taylor solved": {"criterion": "taylor", **SOLVED},
    "leverage solved": {"criterion": "leverage", **SOLVED},
    "obs": {"criterion": "obs"},
    "obs propagated": {"criterion": "obs", "propagate": "pruned"},
    "obs solved": {"criterion": "obs", **SOLVED},
    "obs solved dense inputs": {"criterion": "obs", **SOLVED, "propagate": "dense"},
    "obs solved 1e-4": {"criterion": "obs", **SOLVED, "ridge": 1e-4},
    "obs solved 1e-3": {"criterion": "obs", **SOLVED, "ridge": 1e-3},
    "obs solved 1e-2": {"criterion": "obs", **SOLVED, "ridge": 1e-2},
    "obs solved 1e-1": {"criterion": "obs", **SOLVED, "ridge": 1e-1},
    "obs solved bias": {"criterion": "obs", **SOLVED, "compensate": "bias"},
    "obs solved target dense": {"criterion": "obs", **SOLVED, "target": "dense"},
    "obs solved cosine": {"criterion": "obs", **SOLVED, "allocate": "cosine"},
    "obs solved global": {"criterion": "obs", **SOLVED, "allocate": "global"},
    "obs solved cosine bias": {"criterion": "obs", **SOLVED, "allocate": "cosine", "compensate": "bias"},
    "obs solved, not the first": {"criterion": "obs", **SOLVED, "skip_first": 1},
    "obs solved 1e-1, not the first": {"criterion": "obs", **SOLVED, "ridge": 1e-1, "skip_first": 1},
    "obs solved 1e-1 cosine, not the first": {
        "criterion": "obs",
        **SOLVED,
        "ridge": 1e-1,
        "allocate": "cosine",
        "skip_first": 1,
    },
    "obs solved target dense, not the first": {"criterion": "obs", **SOLVED, "target": "dense", "skip_first": 1},
    "obs solved 1e-1 cosine target dense, not the first": {
        "criterion": "obs",
        **SOLVED,
        "ridge": 1e-1,
        "allocate": "cosine",
        "target": "dense",
        "skip_first": 1,
    },
    "best": {"method": "best"},
}
RECIPES |= {
    f"{name}, distilled": {**RECIPES[name], "distill": 1}
    for name in ("obs solved cosine", "obs solved 1e-1 cosine target dense, not the first")
}
_HEAD_LINES = 3279  # of the train text that train_head.txt has
NO_TEXT = ("weight-l2", "optipfair-static")
PEERS = ("taylor", "optipfair-static", "optipfair-data", "act-weight", "flap", "modegpt", "blocks")
OURS = (
    "rc-a",
    "rc-a rolls solved",
    "rc-a on output-l2 96 groups rolls solved",
    "output-l2 solved",
    "obs solved",
    "obs solved cosine",
    "obs solved, not the first",
    "obs solved 1e-1, not the first",
)


class Part(NamedTuple):
    """Settings that are run for each of some recipes."""

    names: tuple[str, ...]
    layers: tuple[str, ...]
    ratios: tuple[float, ...]
    sizes: tuple[str, ...]
    draws: int


PARTS = {
    "main": Part((*PEERS, *OURS), ("5-28",), (0.25, 0.5), ("32x512",), 3),
    "ablation": Part(tuple(RECIPES), ("5-28",), (0.25, 0.5), ("32x512",), 1),
    "sizes": Part((*PEERS, *OURS), ("5-28",), (0.25, 0.5), ("10x128", "128x512"), 1),
    "most": Part(OURS[2:], ("5-28",), (0.25, 0.5), ("256x512",), 1),
    "layers": Part((*PEERS, *OURS), ("all",), (0.25, 0.5), ("32x512",), 1),
}


@dicer.criterion("optipfair-static", source="optipfair 0.4.2, static mode (MAW)")
def optipfair_static(weights: Any, _: Any) -> Tensor:
    """Max + abs(min) of a neuron's row of the gate and of up, [U]."""
    parts = [part.float() for part in (weights.gate, weights.up) if part is not None]
    return sum(part.amax(1) + part.amin(1).abs() for part in parts)


class Bench:
    """The dense model, the texts that the loss is measured on, and what the dense model says of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        where = Path(options.model)
        source = open_model(where if where.is_dir() else options.model)
        self.model = source.load_model("float32", options.device)
        self.tokenizer = source.tokenizer()
        self.source = from_memory(self.model)
        half = self.model if options.dtype == "float32" else source.load_model(options.dtype, options.device)
        self.store = ResidentStore(half, self.source.family)  # what is decided on
        self.lesson, self.keep = options.lesson, options.keep
        self.device, self.dtype, self.windows = options.device, options.dtype, options.windows
        self.data = data = Path(options.data)
        name = options.other
        self.train = self._ids((data / "wikitext2" / "train_head.txt").read_text(encoding="utf-8"))
        texts = {"wikitext2": data / "wikitext2" / "test.txt"} | ({Path(name).stem: data / name} if name else {})
        self.texts = {name: self._text(path) for name, path in texts.items()}
        self.dense = {name: [_log_probs(self.model, w) for w in ids] for name, ids in self.texts.items()}

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)

    def _text(self, path: Path) -> Tensor:
        """[W, 1, 1024]: the text's rows joined by a blank line, as the papers do."""
        ids = self._ids("\n\n".join(path.read_text(encoding="utf-8")[: self.windows * 12_000].split("\n")))
        return ids[: self.windows * 1024].reshape(self.windows, 1, 1024).to(self.device)

    def rows(self, size: str, draw: int, path: Path) -> Path:
        """Ready calibration rows: windows side by side, in another order for every draw."""
        samples, length = map(int, size.split("x"))
        windows = self.train[: len(self.train) // length * length].reshape(-1, length)
        chosen = np.random.default_rng(draw).permutation(len(windows))[:samples]
        rows = [{"input_ids": windows[i].tolist()} for i in chosen]
        return _written(rows, path)

    def lesson_rows(self, folder: Path) -> Path:
        """Rows of 512 to learn from: those of 454x512 first, then windows of more of wikitext2 in a random order.

        What there is of the train text beyond its head has <unk> for rare words: sentences with one are left out.
        """
        head = [json.loads(line) for line in self.rows("454x512", 0, folder / "head.jsonl").open()]
        text = (self.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
        with gzip.open(self.data / "wikitext2" / "train.tokens.txt.gz", "rt", encoding="utf-8") as file:
            lines = [line.strip() for line in file.read().split("\n")[_HEAD_LINES:]]
        parts = [[line] if line.startswith("= ") else re.split(r"(?<= [.!?]) ", line) for line in lines]
        known = [" ".join(part for part in line if "<unk>" not in part) for line in parts]
        rest = "\n".join(f" {line} " for line in known if line)
        more = [row for ids in map(self._ids, (text, rest)) for row in ids[: len(ids) // 512 * 512].reshape(-1, 512)]
        order = torch.randperm(len(more), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [*head, *({"input_ids": more[i].tolist()} for i in order)]
        return _written(rows[: self.lesson], folder / "lesson.jsonl")

    def loss(self, model: Any) -> dict[str, float]:
        """Perplexity and mean KL(dense || pruned) on each text."""
        found = {}
        for name, windows in self.texts.items():
            surprise = divergence = 0.0
            for window, dense in zip(windows, self.dense[name], strict=True):
                mine = _log_probs(model, window)  # [T, V]
                surprise -= float(mine[:-1].gather(1, window[0, 1:, None]).double().mean())
                divergence += float((dense.exp() * (dense - mine)).sum(1).double().mean())
            found[f"{name} ppl"] = float(np.exp(surprise / len(windows)))
            found[f"{name} kl"] = divergence / len(windows)
        return found

    def run(self, name: str, layers: str, ratio: float, size: str, draw: int) -> dict[str, Any]:
        """One recipe: its loss, and the seconds that deciding took."""
        asked = dict(RECIPES[name])
        with tempfile.TemporaryDirectory() as folder:
            rows = self.rows(size, draw, Path(folder) / "rows.jsonl")
            start = time.perf_counter()
            if asked.get("distill") and self.lesson:
                asked["distill_calib"] = str(self.lesson_rows(Path(folder)))
            recipe = dicer.Recipe(calib=str(rows), layers=layers, ratio=ratio, seed=42 + draw, **asked)
            task = with_text(prepare(self.source, recipe, dicer.Compute(dtype=self.dtype, device=self.device)))
            place = re.sub(r"\W+", "-", f"{name} {layers} {ratio} {size} {draw} {self.lesson}")
            kept = Kept(self.keep / place, task) if self.keep and not task.needs_gradient else None
            plan = self._blocks(task) if name == "blocks" else score([task], self.store, kept=kept)[0]
            if kept is not None:
                kept.remove()
            seconds = time.perf_counter() - start
        pruned = build_model(plan_cut(self.source, plan), torch.float32, self.device)
        solved = [layer.repair.about for axis in plan.axes.values() for layer in axis.values() if layer.repair]
        about = {"ridges": [one["ridge"] for one in solved], "forms": sorted({one["form"] for one in solved})}
        size_after = sum(parameter.numel() for parameter in pruned.parameters())
        found = {**self.loss(pruned), "seconds": seconds, "parameters": size_after, "device": self.device}
        found |= {"dtype": self.dtype} if self.dtype != "float32" else {}
        found |= {"lesson": self.lesson} if "distill_calib" in asked else {}
        return {**found, **(about if solved else {})}

    def _blocks(self, task: Any) -> PrunePlan:
        """Whole layers, those that turn the hidden state least, to the nearest number of the same parameters."""
        turned = turning(self.store, max(task.layers), own_batches(task.calibration.tokens))
        sizes = layer_parameters(self.source.family, self.source.tensors.infos())
        count = round(task.budget.target / sizes[task.layers[0]])
        gone = sorted(sorted(task.layers, key=lambda layer: turned[layer])[: max(count, 1)])
        return replace(task.outline(), axes={}, blocks=tuple(gone))


def _written(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def _log_probs(model: Any, window: Tensor) -> Tensor:
    """[T, V], of a window [1, T]."""
    return model(window, use_cache=False).logits[0].float().log_softmax(-1)


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown: a table a setting, a row a recipe, mean and spread over the draws."""
    settings = dict.fromkeys((one["layers"], one["ratio"], one["size"]) for one in found)
    measured = [key for one in found[:1] for key in one if key.endswith((" ppl", " kl"))]
    keys = [key for key in measured if all(key in one for one in found)]  # of the texts that all were measured on
    lines = []
    for layers, ratio, size in settings:
        mine = [one for one in found if (one["layers"], one["ratio"], one["size"]) == (layers, ratio, size)]
        lines += [f"\nlayers {layers}, {ratio:.0%}, {size}\n", "| recipe | " + " | ".join(keys) + " | draws | s |"]
        lines.append("| --- |" + " --- |" * (len(keys) + 2))
        for name in dict.fromkeys(one["recipe"] for one in mine):
            own = [one for one in mine if one["recipe"] == name]
            cells = [_cell([one[key] for one in own], 3 if key.endswith("kl") else 2) for key in keys]
            cells += [str(len(own)), f"{statistics.median(one['seconds'] for one in own):.1f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


SHOWN = (
    *(*PEERS, "act-l2", "output-l2", "rc-a", "rc-a rolls", "rc-a solved", "rc-a rolls solved", "output-l2 solved"),
    *("rc-a on output-l2 96 groups rolls solved", "obs", "obs solved", "obs solved cosine"),
    *("obs solved target dense, not the first", "obs solved 1e-1 cosine, not the first"),
)


def figure(found: list[dict[str, Any]], path: Path, layers: str, size: str, device: str) -> None:
    """Seconds of deciding on one device against mean KL, one panel a ratio; bars span the draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [one for one in found if one.get("device", "cuda") == device]
    mine = [one for one in found if (one["layers"], one["size"]) == (layers, size) and one["seconds"] > 0.05]
    ratios = sorted({one["ratio"] for one in mine})
    drawing, panels = plt.subplots(1, len(ratios), figsize=(7 * len(ratios), 6), squeeze=False)
    key = next(key for key in mine[0] if key.endswith(" kl"))
    for panel, ratio in zip(panels[0], ratios, strict=True):
        for name in dict.fromkeys(one["recipe"] for one in mine):
            own = [one for one in mine if one["recipe"] == name and one["ratio"] == ratio]
            if not own or name not in SHOWN:
                continue
            losses = [one[key] for one in own]
            at = statistics.median(one["seconds"] for one in own), statistics.mean(losses)
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            colour = "tab:red" if name in PEERS else "tab:blue" if "solved" in name or name == "best" else "tab:gray"
            panel.errorbar(*at, yerr=spread, fmt="o", color=colour)
            panel.annotate(name, at, textcoords="offset points", xytext=(4, 3), fontsize=6)
        panel.set(xscale="log", yscale="log", xlabel="seconds to decide", ylabel=f"mean {key} in nats")
        panel.set_title(f"layers {layers}, {ratio:.0%} of their neurons, {size} tokens")
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)


def runs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that is asked for, each once."""
    parts = [PARTS[name] for name in options.parts.split(",")]
    only = tuple(name.strip() for name in options.only.split(";") if name.strip())
    if options.layers or options.ratios or options.sizes or options.draws:
        layers, sizes = (options.layers or "5-28").split(";"), (options.sizes or "32x512").split(",")
        ratios = tuple(map(float, (options.ratios or "0.25").split(",")))
        parts = [Part(only or tuple(RECIPES), tuple(layers), ratios, tuple(sizes), options.draws or 1)]
    every = [
        {"recipe": name, "layers": layers, "ratio": ratio, "size": size, "draw": draw}
        for part in parts
        for layers, ratio, size in itertools.product(part.layers, part.ratios, part.sizes)
        for name in part.names
        for draw in range(1 if name in NO_TEXT else part.draws)
        if not only or name in only
    ]
    return [one for place, one in enumerate(every) if one not in every[:place]]


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2", help="a folder, or what dicer opens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="to decide in; the loss is measured in float32")
    parser.add_argument("--data", default=os.environ.get("DICER_DATA", "../shared/data"))
    parser.add_argument("--other", default="books/carroll-alice.txt", help="the text of another domain; empty for none")
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--only", default="", help="recipes, with ; between")
    parser.add_argument("--layers", default="", help="instead of the parts' own, with ; between; so the next three")
    parser.add_argument("--ratios", default="")
    parser.add_argument("--sizes", default="")
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--lesson", type=int, default=0, help="rows of 512 to distill from; 0: those of calibration")
    parser.add_argument("--keep", type=Path, default=None, help="a folder from which runs that were stopped go on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--figure", type=Path, default=None, help="draw what the JSON file has, and run nothing")
    options = parser.parse_args()
    logging.disable_progress_bar()
    found = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    if options.figure:
        figure(found, options.figure, options.layers or "5-28", options.sizes or "32x512", options.device)
        return
    done = [one for one in found if one.get("lesson", options.lesson) == options.lesson]
    known = [{key: one[key] for key in ("recipe", "layers", "ratio", "size", "draw")} for one in done]
    runs = [one for one in runs_of(options) if one not in known]
    bench = Bench(options)
    dense = bench.loss(bench.model)
    print(f"{options.model} on {options.device}, {len(runs)} runs to do; dense: {dense}", flush=True)
    for done, one in enumerate(runs):
        if time.perf_counter() - start > options.seconds:
            print(f"{len(runs) - done} runs are left: call it again.")
            break
        try:
            setting = {key: value for key, value in one.items() if key != "recipe"}
            found.append({**one, **bench.run(one["recipe"], **setting), "dense": dense})
        except (dicer.DicerError, RuntimeError) as error:  # the others are still worth their time
            print(f"{one}: {error}", flush=True)
            continue
        print(f"{time.perf_counter() - start:.0f} s: {json.dumps(found[-1])}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
