"""The command that sends a checkpoint to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dicer.cli.terminal import quiet_transformers, say, show

app = typer.Typer()


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder that dicer wrote.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go and what not; send nothing.")] = False,
) -> None:
    """Send a finished checkpoint to the Hugging Face hub: weights, config, tokenizer, card, plan, and nothing else.

    The folder is opened first. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from dicer.write.push import check_repository, look_over
    from dicer.write.push import push as send

    quiet_transformers()
    check_repository(repository)
    upload = look_over(folder)
    if not dry_run:
        where = send(upload, repository, private=private)
        say(f"Pushed {len(upload.goes)} files ({upload.nbytes:,} bytes) to {where}.")
    else:
        table = Table("file", "bytes")
        for name, size in upload.goes:
            table.add_row(name, f"{size:,}")
        show(table)
        say(f"Would push {len(upload.goes)} files ({upload.nbytes:,} bytes) to {repository}; nothing was sent.")
    for name, reason in upload.stays:
        say(f"Stays here: {name} {reason}.")
