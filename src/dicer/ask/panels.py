"""The boxes of a command's help, below a first one with what most people need: those fields have no panel."""

from __future__ import annotations

from typing import Any

WHAT: dict[str, Any] = {"panel": "What goes"}
HOW: dict[str, Any] = {"panel": "How it is chosen"}
REPAIR: dict[str, Any] = {"panel": "Repair"}
ENTROPY: dict[str, Any] = {"panel": "Transfer entropy"}
TASKS: dict[str, Any] = {"panel": "Tasks"}
TEXT: dict[str, Any] = {"panel": "Text"}
MACHINE: dict[str, Any] = {"panel": "Machine"}
OUTPUT: dict[str, Any] = {"panel": "Output"}

PANELS: tuple[str, ...] = tuple(box["panel"] for box in (WHAT, HOW, REPAIR, ENTROPY, TASKS, TEXT, MACHINE, OUTPUT))
