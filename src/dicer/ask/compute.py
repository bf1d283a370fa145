"""How it is computed: what changes the time and the memory of a run, and of its result the last bits alone."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from dicer.ask.panels import MACHINE
from dicer.ask.strict import LARGEST, Strict


class Compute(Strict):
    """Machine options, apart from the recipe: the same recipe on another machine is the same recipe."""

    kind = "machine option"

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype to compute in (auto: the checkpoint's own); what is written keeps its own",
        json_schema_extra=MACHINE,
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="samples in a forward pass (default: 4,096 tokens' worth)",
        json_schema_extra=MACHINE,
    )
    gradient_checkpointing: bool = Field(
        default=False, description="taylor only: less memory, one more forward pass", json_schema_extra=MACHINE
    )
    stream: bool = Field(
        default=False,
        description="read one decoder layer at a time from disk (by itself where the model would not fit)",
        json_schema_extra=MACHINE,
    )
    memory: str | None = Field(
        default=None,
        description="most memory to use, as in 8GB; decides on --stream, the batch size and where hidden states lie",
        json_schema_extra=MACHINE,
    )

    @field_validator("memory")
    @classmethod
    def _is_bytes(cls, value: str | None) -> str | None:
        if value is not None and not _BYTES.fullmatch(value):
            raise ValueError("a number with MB, GB or TB behind it is expected")
        return value

    @property
    def memory_bytes(self) -> int | None:
        """The most memory to use, bytes; None where nothing was said."""
        found = _BYTES.fullmatch(self.memory or "")
        return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None


_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([MGTmgt])[Bb]")
COMPUTE_KEYS = tuple(Compute.keys())
UNRECORDED = ("stream", "memory")  # with either, the result is the same to the last bit
# What tells two runs apart all the same: a run in another dtype rounds otherwise.
WITHOUT_EFFECT = tuple(key for key in COMPUTE_KEYS if key != "dtype")
