"""What all figures share: colours, scales, their file form."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dicer.errors import ExperimentError
from dicer.study.report.tables import ORIGINAL

# Okabe and Ito's colours, which people with any colour vision tell apart; a method also has its own marker and dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = "osD^vP*Xh<>d"
_DASHES = ("-", "--", "-.")
_DPI = 130
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


def style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and dashes of a method: its own wherever it appears."""
    rest = [m for m in methods if m not in _ORDER]
    place = _ORDER.index(method) if method in _ORDER else len(_ORDER) + rest.index(method)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[place // len(COLOURS) % len(_DASHES)],
    }


def log_axis(axis: Any) -> None:
    """A log scale with numbers at 1, 2, 5 or at the powers of ten, in full; none where nothing positive is shown."""
    if not math.isfinite(axis.dataLim.minposy):
        return
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [s * 10**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.yaxis.set_minor_formatter(lambda *_: "")


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        ExperimentError: matplotlib is not installed.
    """
    # matplotlib.figure.Figure, not pyplot: no window system, no state that outlives the figure.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ExperimentError("figures need matplotlib: pip install 'dicer[report]'.") from None
    return Figure(figsize=(width, height), layout="constrained")


def png(drawn: Any) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
