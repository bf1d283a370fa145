"""The command that measures transfer entropy."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dicer.ask.compute import Compute
from dicer.ask.spelling import make_wanted
from dicer.ask.text import Text
from dicer.cli.flags import fields_of, with_flags
from dicer.cli.terminal import (
    Bar,
    ModelArgument,
    OverwriteOption,
    Stopped,
    check_file,
    output_path,
    quiet_transformers,
    say,
    show,
    write_result,
)
from dicer.holds import claimed

app = typer.Typer()

_FIELDS = fields_of(Text) | fields_of(Compute, "device", "dtype", "batch_size", "stream")
_KEYS = ("entropy", "search", "at", "tokens", "channels")  # of a profile


@app.command(name="entropy")
@with_flags(_FIELDS)
def entropy_command(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", parser=output_path, metavar="FILE.json", help="Where the profile goes."),
    ],
    search: Annotated[
        str,
        typer.Option(help="independent: each module bypassed alone; greedy: the earlier picks stay bypassed (slow)."),
    ] = "independent",
    at: Annotated[
        str, typer.Option(help="The final state: behind the final norm (norm) or before it (hidden).")
    ] = "norm",
    lists: Annotated[str, typer.Option(metavar="A,B", help="What to measure, of blocks, attention, mlp.")] = "all",
    overwrite: OverwriteOption = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Measure how much the entropy of MODEL's output hangs on each block, attention and MLP.

    What was measured is kept in the user's cache, so a run that was stopped goes on where it was.
    """
    recipe, compute = make_wanted(flags)
    from dicer.measure.entropy.profile import LISTS, check_choices

    chosen = LISTS if lists.strip() == "all" else tuple(name.strip() for name in lists.split(","))
    check_choices(chosen, search, at)
    check_file(output, overwrite=overwrite, keys=_KEYS, inputs=[recipe.text.source])
    with claimed(output):
        from dicer.decide.task import check_tokens
        from dicer.machine import pick_device
        from dicer.measure.entropy.cache import entropy_profile
        from dicer.measure.stores.resident import ResidentStore
        from dicer.measure.stores.streamed import StreamedStore
        from dicer.measure.text import load_calibration
        from dicer.model.source import open_model, tokenize_with

        quiet_transformers()
        source = open_model(model)
        calibration = load_calibration(recipe.text, tokenize_with(source.tokenizer()))
        check_tokens(calibration.tokens, source)
        device = pick_device(compute.device)
        if compute.stream:
            store: ResidentStore = StreamedStore(source, compute.dtype, device)
        else:
            store = ResidentStore(source.load_model(compute.dtype, device), source.family)
        _show_cost(source.family.where.count, chosen, search, calibration.tokens.shape)
        try:
            with Bar() as progress:
                profile = entropy_profile(
                    source,
                    store,
                    calibration.tokens,
                    mask=calibration.mask,
                    lists=chosen,
                    search=search,
                    at=at,
                    batch_size=compute.batch_size,
                    progress=progress,
                )
        except (KeyboardInterrupt, Stopped) as stopped:
            number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
            raise Stopped(number, "The same command goes on where it stopped.") from None
        profile = replace(profile, about=_about(source, calibration, store.model.dtype))
        write_result(output, profile.to_json())
        _show(profile, [*calibration.notes, *profile.notes])
        say(f"Profile: {output}")


def _about(source: Any, calibration: Any, dtype: Any) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model": {
            "name": source.name,
            "model_type": str(source.config.model_type),
            "fingerprint": source.fingerprint,
        },
        "calibration": calibration.provenance,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("dicer", "torch", "transformers")},
    }


def _show_cost(layers: int, lists: tuple[str, ...], search: str, shape: Any) -> None:
    from dicer.measure.entropy.transfer import layer_forwards

    count = layer_forwards(layers, lists, search)
    most = "at most " if search == "greedy" and {*lists} - {"blocks"} else ""
    say(
        f"To run: {most}{count:,} layer forwards, as many as in {count / layers:,.1f} forward passes of the model over "
        f"{shape[0]} x {shape[1]} tokens; none for what the cache holds."
    )


def _show(profile: Any, notes: list[str]) -> None:
    names = {"blocks": "te block", "attention": "te attention", "mlp": "te mlp"}
    greedy = profile.search == "greedy"
    table = Table(
        "layer",
        *(names[name] + (" (pick)" if greedy else "") for name in profile.lists),
        title="Transfer entropy (nats)",
    )
    for row in zip(*profile.lists.values(), strict=True):
        cells = (f"{entry.te:.4f}" + (f" ({entry.pick + 1})" if greedy else "") for entry in row)
        table.add_row(str(row[0].layer), *cells)
    show(table)
    say(f"H of the model: {profile.entropy:.4f} nats over {profile.tokens:,} tokens and {profile.channels:,} channels.")
    for note in notes:
        say(f"Note: {note}.")
