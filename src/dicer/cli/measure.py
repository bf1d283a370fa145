"""The commands that measure: eval and bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dicer.cli.terminal import (
    Bar,
    ModelArgument,
    check_file,
    output_path,
    quiet_transformers,
    say,
    show,
    write_result,
)
from dicer.errors import RecipeError

app = typer.Typer()

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
ResultOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", parser=output_path, metavar="FILE.json", help="Also write everything to this file."),
]
ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace the result that is there.")]
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_EVALUATION_KEYS = ("model", "evaluation", "perplexity", "tasks", "groups", "summary")
_BENCH_KEYS = ("device", "prompt_length", "tokens", "rounds", "models")


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    output: ResultOption = None,
    overwrite: ReplaceOption = False,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks, groups or tags of the harness.")] = None,
    protocol: Annotated[str | None, typer.Option(help="What a paper measures: randomness or let-llm.")] = None,
    task_prefix: Annotated[
        str | None, typer.Option(metavar="local_", help="Put before the protocol's task names.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt (default: the task's own).")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents a task (default: all).")] = None,
    limits: Annotated[
        str | None, typer.Option(metavar="TASK=N,...", help="Documents of single tasks or groups, over --limit.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="auto|N", help="Requests in a forward pass.")] = "auto",
    include_path: Annotated[str | None, typer.Option(metavar="DIR", help="Folder with task files of your own.")] = None,
    perplexity: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Token perplexity on builtin, wikitext2 (hub), or a .txt/.jsonl(.gz)."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window of that text (default: 1024).")] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows, from the start (default: all).")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure MODEL, pruned or not: tasks of lm-evaluation-harness, and perplexity.

    Any causal language model that transformers loads, also of a family that dicer cannot prune. Under `accelerate
    launch -m dicer.cli eval ...` several processes share the tasks.
    """
    from dicer.ask.evaluation import Evaluation

    typed: dict[str, Any] = {
        "tasks": tasks,
        "protocol": protocol,
        "task_prefix": task_prefix,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "limits": limits,
        "batch_size": batch_size,
        "include_path": include_path,
        "perplexity": perplexity,
        "window": window,
        "windows": windows,
    }
    _refuse_idle(typed)
    asked = Evaluation(**{name: value for name, value in typed.items() if value is not None})
    asked.require_something()
    check_file(output, overwrite=overwrite, keys=_EVALUATION_KEYS, inputs=[perplexity])
    from dicer.evaluate.quality import evaluate as measure

    name, loaded, tokenizer = _load([model], device, dtype)[0]
    with Bar() as progress:
        result = measure(loaded, tokenizer, asked, progress=progress)
    if not result:  # not the first of several processes
        return
    if output is not None:  # before anything is printed, which can fail, too
        write_result(output, {"model": name, "evaluation": asked.record(), **result})
    _show_evaluation(name, result)
    if output is not None:
        say(f"Results: {output}")


@app.command(name="bench")
def bench_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [OTHER ...]", help="Ratios are to the first.")],
    output: ResultOption = None,
    overwrite: ReplaceOption = False,
    tokens: Annotated[int, typer.Option(help="New tokens for each prompt.")] = 128,
    batch_sizes: Annotated[str, typer.Option(metavar="1,8", help="Prompts at once.")] = "1,8",
    prompt_length: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 128,
    rounds: Annotated[int, typer.Option(help="Timed runs of each model at each batch size.")] = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Time how fast models generate, side by side: dense and pruned, in turns.

    All models are in memory at once.
    """
    sizes = _numbers(batch_sizes)
    check_file(output, overwrite=overwrite, keys=_BENCH_KEYS)
    from dicer.evaluate.speed import bench

    loaded = [(name, model) for name, model, _ in _load(models, device, dtype)]
    with Bar() as progress:
        result = bench(
            loaded, tokens=tokens, batch_sizes=sizes, prompt_length=prompt_length, rounds=rounds, progress=progress
        )
    if output is not None:
        write_result(output, result.to_dict())
    _show_bench(result)
    if output is not None:
        say(f"Results: {output}")


def _refuse_idle(typed: Mapping[str, Any]) -> None:
    """Refuse flags of ``eval`` that would change nothing."""
    for flags, needed in (
        (("num_fewshot", "limit", "limits", "include_path"), ("tasks", "protocol")),
        (("task_prefix",), ("protocol",)),
        (("window", "windows"), ("perplexity", "protocol")),
    ):
        idle = [name for name in flags if typed[name] is not None]
        if idle and not any(typed[name] for name in needed):
            flag = "--" + idle[0].replace("_", "-")
            raise RecipeError(f"{flag} has no effect without {' or '.join('--' + n for n in needed)}; leave it out.")


def _load(models: list[str], device: str, dtype: str) -> list[tuple[str, Any, Any]]:
    if dtype not in _DTYPES:
        raise RecipeError(f"dtype '{dtype}' is none of {', '.join(_DTYPES)}.")
    from dicer.machine import pick_device
    from dicer.model.source import load_any

    quiet_transformers()
    where = pick_device(device)
    return [load_any(model, dtype, where) for model in models]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"batch sizes '{text}' cannot be read; write as in 1,8.") from None


def _show_evaluation(name: str, result: Mapping[str, Any]) -> None:
    if measured := result["perplexity"]:
        say(
            f"Perplexity of {name} on {measured['text']}: {measured['value']:.4f} per token "
            f"({measured['windows']} windows of {measured['window']} tokens)."
        )
    if result["tasks"]:
        table = Table("task", "version", "n", "shots", "metric", "value", "stderr", title=name)
        for task, record in {**result["groups"], **result["tasks"]}.items():
            about = (task, str(record["version"]), f"{record['n']:,}", str(record["num_fewshot"]))
            for metric, value in record["metrics"].items():
                error = "" if value["stderr"] is None else f"± {value['stderr']:.4f}"
                table.add_row(*about, metric, f"{value['value']:.4f}", error)
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
