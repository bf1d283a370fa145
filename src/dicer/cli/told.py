"""How a comparison with the dense model is told on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dicer.cli.terminal import say, show


def show_fidelity(name: str, found: Mapping[str, Any]) -> None:
    """Print what :func:`dicer.evaluate.fidelity.fidelity` found.

    Args:
        name: the model that was compared.
        found: the plain values.
    """
    against = found["against"]
    say(f"{name}{_bytes(found)} against {against['name']}{_bytes(against)}")
    show(_texts(found["texts"]))
    if (leak := found["leakage"]) is not None:
        first, second = found["texts"][:2]
        say(
            f"Perplexity is {second['perplexity']['ratio']:.3f} times the dense one's on {second['text']} and "
            f"{first['perplexity']['ratio']:.3f} times on {first['text']}: {leak['value']:+.3f}{_error(leak)}."
        )
    show(_greedy(found["greedy"]))
    if "questions" in found:
        show(_questions(found["questions"]))


def _bytes(about: Mapping[str, Any]) -> str:
    return f" ({about['bytes']:,} bytes)" if about.get("bytes") else ""


def _error(score: Mapping[str, Any], name: str = "stderr", digits: int = 3) -> str:
    return "" if score[name] is None else f" ± {score[name]:.{digits}f}"


def _texts(texts: list[dict[str, Any]]) -> Table:
    """A column a text."""
    table = Table("a token", *(one["text"] for one in texts))
    rows = {
        "tokens": lambda one: f"{one['tokens']:,} in {one['windows']} windows",
        "KL, mean (nats)": lambda one: f"{one['kl']['mean']:.{_digits(one)}f}{_error(one['kl'], digits=_digits(one))}",
        "KL, median": lambda one: f"{one['kl']['median']:.{_digits(one)}f}",
        "KL, 99th percentile": lambda one: f"{one['kl']['p99']:.{_digits(one)}f}",
        "of it, the worst fifth": lambda one: _share(one["kl"]["worst_fifth"]),
        "same most likely token": lambda one: f"{one['same_token']['value']:.3f}{_error(one['same_token'])}",
        "perplexity": lambda one: f"{one['perplexity']['value']:.2f} (dense {one['perplexity']['dense']:.2f})",
        "  times the dense one's": lambda one: (
            f"{one['perplexity']['ratio']:.3f}{_error(one['perplexity'], 'ratio_stderr')}"
        ),
        "bits a byte": lambda one: f"{one['bits_per_byte']['value']:.3f} (dense {one['bits_per_byte']['dense']:.3f})",
    }
    for title, cell in rows.items():
        table.add_row(title, *map(cell, texts))
    return table


def _digits(one: Mapping[str, Any]) -> int:
    return 4 if one["kl"]["mean"] >= 0.01 else 6


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _greedy(greedy: Mapping[str, Any]) -> Table:
    table = Table("greedy text", f"{greedy['prompts']} prompts of {greedy['prompt_length']}, {greedy['tokens']} tokens")
    table.add_row("tokens alike from the start", f"{greedy['agreed']['value']:.1f}{_error(greedy['agreed'], digits=1)}")
    table.add_row("alike to the end", _score(greedy["whole"]))
    table.add_row("degenerate", _score(greedy["degenerate"]))
    table.add_row("  loops", f"{_score(greedy['loops'])} (dense {greedy['dense_loops']['value']:.3f})")
    table.add_row("  cut off where the dense one ends", _score(greedy["cut_off"]))
    return table


def _score(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f}{_error(score)}"


def _questions(questions: Mapping[str, Any]) -> Table:
    table = Table(f"{questions['n']} questions of {questions['file']}", "right", "dense", "floor")
    for title, way in (("as a choice", "choice"), ("in its own words", "open")):
        score = questions[way]
        dense = f"{score['dense']:.3f}{_error(score, 'dense_stderr')}"
        table.add_row(title, _score(score), dense, f"{score['floor']:.3f}")
    table.caption = f"floor: one place, or one answer, for all; a blind choice: {questions['chance']:.3f}"
    return table
