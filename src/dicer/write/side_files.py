"""What belongs to a model besides weights and config."""

from __future__ import annotations

from pathlib import Path

from dicer.errors import ModelError
from dicer.model.beside import MOST_BYTES, files_beside
from dicer.reading import read_bytes, reason


def copy_side_files(source: Path, target: Path) -> None:
    """Take along what lies at the top of the folder: tokenizer, templates, generation config, licence and all else.

    The model's own card comes along as ``BASE_MODEL_CARD.md``. Neither weights nor code are copied.

    Raises:
        ModelError: one of the model's files cannot be read; what cannot be written stays an OSError.
    """
    for path, why in files_beside(source):
        if why is not None:
            continue
        place = target / path.relative_to(source)
        if path.name == "README.md":
            place = target / "BASE_MODEL_CARD.md"
        place.parent.mkdir(exist_ok=True)
        _copy(path, place)


def _copy(source: Path, target: Path) -> None:
    try:
        content = read_bytes(source, MOST_BYTES)
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {reason(error)}. Check its permissions.") from None
    target.write_bytes(content)
