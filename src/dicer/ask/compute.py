"""How it is computed: what changes the time and the memory of a run, and of its result the last bits alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


COMPUTE_KEYS = tuple(Compute.keys())
# What tells two runs apart all the same: a run in another dtype rounds otherwise.
WITHOUT_EFFECT = tuple(key for key in COMPUTE_KEYS if key != "dtype")
