"""What is read: the text that a method looks at, and how its samples are taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from dicer.ask.panels import TEXT
from dicer.ask.strict import Strict


class Text(Strict):
    """A text and the samples of it; users spell the fields ``calib``, ``calib_config`` ... ``calib_seed``."""

    source: str = Field(
        default="builtin",
        alias="calib",
        description="builtin, bookcorpus, c4, wikitext2, OWNER/NAME, or a file or folder of texts or rows; several, "
        "with commas between, share the samples",
    )
    config: str | None = Field(
        default=None,
        alias="calib_config",
        description="configuration of the hub data set OWNER/NAME",
        json_schema_extra=TEXT,
    )
    split: str = Field(
        default="train", alias="calib_split", description="split of the data set", json_schema_extra=TEXT
    )
    field: str = Field(
        default="text",
        alias="calib_field",
        description="text field of the hub data set or of the file's rows",
        json_schema_extra=TEXT,
    )
    samples: int = Field(default=10, ge=1, description="calibration samples")
    seq_len: int = Field(default=128, ge=2, description="tokens in a sample")
    skip_first: int = Field(
        default=0,
        ge=0,
        description="tokens at the start of each sample that the others see and no sum counts",
        json_schema_extra=TEXT,
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**63,
        alias="calib_seed",
        description="seed of the choice of calibration samples, apart from --seed",
        json_schema_extra=TEXT,
    )

    def part(self, source: str, samples: int) -> Text:
        """The same of one text of several, with its share of the samples; what was said stays what was said."""
        return self.model_construct(
            self.model_fields_set, **{**self.model_dump(), "source": source, "samples": samples}
        )

    def with_defaults(self, values: Mapping[str, int]) -> Text:
        """The same with other defaults: they count where nothing else was said, and as not said themselves."""
        unsaid = {name: value for name, value in values.items() if name not in self.model_fields_set}
        return self.model_construct(self.model_fields_set, **{**self.model_dump(), **unsaid})


def sources_of(source: str) -> tuple[str, ...]:
    """The texts that are named, with commas between; a file whose name has a comma is one."""
    if "," not in source or Path(source).exists():
        return (source,)
    return tuple(part.strip() for part in source.split(","))


TEXT_KEYS = tuple(Text.keys())
