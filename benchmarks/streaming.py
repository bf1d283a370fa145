"""A model read layer by layer against the whole of it in memory: time, memory, bytes read, against what was foreseen.

    python benchmarks/streaming.py --folder SCRATCH [--shapes 135M,0.5B,1.5B,3B,7B] [--no-resident 7B] [--methods ...]
                                   [--output FILE.json]
    python benchmarks/streaming.py --figure FILE.png --output FILE.json      (draws what was measured)

Models of Qwen2's shapes with random bf16 weights are made in SCRATCH and taken away again. Each run is a process of its
own (``dicer prune``). Its memory is looked at every 20 ms in /proc/PID/status: ``VmHWM`` is the most that it has held
up to then, with the pages of mapped files that it has in use (the system can take them back at any time); ``RssAnon``
is what it holds itself, of which the highest is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dicer.model.tensors import INDEX

SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    # layers, hidden, neurons, heads, key-value heads, vocabulary, tied
    "135M": (30, 576, 1_536, 9, 3, 49_152, True),
    "0.5B": (24, 896, 4_864, 14, 2, 151_936, True),
    "1.5B": (28, 1_536, 8_960, 12, 2, 151_936, True),
    "3B": (36, 2_048, 11_008, 16, 2, 151_936, True),
    "7B": (28, 3_584, 18_944, 28, 4, 152_064, False),
}
METHODS = {
    "rc-a": ["--method", "rc-a"],
    "random": ["--method", "random"],
    "weight-l2": ["--method", "weight-l2"],
}
SHARD = 10**9
TOKENS = 10 * 128


class Seen(NamedTuple):
    """How a process went: seconds, those of its processors, the peak of its memory, and of what is no mapped file."""

    seconds: float
    busy: float
    peak: float
    anonymous: float
    said: str


def make(folder: Path, shape: str) -> int:
    """A random checkpoint, shard by shard; its bytes."""
    layers, hidden, neurons, heads, groups, vocabulary, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=neurons, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generator, shard, size, files = torch.Generator().manual_seed(0), dict[str, torch.Tensor](), 0, dict[str, str]()
    total = 0

    def flush() -> None:
        name = f"model-{len(set(files.values())):05d}.safetensors"
        files.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name, metadata={"format": "pt"})
        shard.clear()

    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if tensor.ndim == 1 and "norm" in name:
            made = torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:  # integers are made fast, and their bits are those of small numbers: signs and fractions at random
            bits = torch.randint(-(2**15), 2**15, tensor.shape, generator=generator, dtype=torch.int16)
            made = ((bits & -32_641) | 0x3C00).view(torch.bfloat16)  # sign and fraction, of 2^-7 to 2^-6
        if size + made.nbytes > SHARD and shard:
            flush()
            size = 0
        shard[name] = made.contiguous()
        size, total = size + made.nbytes, total + made.nbytes
    flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    ids = torch.randint(3, min(vocabulary, 150_000), (10, TOKENS // 10), generator=generator).tolist()
    (folder.parent / f"{folder.name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return total


def watched(command: Sequence[str]) -> Seen:
    """Run a process and look at its memory meanwhile."""
    start, peak, anonymous = time.perf_counter(), 0.0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status = Path(f"/proc/{process.pid}/status")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    while process.poll() is None:
        try:
            held = dict(re.findall(r"(RssAnon|VmHWM):\s+(\d+) kB", status.read_text()))
        except OSError:
            break
        if held:
            peak, anonymous = (max(p, int(held[n]) * 1024 / 1e9) for p, n in ((peak, "VmHWM"), (anonymous, "RssAnon")))
        time.sleep(0.02)
    said = process.stdout.read() if process.stdout else ""
    if process.wait():
        sys.exit(said)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seen(time.perf_counter() - start, busy, peak, anonymous, said)


_NUMBERS = {
    "foreseen": r"To do: .*: about ([\d.,]+) (GB|MB) of memory",
    "foreseen read": r"To do: .* of memory, ([\d.,]+) (GB|MB) to read",
    "read": r"peak, ([\d.,]+) (GB|MB) read",
}


def row_of(shape: str, total: int, method: str, way: str, seen: Seen) -> dict[str, Any]:
    """What is kept of a run: GB and seconds."""
    row: dict[str, Any] = {"shape": shape, "weights": total / 1e9, "method": method, "way": way}
    row |= {"wall": seen.seconds, "processors": seen.busy, "peak": seen.peak, "anonymous": seen.anonymous}
    for name, pattern in _NUMBERS.items():
        if found := re.search(pattern, seen.said):
            row[name] = float(found[1].replace(",", "")) / (1 if found[2] == "GB" else 1e3)
    for stage, seconds in re.findall(r"(\w+) ([\d.]+) s", seen.said.rpartition("Time:")[2]):
        row[stage] = float(seconds)
    return row


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Scoring against parameters times tokens, memory and reading against the size of the weights."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, (time_of, memory_of, read_of) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    kinds = {
        "in memory": ("#0072B2", "o"),
        "streamed": ("#D55E00", "s"),
        "random": ("#009E73", "D"),
        "weight-l2": ("#CC79A7", "^"),
    }
    for kind, (colour, marker) in kinds.items():
        own = [row for row in rows if row["way"] == kind and not row.get("round")]
        weights = [row["weights"] for row in own]
        if kind in ("in memory", "streamed"):
            work = [row["parameters run"] * row["tokens"] / 1e12 for row in own]
            time_of.plot(work, [row["score"] for row in own], marker=marker, color=colour, label=kind)
        memory_of.plot(weights, [row["peak"] for row in own], marker=marker, color=colour, label=kind)
        memory_of.plot(weights, [row["foreseen"] for row in own], marker=marker, color=colour, mfc="white", ls=":")
        read_of.plot(weights, [row.get("read", 0) for row in own], marker=marker, color=colour, label=kind)
    labels = {
        time_of: ("parameters that are run x tokens, 10^12", "seconds of scoring"),
        memory_of: ("weights, GB", "peak of memory, GB (hollow: foreseen)"),
        read_of: ("weights, GB", "read, GB"),
    }
    for axis, (across, up) in labels.items():
        axis.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(StrMethodFormatter("{x:g}"))
            side.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=80)


def run_parameters(shape: str, layers: str) -> int:
    """Parameters of the layers that tokens go through: all up to the last that is pruned."""
    count, hidden, neurons, heads, groups, *_ = SHAPES[shape]
    last = count + int(layers.rpartition("--")[2]) * -1 if "--" in layers else count - 1
    attention = 2 * hidden * hidden + 2 * hidden * hidden * groups // heads
    return (last + 1) * (attention + 3 * hidden * neurons)


def foreseen(said: str) -> str:
    """Memory and reading, as the run said beforehand and afterwards."""
    lines = [line for line in said.splitlines() if line.startswith(("To do:", "Scored", "Time:"))]
    return " | ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, help="what was measured, as JSON")
    parser.add_argument("--figure", type=Path, help="draw what is in --output, and measure nothing")
    parser.add_argument("--shapes", default="135M,0.5B,1.5B")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=1, help="how often, one method after the other")
    parser.add_argument("--no-resident", default="7B", help="shapes that are streamed only")
    parser.add_argument("--layers", default="5--2")
    options = parser.parse_args()
    if options.figure:
        draw(json.loads(options.output.read_text()), options.figure)
        return
    rows: list[dict[str, Any]] = []
    options.folder.mkdir(exist_ok=True)
    for shape in options.shapes.split(","):
        model, out = options.folder / shape, options.folder / "out"
        total = make(model, shape)
        print(f"{shape}: {total / 1e9:.2f} GB of weights", flush=True)
        for method in ["cp", *options.methods.split(",")] * options.rounds:
            if method == "cp":
                copied = watched(["cp", "-r", str(model), str(out)])
                shutil.rmtree(out)
                row = {"shape": shape, "weights": total / 1e9, "way": "cp"}
                rows.append(row | {"wall": copied.seconds, "processors": copied.busy})
                print(f"  cp -r: {copied.seconds:.1f} s ({copied.busy:.1f} of processors)", flush=True)
                continue
            ways = ["--stream"] if shape in options.no_resident.split(",") else ["", "--stream"]
            for way in ways if method == "rc-a" else [""]:
                words = [*METHODS[method], "--layers", options.layers, "--calib", f"{model}.jsonl", *way.split()]
                command = [sys.executable, "-m", "dicer", "prune", str(model), "-o", str(out), *words]
                seen = watched(command)
                shutil.rmtree(out)
                name = f"{method} {way or 'as it is'}"
                memory = f"peak {seen.peak:.2f} GB ({seen.anonymous:.2f} anonymous)"
                print(f"  {name}: {seen.seconds:.1f} s ({seen.busy:.1f} of processors), {memory}", flush=True)
                print(f"    {foreseen(seen.said)}", flush=True)
                kind = {"": "in memory", "--stream": "streamed"}[way] if method == "rc-a" else method
                row = row_of(shape, total, method, kind, seen)
                rows.append(row | {"tokens": TOKENS, "parameters run": run_parameters(shape, options.layers)})
                if options.output:
                    options.output.write_text(json.dumps(rows, indent=1) + "\n")
        shutil.rmtree(model)
        Path(f"{model}.jsonl").unlink()


if __name__ == "__main__":
    main()
