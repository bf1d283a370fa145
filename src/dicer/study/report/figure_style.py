"""What all figures share: colours, scales, their file form."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dicer.errors import ExperimentError
from dicer.study.record import ORIGINAL

# Okabe and Ito's colours, which people with any colour vision tell apart; figures use no more of them than there are.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = "osD^vP*X"
GREY = "#9AA1A9"  # of what noise hides
_DPI = 110
_ORDER = (
    "taylor",
    "random",
    "rc-a",
    "act-mean",
    "act-l2",
    "weight-l2",
    "sim-a",
    "sim-a-post",
    "sim-mean",
    "sim-dominant",
    "let-llm",
)


class Picture(NamedTuple):
    """A figure.

    Attributes:
        name: of its files.
        caption: what it shows, and how to read it.
        png: the image.
        header: column names of the numbers behind it.
        rows: the numbers.
    """

    name: str
    caption: str
    png: bytes
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def ordered(methods: Iterable[str]) -> list[str]:
    """The paper's order, then the rest by name."""
    return sorted(set(methods) - {ORIGINAL}, key=lambda m: (_ORDER.index(m) if m in _ORDER else len(_ORDER), m))


def log_axis(axis: Any, way: str = "y") -> None:
    """A log scale with numbers at 1, 2, 5 or at the powers of ten, in full; none where nothing positive is shown."""
    if not math.isfinite(axis.dataLim.minposy if way == "y" else axis.dataLim.minposx):
        return
    axis.set(**{f"{way}scale": "log"})
    low, high = axis.get_ylim() if way == "y" else axis.get_xlim()
    low, high = max(low, 1e-300), min(high, 1e300)  # what a record says may be as large as a float can be
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    every = max(1, round(len(powers) / (12 if way == "y" else 6)))  # numbers stand side by side below
    ticks = [s * 10.0**p for p in powers if p % every == 0 for s in steps]
    axis.set(**{f"{way}ticks": [tick for tick in ticks if low <= tick <= high]})
    numbers = axis.yaxis if way == "y" else axis.xaxis
    numbers.set_major_formatter(lambda value, _: f"{value:,.12g}")
    numbers.set_minor_formatter(lambda *_: "")


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        ExperimentError: matplotlib is not installed.
    """
    # matplotlib.figure.Figure, not pyplot: no window system, no state that outlives the figure.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise _not_installed() from None
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def plain_text() -> Iterator[None]:
    """Words of records in figures are no formulas while the block lasts.

    Raises:
        ExperimentError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise _not_installed() from None
    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def _not_installed() -> ExperimentError:
    return ExperimentError("figures need matplotlib: pip install 'dicer[report]'.")


def png(drawn: Any) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
