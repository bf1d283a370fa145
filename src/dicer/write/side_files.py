"""What belongs to a model besides weights and config."""

from __future__ import annotations

from pathlib import Path

from dicer.errors import ModelError
from dicer.model.find import TEMPLATES

_SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
)


def copy_side_files(source: Path, target: Path) -> None:
    """Take along tokenizer, templates, generation config and licence.

    The model's own card comes along as ``BASE_MODEL_CARD.md``. Only known names are copied, and no code.

    Raises:
        ModelError: one of the model's files cannot be read; what cannot be written stays an OSError.
    """
    for name in _SIDE_FILES:
        if (source / name).is_file():
            _copy(source / name, target / name)
    if (source / "README.md").is_file():
        _copy(source / "README.md", target / "BASE_MODEL_CARD.md")
    templates = source / TEMPLATES
    if templates.is_dir():
        (target / templates.name).mkdir()
        for template in sorted(templates.glob("*.jinja")):
            _copy(template, target / templates.name / template.name)


def _copy(source: Path, target: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror}. Check its permissions.") from None
    target.write_bytes(content)
