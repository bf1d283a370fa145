"""The commands that measure: eval and bench."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.cli.flags import fields_of, with_flags
from dicer.cli.terminal import (
    Bar,
    ModelArgument,
    OverwriteOption,
    check_file,
    output_path,
    quiet_transformers,
    say,
    show,
    write_result,
)
from dicer.cli.told import show_fidelity
from dicer.errors import RecipeError
from dicer.holds import claimed
from dicer.progress import Progress

app = typer.Typer()

ResultOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", parser=output_path, metavar="FILE.json", help="Also write everything to this file."),
]
_MACHINE = fields_of(Compute, "device", "dtype")
_EVALUATION_KEYS = ("model", "evaluation", "perplexity", "tasks", "groups", "summary")
_BENCH_KEYS = ("device", "prompt_length", "tokens", "rounds", "models")


@app.command(name="eval")
@with_flags(_MACHINE, into="machine")
@with_flags(fields_of(Evaluation))
def evaluate(
    model: ModelArgument,
    output: ResultOption = None,
    overwrite: OverwriteOption = False,
    *,
    flags: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    """Measure MODEL, pruned or not: tasks of lm-evaluation-harness, perplexity, and what it lost of the dense model.

    `--against DENSE` compares token by token. What DENSE says to a text is kept, so that the next model is compared
    without it; MODEL may also be a `.gguf` file of DENSE: what would quantization have cost?

    Any causal language model that transformers loads, also of a family that dicer cannot prune. Under `accelerate
    launch -m dicer.cli eval ...` several processes share the tasks.
    """
    _refuse_idle(flags)
    asked = Evaluation(**flags)
    asked.require_something()
    inputs = [asked.perplexity, asked.questions, asked.against, *asked.text]
    check_file(output, overwrite=overwrite, keys=_EVALUATION_KEYS, inputs=inputs)
    with claimed(output):
        from dicer.evaluate.quality import evaluate as measure

        with Bar() as progress:
            more = {} if asked.against is None else {"reference": _reference(asked, machine, progress)}
            name, loaded, tokenizer = _load([model], machine)[0]
            result = measure(loaded, tokenizer, asked, name=name, progress=progress, **more)
        if not result:  # not the first of several processes
            return
        if "fidelity" in result:
            from dicer.evaluate.dense import weight_bytes

            result["fidelity"]["bytes"] = weight_bytes(model)
        if output is not None:  # before anything is printed, which can fail, too
            write_result(output, {"model": name, "evaluation": asked.record(), **result})
        _show_evaluation(name, result)
        if output is not None:
            say(f"Results: {output}")


@app.command(name="bench")
@with_flags(_MACHINE, into="machine")
def bench_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [OTHER ...]", help="Ratios are to the first.")],
    output: ResultOption = None,
    overwrite: OverwriteOption = False,
    tokens: Annotated[int, typer.Option(help="New tokens for each prompt.")] = 128,
    batch_sizes: Annotated[str, typer.Option(metavar="1,8", help="Prompts at once.")] = "1,8",
    prompt_length: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 128,
    rounds: Annotated[int, typer.Option(help="Timed runs of each model at each batch size.")] = 5,
    *,
    machine: dict[str, Any],
) -> None:
    """Time how fast models generate, side by side: dense and pruned, in turns.

    All models are in memory at once.
    """
    sizes = _numbers(batch_sizes)
    check_file(output, overwrite=overwrite, keys=_BENCH_KEYS)
    with claimed(output):
        from dicer.evaluate.speed import bench

        loaded = [(name, model) for name, model, _ in _load(models, machine)]
        with Bar() as progress:
            result = bench(
                loaded, tokens=tokens, batch_sizes=sizes, prompt_length=prompt_length, rounds=rounds, progress=progress
            )
        if output is not None:
            write_result(output, result.to_dict())
        _show_bench(result)
        if output is not None:
            say(f"Results: {output}")


def _refuse_idle(typed: Collection[str]) -> None:
    """Refuse flags of ``eval`` that would change nothing."""
    for names, needed in (
        (("num_fewshot", "limits", "include_path"), ("tasks", "protocol")),
        (("limit",), ("tasks", "protocol", "questions")),
        (("task_prefix",), ("protocol",)),
        (("also_window",), ("perplexity", "protocol")),
        (("window", "windows"), ("perplexity", "protocol", "against")),
        (("text", "questions"), ("against",)),
    ):
        idle = [name for name in names if name in typed]
        if idle and not {*needed} & {*typed}:
            flag = "--" + idle[0].replace("_", "-")
            raise RecipeError(f"{flag} has no effect without {' or '.join('--' + n for n in needed)}; leave it out.")


def _load(models: list[str], machine: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    asked = Compute(**machine)
    from dicer.machine import pick_device
    from dicer.model.source import load_any

    quiet_transformers()
    device = pick_device(asked.device)
    return [load_any(model, asked.dtype, device) for model in models]


def _reference(asked: Evaluation, machine: Mapping[str, Any], progress: Progress) -> Any:
    """The dense model's answers: before MODEL is loaded, so that the two are never in memory together."""
    from dicer.evaluate.reference import refer
    from dicer.processes import rank

    quiet_transformers()
    return None if rank() > 0 else refer(asked, Compute(**machine), progress=progress)  # only the first compares


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"batch sizes '{text}' cannot be read; write as in 1,8.") from None


