"""Rows of chats to text, through the model's own template."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dicer.errors import CalibrationError
from dicer.measure.rows import Row

Template = Callable[..., str]  # (messages, **what the template also takes) -> text

FIELDS = ("messages", "conversations", "conversation")
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **{name: name for name in ("system", "developer")},
}
_MASKS = ("weight", "train", "mask", "loss", "masked")  # of a message: whether it is trained on


def chat_field(row: dict[str, Any]) -> str | None:
    """The field of a row that holds a chat, if one does."""
    return next((name for name in FIELDS if isinstance(row.get(name), list)), None)


def chat_text(row: Row, field: str, template: Template | None) -> str:
    """The text of a row's chat as the model would see it.

    Args:
        row: with ``messages`` (role, content) or ShareGPT's ``conversations`` (from, value).
        field: the name of that field.
        template: the tokenizer's; None where it has none.

    Raises:
        CalibrationError: no template, a role that is none, or what no template can say.
    """
    if template is None:
        raise CalibrationError(
            f"{row.where}: '{field}' is a chat, and the model's tokenizer has no chat template. Use a chat model, or "
            "give rows of text."
        )
    messages = [_message(row.where, message) for message in row.values[field]]
    if isinstance(system := row.values.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = template(messages, **_more(row))
    except CalibrationError:
        raise
    except Exception as error:  # jinja and the template itself raise whatever they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CalibrationError(f"{row.where}: the model's chat template refuses it: {reason.rstrip('.')}.") from None
    return text


def _more(row: Row) -> dict[str, Any]:
    """What else a row gives its template: tools, also as JSON in a string, and arguments by name."""
    more, tools = row.values.get("chat_template_kwargs"), row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = None
        if not isinstance(tools, list):
            raise CalibrationError(f"{row.where}: tools are no JSON list, so the chat template cannot name them.")
    return {**(more if isinstance(more, dict) else {}), **({"tools": tools} if tools else {})}


def _message(where: str, message: Any) -> dict[str, Any]:
    """One message as templates take it; content of other kinds than text is refused."""
    if not isinstance(message, dict):
        raise CalibrationError(f"{where}: a message must be an object with role and content.")
    said = {name: value for name, value in message.items() if value is not None}
    role = said.pop("role", None) or said.pop("from", None)
    content = said.pop("content", None)
    content = said.pop("value", "" if said.get("tool_calls") else None) if content is None else content
    if isinstance(content, list):
        content = _joined(where, content)
    if not isinstance(content, str) or str(role).lower() not in _ROLES:
        raise CalibrationError(f"{where}: a message must have a role (not {role!r}) and a text.")
    for name in _MASKS:
        if name in said and said.pop(name) in (0, False, 0.0, "0"):
            raise CalibrationError(
                f"{where}: '{name}' leaves a message out, which a text cannot say; give input_ids with labels."
            )
    return {"role": _ROLES[str(role).lower()], "content": content, **said}


def _joined(where: str, parts: list[Any]) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise CalibrationError(f"{where}: a message has other parts than text, which dicer's models cannot see.")
    return "".join(part["text"] for part in parts)
