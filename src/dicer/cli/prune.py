"""The commands that prune: prune, plan, apply, and diff."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dicer.ask.axes import kind_of
from dicer.ask.spelling import FIELDS, Wanted, make_wanted, read_recipe
from dicer.cli.flags import with_flags
from dicer.cli.terminal import (
    Bar,
    FamilyOption,
    ModelArgument,
    OverwriteOption,
    holding,
    output_path,
    quiet_transformers,
    say,
    show,
)
from dicer.cli.told import show_fidelity
from dicer.files import remove_whole

app = typer.Typer()

OutputOption = Annotated[
    Path,
    typer.Option(
        "-o", "--output", parser=output_path, metavar="OUT", help="Folder to write; it appears whole or not at all."
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.toml",
        rich_help_panel="How it is chosen",
        help="Read these options from a file; flags override it.",
    ),
]


ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar="",
        rich_help_panel="Machine",
        help="Keep what each layer gave in OUT.resume: the same command goes on from there if it was stopped.",
    ),
]


def _wanted(file: Path | None, flags: dict[str, Any]) -> Wanted:
    return make_wanted({**(read_recipe(file) if file else {}), **flags})


@app.command()
@with_flags(FIELDS)
def prune(
    model: ModelArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            rich_help_panel="Output",
            help="Check everything, show what would be done, write nothing.",
        ),
    ] = False,
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel="Output",
            help="Measure perplexity before and after, on 'builtin' (never its calibration windows) or a file.",
        ),
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            rich_help_panel="Output",
            help="Measure what was lost of MODEL token by token, on 'builtin,builtin:code' or files; see dicer eval.",
        ),
    ] = None,
    resume: ResumeOption = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Prune MODEL and write the smaller checkpoint to OUT.

    The default is `rc-a` at 25% in all layers: random groups, and of each the neuron with the strongest activation.

    Naming parts (`--criterion`, `--activation`, `--grouping`, `--merge`) without `--method` starts from plain pruning;
    with `--method` they replace that part of the preset.
    """
    wanted = _wanted(recipe, flags)
    options: dict[str, Any] = {
        "output": output,
        "overwrite": overwrite,
        "perplexity_text": perplexity,
        "fidelity_text": fidelity,
    }
    inputs = [model, *wanted.recipe.files(), recipe]
    with holding(output, overwrite=overwrite, inputs=inputs, only_look=dry_run):  # before what takes seconds to import
        from dicer import pipeline, preflight

        quiet_transformers()
        if dry_run:
            _show_look(preflight.look(model, *wanted, **options, inputs=[recipe]), output)
            return
        with Bar() as progress:
            options |= {"progress": progress, "tell": say, "resume": resume}
            result = pipeline.prune(model, *wanted, **options, inputs=[recipe])
    _show_result(result)


@app.command()
@with_flags(FIELDS)
def plan(
    model: ModelArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    overwrite: OverwriteOption = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", metavar="", rich_help_panel="Output", help="Also print what each layer keeps, and why."
        ),
    ] = False,
    resume: ResumeOption = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Decide what of MODEL stays, and write only that: dicer_plan.json and dicer_plan.tensors in OUT."""
    asked, compute = _wanted(recipe, flags)
    with holding(output, overwrite=overwrite, inputs=[model, *asked.files(), recipe]):
        from dicer import pipeline
        from dicer.write.sink import CheckpointSink

        quiet_transformers()
        with Bar() as progress:
            kept = pipeline.resume_folder(output) if resume else None
            made = pipeline.make_plan(model, asked, compute, progress=progress, tell=say, resume=kept)
        with CheckpointSink(output, overwrite=overwrite) as sink:
            made.save(sink.folder)
    if kept is not None:
        remove_whole(kept)
    for line in made.explain() if explain else ():
        say(line)
    _show_notes(made.notes)
    say(f"Plan: {output}. Next: dicer apply {output} {model} -o FOLDER", whole=True)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Folder or dicer_plan.json that 'dicer plan' wrote.")],
    model: ModelArgument,
    output: OutputOption,
    family: FamilyOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the checkpoint that PLAN describes, shard by shard, without loading MODEL."""
    with holding(output, overwrite=overwrite, inputs=[plan, model, family]):
        from dicer import pipeline

        quiet_transformers()
        with Bar() as progress:
            result = pipeline.apply_plan(plan, model, output, family=family, overwrite=overwrite, progress=progress)
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


def _show_look(found: Any, output: Path) -> None:
    from dicer.decide.task import Decided

    task = found.task
    say(f"Would prune {task.source.name} into {output}; nothing was computed or written.")
    if isinstance(task, Decided):
        _show_sizes(found.before, found.after)
        _show_widths(task.outline())
        say(found.targets)
    else:
        say(f"About {task.budget.target:,.0f} parameters would go; from where, only a run of the model can tell.")
    _show_notes(task.notes)


def _show_sizes(before: Any, after: Any) -> None:
    table = Table("", "before", "after", "left")
    from dicer.write.card import size_rows

    for name, a, b in size_rows(before, after):
        table.add_row(name, f"{a:,}", f"{b:,}", f"{b / a:.1%}")
    show(table)


def _show_widths(plan: Any) -> None:
    """One line for each change of width; where layers differ much, only from where to where they go."""
    if plan.blocks:
        say(f"{len(plan.blocks)} layers removed whole: {', '.join(map(str, plan.blocks))}")
    for axis, layers in plan.axes.items():
        if re.search(r"\.expert[1-9]", axis):
            continue  # all experts keep as many as the first
        widths = sorted({(layer.units, len(layer.keep)) for layer in layers.values()})
        if len(widths) > 4:
            kept = [keep for _, keep in widths]
            units = max(units for units, _ in widths)
            say(f"{len(layers)} layers: {units} -> {min(kept)} to {max(kept)} {_units(axis)}")
            continue
        for units, keep in widths:
            members = [i for i, layer in layers.items() if (layer.units, len(layer.keep)) == (units, keep)]
            whole = members == list(range(members[0], members[-1] + 1))
            which = f"{members[0]} to {members[-1]}" if whole else ", ".join(map(str, members))
            say(f"{len(members)} layers ({which}): {units} -> {keep} {_units(axis)}")


def _units(axis: str) -> str:
    return kind_of(axis).units + (" of each expert" if ".expert" in axis else "")


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
    if result.fidelity:
        show_fidelity("The pruned model", result.fidelity)
    on_disk = sum(file.stat().st_size for file in result.path.rglob("*") if file.is_file())
    say("Time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items()) + ".")
    say("Peak memory: " + ", ".join(f"{where} {peak / 1e9:.2f} GB" for where, peak in peak_memory().items()) + ".")
    say(f"Checkpoint: {result.path} ({on_disk:,} bytes on disk).", whole=True)
    say(result.targets)
    say(f"Load it: import transformers; {loading_line(str(result.path), needs_code=result.needs_code)}", whole=True)