def _show_evaluation(name: str, result: Mapping[str, Any]) -> None:
    measured = result["perplexity"] or {}
    for one in filter(None, (measured, measured.get("also"))):
        say(
            f"Perplexity of {name} on {one['text']}: {one['value']:.4f} per token "
            f"({one['windows']} windows of {one['window']} tokens)."
        )
    if found := result.get("fidelity"):
        show_fidelity(name, found)
    if result["tasks"]:
        table = Table("task", "version", "n", "shots", "metric", "value", "stderr", "floor", title=name)
        for task, record in {**result["groups"], **result["tasks"]}.items():
            about = (task, str(record["version"]), f"{record['n']:,}", str(record["num_fewshot"]))
            for metric, value in record["metrics"].items():
                error = "" if value["stderr"] is None else f"± {value['stderr']:.4f}"
                floor = "" if record["floor"] is None else f"{record['floor']:.4f}"
                table.add_row(*about, metric, f"{value['value']:.4f}", error, floor)
                about = ("", "", "", "")
        show(table)
    if result["summary"]:
        summary = Table("measure", "value", title="Summary")
        for measure, value in result["summary"].items():
            summary.add_row(measure, "-" if value is None else f"{value:.4f}")
        show(summary)
    if result["versions"]:
        say("Measured with " + ", ".join(f"{package} {version}" for package, version in result["versions"].items()))


def _show_bench(result: Any) -> None:
    title = f"{result.tokens} tokens after {result.prompt_length}, median of {result.rounds} rounds (lowest to highest)"
    table = Table(
        *(
            "model",
            "parameters",
            "batch",
            "first token ms",
            "prefill tokens/s",
            "decode tokens/s",
            "whole s",
            "speedup",
        ),
        "peak GB",
        title=title,
    )
    for model in result.models:
        for speed in model.batches:
            table.add_row(
                model.name,
                f"{model.parameters:,}",
                str(speed.batch_size),
                _spread(speed.first_token_s, 1000, 1),
                _spread(speed.prefill_tokens_per_s, 1, 0),
                "-" if speed.decode_tokens_per_s is None else _spread(speed.decode_tokens_per_s, 1, 1),
                _spread(speed.generate_s, 1, 2),
                _spread(speed.speedup, 1, 2),
                "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e9:.2f}",
            )
    show(table)
    peaks = ", ".join(f"{where} {peak / 1e9:.2f} GB" for where, peak in result.process_peak_bytes.items())
    say(f"On {result.device}, {result.threads} CPU threads. Peak of the process, all models together: {peaks}.")


def _spread(spread: Any, scale: float, digits: int) -> str:
    low, median, high = (f"{value * scale:,.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return f"{median} ({low} to {high})"
