"""What to measure: an evaluation as the user asks for it, validated, and what the papers measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from dicer.ask.panels import MACHINE, TASKS, TEXT
from dicer.ask.strict import LARGEST, Strict
from dicer.errors import RecipeError, unknown
from dicer.files import is_there

BUILTIN_CODE = "builtin:code"
FIDELITY_TEXTS = ("builtin", BUILTIN_CODE)
_LATER = ("against", "text", "questions")  # earlier records do not have them, and their runs are still known
_WINDOW = 1024  # tokens, where neither the user nor a protocol says


class Protocol(NamedTuple):
    """What a paper measures, all of it zero-shot.

    Attributes:
        tasks: name -> the metrics that count, the first that the task has.
        text: what token perplexity is measured on, its rows joined by a blank line; None for no token perplexity.
        window: tokens in a window of that text.
        source: the paper.
    """

    tasks: Mapping[str, tuple[str, ...]]
    text: str | None
    window: int
    source: str


_NORMALISED = ("acc_norm", "acc")
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "randomness": Protocol(
            {
                "wikitext": ("word_perplexity",),
                "arc_challenge": ("acc",),
                "arc_easy": ("acc",),
                "hellaswag": ("acc",),
                "mmlu": ("acc",),
                "openbookqa": ("acc",),
                "winogrande": ("acc",),
            },
            None,
            _WINDOW,
            "The Surprising Effectiveness of Randomness in LLM Pruning, ICLR 2025 workshop",
        ),
        "let-llm": Protocol(
            dict.fromkeys(("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"), _NORMALISED),
            "wikitext2",
            2048,
            "Let LLM Tell What to Prune and How Much to Prune, ICML 2025",
        ),
    }
)


class Evaluation(Strict):
    """What to measure; every field is also a flag of ``dicer eval``."""

    kind = "evaluation key"

    tasks: tuple[str, ...] = Field(
        default=(),
        description="tasks, groups or tags of the harness, with commas between",
        json_schema_extra={"metavar": "A,B"},
    )
    protocol: str | None = Field(
        default=None, description="what a paper measures: randomness or let-llm", json_schema_extra={"metavar": "NAME"}
    )
    task_prefix: str = Field(
        default="", description="put before the protocol's task names, e.g. local_", json_schema_extra=TASKS
    )
    num_fewshot: int | None = Field(
        default=None,
        ge=0,
        le=LARGEST,
        description="examples in the prompt (default: the task's own)",
        json_schema_extra=TASKS,
    )
    limit: int | None = Field(default=None, ge=1, le=LARGEST, description="documents a task (default: all)")
    limits: dict[str, int] = Field(
        default={},
        description="documents of single tasks or groups, over limit, with commas between",
        json_schema_extra=TASKS | {"metavar": "NAME=N"},
    )
    batch_size: int | Literal["auto"] = Field(
        default="auto",
        description="auto, or requests in a forward pass",
        json_schema_extra=MACHINE | {"metavar": "auto|N"},
    )
    include_path: str | None = Field(
        default=None,
        description="folder with task files of your own",
        json_schema_extra=TASKS | {"metavar": "DIR"},
    )
    perplexity: str | None = Field(
        default=None,
        description="token perplexity on builtin, wikitext2 (hub) or a .txt/.jsonl(.gz)",
        json_schema_extra={"metavar": "TEXT"},
    )
    window: int = Field(
        default=_WINDOW, ge=2, le=LARGEST, description="tokens in a window of that text", json_schema_extra=TEXT
    )
    also_window: int | None = Field(
        default=None,
        ge=2,
        le=LARGEST,
        description="another window length, measured over as much of the text",
        json_schema_extra=TEXT,
    )
    windows: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="how many windows, from the start (default: all; 8 of each text with --against)",
        json_schema_extra=TEXT,
    )
    against: str | None = Field(
        default=None,
        description="dense model to compare with: hub id, folder, .gguf file or builtin:smollm2",
        json_schema_extra={"metavar": "DENSE"},
    )
    text: tuple[str, ...] = Field(
        default=(),
        description="texts of that comparison, the first of the calibration's domain, the second of another "
        "(default: builtin,builtin:code)",
        json_schema_extra=TEXT | {"metavar": "A,B"},
    )
    questions: str | None = Field(
        default=None,
        description="questions of that comparison, as choice and as open answer: a file as ARC or OpenBookQA have it",
        json_schema_extra={"metavar": "FILE"},
    )

    @field_validator("tasks", "text", mode="before")
    @classmethod
    def _names_apart(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(name for part in value.split(",") if (name := part.strip()))
        return tuple(value) if isinstance(value, list) else value

    @field_validator("limits", mode="before")
    @classmethod
    def _limits_apart(cls, value: Any) -> Any:
        pairs = value
        if isinstance(value, str):
            pairs = {
                name.strip(): int(count) if count.strip().isdecimal() else count
                for name, _, count in (part.partition("=") for part in value.split(","))
            }
        if not isinstance(pairs, dict) or not all(type(count) is int and count >= 1 for count in pairs.values()):
            raise RecipeError(
                f"limits name tasks and a number from 1 on, as in local_mmlu=2,local_piqa=50; got {value!r}."
            )
        return pairs

    @field_validator("batch_size", mode="before")
    @classmethod
    def _size_read(cls, value: Any) -> Any:
        size = int(value) if isinstance(value, str) and value.isdecimal() else value
        if size != "auto" and (type(size) is not int or not 1 <= size <= LARGEST):
            raise RecipeError(f"batch_size is 'auto' or a number from 1 to {LARGEST:,}; got {value!r}.")
        return size

    @model_validator(mode="after")
    def _protocol_known(self) -> Evaluation:
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise RecipeError(unknown("protocol", self.protocol, PROTOCOLS))
        if self.protocol is not None and self.num_fewshot:
            raise RecipeError(f"protocol '{self.protocol}' is zero-shot; leave num_fewshot out, or name --tasks.")
        for name in self.limits:
            if name not in self.task_names():
                raise RecipeError("limits: " + unknown("task", name, self.task_names()))
        return self

    def task_names(self) -> tuple[str, ...]:
        """The protocol's tasks, then those that were named; each once."""
        prefixed = (self.task_prefix + name for name in PROTOCOLS[self.protocol].tasks) if self.protocol else ()
        return tuple(dict.fromkeys([*prefixed, *self.tasks]))

    def by_limit(self) -> dict[int | None, tuple[str, ...]]:
        """Documents a task -> the tasks that it holds for."""
        found: dict[int | None, tuple[str, ...]] = {}
        for name in self.task_names():
            limit = self.limits.get(name, self.limit)
            found[limit] = (*found.get(limit, ()), name)
        return found

    def record(self) -> dict[str, Any]:
        """Every field as a plain value, for a file: of paths only the name; of a comparison only where one is asked."""
        values = self.model_dump(mode="json")
        values = {key: value for key, value in values.items() if value or key not in _LATER}
        for key in ("include_path", "perplexity", "questions"):
            values |= {key: Path(values[key]).name} if values.get(key) else {}
        if self.against is not None and is_there(self.against):  # OWNER/NAME of the hub stays
            values["against"] = Path(self.against).resolve().name
        return values | ({"text": [Path(text).name for text in self.text]} if self.text else {})

    def fidelity_texts(self) -> tuple[str, ...]:
        """What a model is compared on: what was named, else the two that are always there."""
        return self.text or FIDELITY_TEXTS

    def perplexity_text(self) -> str | None:
        """What token perplexity is measured on: what was named, else the protocol's."""
        return self.perplexity or (PROTOCOLS[self.protocol].text if self.protocol else None)

    def require_something(self) -> None:
        """Raise a RecipeError where nothing is asked for."""
        if not self.task_names() and self.perplexity_text() is None and self.against is None:
            raise RecipeError("nothing to measure: name --tasks, a --protocol, a --perplexity text or --against DENSE.")
