"""The commands that only look: info and methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dicer.ask.axes import AXES, axes_of
from dicer.ask.methods import ALLOCATIONS, PRESETS
from dicer.ask.recipe import Recipe
from dicer.cli.terminal import FamilyOption, ModelArgument, quiet_transformers, say, show

if TYPE_CHECKING:
    from dicer.model.source import ModelSource

app = typer.Typer()


@app.command()
def info(
    model: ModelArgument,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Also say whether N devices can share every layer evenly.")
    ] = None,
    family: FamilyOption = None,
    family_row: Annotated[
        bool, typer.Option("--family-row", help="Print the structure in the form of --family FILE.toml, and no more.")
    ] = False,
) -> None:
    """Show what MODEL is made of, and what pruning 10 to 50% of its MLP neurons would leave."""
    from dicer.model.source import open_model

    quiet_transformers()
    source = open_model(model, family)
    if family_row:
        typer.echo(_row(source), nl=False)
        return
    table = Table(title=source.name, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in _made_of(source):
        table.add_row(name, value)
    show(table)
    for line in _proofs(source):
        say(line)
    if axes_of(["mlp"], source.family.axes):
        left = Table("removed", "neurons a layer", "parameters", "of the model", "weights", title="All layers pruned")
        for row in _what_is_left(source):
            left.add_row(*row)
        show(left)
    if tensor_parallel is not None:
        from dicer.write.targets import parallel_line

        say(parallel_line(source.family, tensor_parallel))


def _made_of(source: ModelSource) -> list[tuple[str, str]]:
    """(what, value) of a model, from its headers alone."""
    from dicer.model.shapes import layer_shapes
    from dicer.model.sizes import count_sizes

    infos, family = source.tensors.infos(), source.family
    spans = [(f"{_units(axis)} a layer", _layers_span(family.units(axis))) for axis in _shown(source)]
    counts_of = {axis: family.units(axis) for axis in family.axes}
    count_layers = len(layer_shapes(family, source.config))
    widest = max((max(units) for axis, units in counts_of.items() if axis.startswith("mlp")), default=0)
    inside = {name: info.numel for name, info in infos.items() if family.locate(name)}
    sizes = count_sizes(family, infos)
    counts = {
        "MLP neurons": sizes.mlp,
        "attention heads": sizes.attention,
        "embeddings and head": sum(
            info.numel for name, info in infos.items() if name not in inside and len(info.shape) == 2
        ),
    }
    counts["norms and the rest"] = sizes.parameters - sum(counts.values())
    return [
        ("family", family.model_type),
        ("layers", f"{count_layers} (0 to {count_layers - 1})"),
        *reversed(spans),
        ("legal widths", f"any from 1 to {widest}; multiples of 64 or 256 suit tensor cores and K-quants"),
        ("dtypes", ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}))),
        ("parameters", f"{sizes.parameters:,}"),
        *((f"- {name}", f"{count:,} ({count / sizes.parameters:.1%})") for name, count in counts.items()),
        ("bytes of weights", f"{sum(info.nbytes for info in infos.values()):,}"),
    ]


def _shown(source: ModelSource) -> list[str]:
    """The axes to speak of: of many experts the first stands for all."""
    return [axis for axis in source.family.axes if not re.search(r"expert[1-9]", axis)]


def _units(axis: str) -> str:
    kind, _, more = axis.partition(".")
    of = f" ({'each expert' if more.startswith('expert') else more})" if more else ""
    return AXES[kind].units + of


def _layers_span(units: list[int]) -> str:
    """The numbers in the layers that have any, and how many these are where not all have."""
    some = [count for count in units if count]
    if not some:
        return "none"
    return _span(some) + ("" if len(some) == len(units) else f" (in {len(some)} of {len(units)} layers)")


def _row(source: ModelSource) -> str:
    """The structure of a model as TOML."""
    from dicer.model.structure.family_file import as_toml

    found = source.family
    return as_toml(found.model_type, found.where, found.axes, found.factors, found.sets)


def _proofs(source: ModelSource) -> list[str]:
    """What was found, and whether it holds."""
    from dicer.decide.amounts.experts import reason_against
    from dicer.write.prove import prove

    family = source.family
    lines = [str(proof) for proof in prove(source, [*family.axes, "block"])]
    lacking = [kind for kind in ("attention", "mlp") if not axes_of([kind], family.axes)]
    return lines + [f"{kind}: not found{reason_against(source, kind)}" for kind in lacking]


def _what_is_left(source: ModelSource) -> Iterator[tuple[str, str, str, str, str]]:
    """For each ratio: removed, width, parameters, their share, bytes."""
    from dicer.decide.task import Decided, prepare
    from dicer.preflight import foreseen

    for percent in (10, 20, 25, 30, 40, 50):
        task = prepare(source, Recipe(method="random", ratio=percent / 100))
        before, after = foreseen(task)
        kept = sorted(set(task.amounts.keep.values())) if isinstance(task, Decided) else [0]
        share = f"{after.parameters / before.parameters:.1%}"
        yield f"{percent}%", _span(kept), f"{after.parameters:,}", share, f"{after.nbytes / 1e9:.3f} GB"


def _span(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


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
    shared = _named("--allocate", folds=("what it does",))
    for name, text in ALLOCATIONS.items():
        shared.add_row(name, text)
    parts = {"--criterion": CRITERIA, "--grouping": GROUPINGS, "--merge": MERGES}
    for table in (presets, papers, *(_parts(flag, known) for flag, known in parts.items()), shared):
        show(table)


def _parts(flag: str, known: Mapping[str, Any]) -> Table:
    """What can be named after a flag: what it needs of the text, its parameters for ``--set``, where it comes from."""
    table = _named(flag, "needs", "--set", folds=("what it does", "source"))
    table.add_column("link", no_wrap=True)
    for name, part in known.items():
        parameters = "\n".join(f"{key}={value.default}" for key, value in part.parameters.items())
        needs = "\n".join(part.needs)
        table.add_row(name, needs or "-", parameters or "-", part.about, part.source, part.link or "-")
    return table


def _named(*names: str, folds: Iterable[str] = ()) -> Table:
    """A table whose names are never broken; descriptions fold."""
    table = Table()
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in folds:
        table.add_column(name)
    return table
