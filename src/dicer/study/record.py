"""The record of a run: one model that is built, written, read, and passed on to tables and figures."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    TypeAdapter,
    model_validator,
)

FORMAT = 1
ORIGINAL = "original"

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def _number(value: Any) -> Any:
    """JSON has no infinity: :func:`dicer.files.finite` writes it as text. Integers may exceed any float."""
    try:
        return float(value) if value in ("inf", "-inf", "nan") or type(value) is int else value
    except OverflowError:
        return math.inf


Number = Annotated[float, BeforeValidator(_number)]
_Index = Annotated[str, Field(pattern="^[0-9]{1,6}$")]  # of a layer
_Units = Annotated[int, Field(ge=0)]
_Bytes = Annotated[int, Field(ge=0, lt=2**63)] | FiniteFloat


def pack(keep: Any, units: int) -> str:
    """Indices of kept units as a base64 bit mask of ``units`` bits, first unit first.

    Args:
        keep: indices, int [K].
        units: N.
    """
    mask = np.zeros(units, dtype=np.uint8)
    mask[np.asarray(keep)] = 1
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def unpack(text: str, units: int) -> Mask:
    """What :func:`pack` wrote, as bool [N]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=units).astype(bool)


class _Part(BaseModel):
    """What the readers of records rely on; whatever else a record says is kept and written again."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class ModelName(_Part):
    """The model that was measured or pruned."""

    name: str
    fingerprint: str


class Asked(_Part):
    """What was to be measured: the fields of :class:`dicer.ask.evaluation.Evaluation`, of which these are read."""

    protocol: str | None = None
    tasks: list[str] = []
    task_prefix: str = ""
    limit: int | None = None
    limits: dict[str, int] = {}


class Score(_Part):
    """One metric of a task, and its standard error where the harness gives one."""

    value: Number
    stderr: Number | None = None


class TaskScores(_Part):
    """A task or a group: metric -> value, over ``n`` documents; ``floor`` is what the commonest label gives."""

    metrics: dict[str, Score]
    n: int | None = None
    floor: Number | None = None


class Window(_Part):
    """A token perplexity, in windows of so many tokens."""

    window: int
    value: Number


class TokenPerplexity(Window):
    """Of a text; ``also`` in a second window length."""

    text: str
    also: Window | None = None


class Divergence(_Part):
    """KL(dense, other) in nats a token."""

    mean: Number
    stderr: Number | None = None


class Growth(_Part):
    """A perplexity over the dense model's."""

    ratio: Number
    ratio_stderr: Number | None = None


class ComparedText(_Part):
    """A model beside the dense one on a text."""

    text: str
    kl: Divergence
    same_token: Score
    perplexity: Growth


class GreedyText(_Part):
    """Greedy text beside the dense model's: tokens alike from the start, and the share that has come apart."""

    agreed: Score
    degenerate: Score


class Answered(Score):
    """A share of right answers, and what one answer for all would give."""

    floor: Number


class AnsweredTwice(_Part):
    """The same questions as a choice and as an open answer."""

    choice: Answered
    open: Answered


class Fidelity(_Part):
    """What was lost of the dense model (``dicer.evaluate.fidelity``)."""

    against: ModelName
    texts: list[ComparedText]
    greedy: GreedyText
    questions: AnsweredTwice | None = None


class Metrics(_Part):
    """What was measured: the protocol's summary, the harness's tasks, token perplexity, what was lost of the dense."""

    summary: dict[str, Number | None] = {}
    tasks: dict[str, TaskScores] = {}
    groups: dict[str, TaskScores] = {}
    perplexity: TokenPerplexity | None = None
    fidelity: Fidelity | None = None


class Memory(_Part):
    """Peaks in bytes, by where: ``host``, or the device."""

    score: dict[str, _Bytes] = {}


class Loading(_Part):
    """How the model as it is was loaded."""

    dtype: str | None = None


class AskedRecipe(Loading):
    """The recipe with every choice made, flat, as plans hold it; these of its keys are read by name."""

    ratio: float = Field(ge=0, le=1)
    seed: int
    samples: int
    seq_len: int
    dtype: str
    layers: str = "all"
    axis: str | None = None
    ratio_of: str = "chosen"
    calib: str | None = None
    calib_config: str | None = None
    calib_split: str | None = None
    calib_field: str | None = None


class Sides(_Part):
    """A mean over the kept units, and one over those that go."""

    kept: Number
    dropped: Number


class Layer(_Part):
    """Which neurons of a layer stay, as :func:`pack` writes them."""

    units: int
    keep: str
    norm: Sides | None = None

    @model_validator(mode="after")
    def _one_bit_a_unit(self) -> Layer:
        if len(base64.b64decode(self.keep, validate=True)) != -(-self.units // 8):
            raise ValueError("keep must have one bit for each unit")
        return self

    @property
    def mask(self) -> Mask:
        """Those that stay, bool [N]."""
        return unpack(self.keep, self.units)


class Kept(_Part):
    """How much stays: layer -> (units, kept) by axis, and the layers that went whole."""

    attention: dict[_Index, tuple[_Units, _Units]] = {}
    mlp: dict[_Index, tuple[_Units, _Units]] = {}
    blocks: list[int] = []

    @model_validator(mode="after")
    def _kept_of_units(self) -> Kept:
        if any(not kept <= units > 0 for layers in (self.attention, self.mlp) for units, kept in layers.values()):
            raise ValueError("more is kept than there is")
        return self


class Allocation(_Part):
    """How the ratio was shared out; transfer entropy by axis, one number a layer."""

    transfer_entropy: dict[str, list[Number]] = {}


class Record(_Part):
    """Every record; each is one of :class:`Failed`, :class:`Original` and :class:`Pruned`."""

    format: Literal[1]
    id: str
    status: Literal["done", "failed"]
    method: str = Field(pattern=r"^[^$\s/]+$")  # a folder's name, and text in figures, where $ begins a formula
    text: str
    model: ModelName
    evaluation: Asked
    environment: dict[str, Any]
    versions: dict[str, Any]
    git: str | None
    computed_on: str | None = None


class Failed(Record):
    """A run that came to nothing."""

    recipe: dict[str, Any]
    error: str


class Done(Record):
    """A run that was measured."""

    recipe: Loading
    metrics: Metrics
    seconds: dict[str, FiniteFloat]
    memory: Memory


class Original(Done):
    """The model as it is, measured."""


class Pruned(Done):
    """A pruned model, measured."""

    recipe: AskedRecipe
    layers: dict[_Index, Layer]
    kept: Kept = Kept()
    allocation: Allocation = Allocation()


def _kind(values: Any) -> str:
    if not isinstance(values, dict) or values.get("status") != "done":
        return "failed"
    return "original" if values.get("method") == ORIGINAL else "pruned"


_ANY: TypeAdapter[Failed | Original | Pruned] = TypeAdapter(
    Annotated[
        Annotated[Failed, Tag("failed")] | Annotated[Original, Tag("original")] | Annotated[Pruned, Tag("pruned")],
        Discriminator(_kind),
    ]
)


def make_record(values: Mapping[str, Any]) -> Record:
    """A record of what a run has to say.

    Raises:
        pydantic.ValidationError: something that its readers need is missing, or of another kind.
    """
    return _ANY.validate_python({"format": FORMAT, **values})


def parse_record(text: bytes) -> Record:
    """A record of its JSON.

    Raises:
        pydantic.ValidationError: with the place of the first fault, behind the kind of record.
    """
    return _ANY.validate_json(text)
