"""What a model is made of, and what pruning would leave of it, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from dicer.ask.recipe import Recipe
from dicer.decide.task import prepare
from dicer.model.source import ModelSource
from dicer.write.surgery import count_sizes


@dataclass(frozen=True)
class Facts:
    """What ``dicer info`` shows.

    Attributes:
        name: of the model.
        rows: (what, value).
        left: one row for each ratio: removed, width, parameters, share, bytes.
    """

    name: str
    rows: list[tuple[str, str]]
    left: list[tuple[str, str, str, str, str]]


def describe(source: ModelSource) -> Facts:
    """Family, widths and parameters of a model, and what 10 to 50% would leave; reads headers only."""
    infos, family = source.tensors.infos(), source.family
    widths = family.widths(source.config)
    inside = {name: info.numel for name, info in infos.items() if family.locate(name)}
    sizes, heads = count_sizes(family, infos), family.units(source.config, "attention")
    counts = {
        "MLP neurons": sizes.mlp,
        "attention heads": sizes.attention,
        "embeddings and head": sum(
            info.numel for name, info in infos.items() if name not in inside and len(info.shape) == 2
        ),
    }
    total = sizes.parameters
    counts["norms and the rest"] = total - sum(counts.values())
    rows = [
        ("family", family.model_type),
        ("layers", f"{len(widths)} (0 to {len(widths) - 1})"),
        ("neurons a layer", _span(widths)),
        ("key-value heads a layer", _span(heads)),
        ("legal widths", f"any from 1 to {max(widths)}; multiples of 64 or 256 suit tensor cores and K-quants"),
        ("dtypes", ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}))),
        ("parameters", f"{total:,}"),
        *((f"- {name}", f"{count:,} ({count / total:.1%})") for name, count in counts.items()),
        ("bytes of weights", f"{sum(info.nbytes for info in infos.values()):,}"),
    ]
    left = []
    for percent in (10, 20, 25, 30, 40, 50):
        job = prepare(source, Recipe(method="random", ratio=percent / 100))
        _, after = job.sizes()
        kept = sorted(set(job.decision.keep.values())) if job.decision else [0]
        share = after.parameters / total
        left.append(
            (f"{percent}%", _span(kept), f"{after.parameters:,}", f"{share:.1%}", f"{after.nbytes / 1e9:.3f} GB")
        )
    return Facts(source.name, rows, left)


def _span(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
