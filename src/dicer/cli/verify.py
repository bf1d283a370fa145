"""The command that asks whether a checkpoint is what was decided, and runs where it is meant to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicer.cli.terminal import quiet_transformers, say
from dicer.errors import ModelError, RecipeError, unknown

app = typer.Typer()


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder that dicer wrote.")],
    targets: Annotated[
        str,
        typer.Option("--with", metavar="NAMES", help="What it is run with: transformers, vllm, gguf, side by commas."),
    ] = "transformers",
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that was pruned; builtin:smollm2 is found by itself.")
    ] = None,
    vllm_python: Annotated[
        str | None, typer.Option(metavar="FILE", help="Python of an environment that has vLLM, if it is another.")
    ] = None,
    llama_cpp_python: Annotated[
        str | None, typer.Option(metavar="FILE", help="Likewise of one that has xllamacpp (llama.cpp).")
    ] = None,
) -> None:
    """Check a checkpoint in a fresh process: against the masked original, its cache, and what shall serve it.

    Ten prompts: the logits are those of the original in which what goes is zero; greedy text is the same with the cache
    and without, and in every program that is named.
    """
    from dicer.write.verify.verify import TARGETS
    from dicer.write.verify.verify import verify as check

    asked = [name.strip() for name in targets.split(",")]
    for name in asked:
        if name not in TARGETS:
            raise RecipeError(unknown("target", name, TARGETS))
    quiet_transformers()
    pythons = {"vllm_python": vllm_python, "llama_cpp_python": llama_cpp_python}
    bad = []
    for checked in check(folder, asked, against=against, **pythons):
        say(f"{'good' if checked.good else 'BAD '}  {checked.what}: {checked.found}.")
        bad += [] if checked.good else [checked.what]
    if bad:
        raise ModelError(f"{folder} is not what it should be: {', '.join(bad)}. Write it anew, or report it.")
