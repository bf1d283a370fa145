"""The command that exports: a checkpoint for runtimes that know no layers of different widths."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicer.cli.terminal import Bar, ModelArgument, OverwriteOption, output_path, quiet_transformers, say
from dicer.errors import RecipeError
from dicer.holds import check_output, check_single, claimed

app = typer.Typer()


class Target(StrEnum):
    """What to write."""

    GGUF = "gguf"
    STOCK = "stock"


class Type(StrEnum):
    """What a GGUF file's matrices are."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[
        Target,
        typer.Option(help="'gguf': a file for llama.cpp. 'stock': a folder without code, padded with zeros."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", parser=output_path, metavar="OUT", help="File or folder to write.")
    ],
    type: Annotated[
        Type | None, typer.Option(help="What a GGUF's matrices are; without, what the checkpoint's are.")
    ] = None,
    pad: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Zero neurons up to a multiple of N; q8_0 needs 32 (its default), K-quants 256.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write MODEL, whose layers may differ in width, as a GGUF file or as a stock checkpoint."""
    if to is Target.STOCK and type is not None:
        raise RecipeError(f"--type {type} is of GGUF files; a stock checkpoint keeps its own dtype.")
    (check_output if to is Target.STOCK else check_single)(output, overwrite=overwrite, inputs=[model])
    with claimed(output):  # before a model is fetched
        lines = _exported(model, to, output, type, pad, overwrite=overwrite)
    for line in lines:
        say(line)


def _exported(
    model: str, to: Target, output: Path, type: Type | None, pad: int | None, *, overwrite: bool
) -> list[str]:
    from dicer.model.source import open_model
    from dicer.write.export.llama_cpp.file import check_file, export_gguf
    from dicer.write.export.stock import export_stock

    quiet_transformers()
    if to is Target.GGUF:
        check_file(output, overwrite=overwrite)
    source = open_model(model)
    with Bar() as progress:
        if to is Target.STOCK:
            folder = export_stock(source, output, pad=pad or 1, overwrite=overwrite, progress=progress)
            lines = [f"Wrote {output} ({folder.nbytes:,} bytes of weights): stock {folder.model_class}, no code."]
            lines += [f"Note: {note}." for note in folder.notes]
        else:
            file = export_gguf(source, output, type=type, pad=pad, overwrite=overwrite, progress=progress)
            lines = [f"Wrote {output} ({file.nbytes:,} bytes): {file.type}, llama.cpp's architecture '{file.arch}'."]
            lines += [f"Note: {note}." for note in file.notes]
    return lines
