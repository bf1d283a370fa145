"""Settings: which runs can be compared, and what is said of them once, above all their tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dicer.ask.compute import WITHOUT_EFFECT
from dicer.ask.text import TEXT_KEYS
from dicer.study.record import Done, Original, Pruned, Record

# What the rows and columns of a setting's tables tell apart. A key that stands nowhere here makes another setting.
_METHOD_KEYS = (
    *("method", "criterion", "activation", "grouping", "grouped_by", "merge", "groups", "set", "ratio", "seed"),
    *("axis", "allocate", "max_ratio", "min_width", "drop_threshold", "compensate"),
    *("schedule", "split", "entropy_search", "entropy_at"),
)
_SAME = {*_METHOD_KEYS, *TEXT_KEYS, *WITHOUT_EFFECT} - {"calib_seed"}  # the draw counts, and so does the dtype


class Setting(NamedTuple):
    """Everything but method, ratio and seed: only runs of one setting can be compared.

    Attributes:
        model: name and fingerprint.
        common: recipe and evaluation without the text, as JSON.
        text: name and size of the calibration text.
    """

    model: tuple[str, str]
    common: str
    text: str

    @property
    def evaluation(self) -> dict[str, Any]:
        """What was measured."""
        found: dict[str, Any] = json.loads(self.common)["evaluation"]
        return found

    @property
    def name(self) -> str:
        """Of the model, without its owner."""
        return self.model[0].rsplit("/", 1)[-1]


def setting_of(record: Pruned) -> Setting:
    """The setting of a pruned model's record."""
    recipe = record.recipe
    values = recipe.model_dump(exclude_none=True, exclude_unset=True)  # None is as good as a key that is not there yet
    rest = {name: value for name, value in values.items() if name not in _SAME}
    usual = (None, record.text, "train", "text")  # names of hub configurations, splits, fields; of a stand-in's file
    sources = (recipe.calib, recipe.calib_config, recipe.calib_split, recipe.calib_field)
    source = [value for value in sources if value not in usual]
    named = f"{record.text} ({', '.join(map(str, source))})" if source else record.text
    return Setting(_model(record), _common(rest, record), f"{named} {recipe.samples} x {recipe.seq_len}")


def _common(recipe: Mapping[str, Any], record: Done) -> str:
    evaluation = record.evaluation.model_dump(exclude_unset=True, exclude={"batch_size"})
    return json.dumps({"recipe": recipe, "evaluation": evaluation}, sort_keys=True)


def _model(record: Done) -> tuple[str, str]:
    return (record.model.name, record.model.fingerprint)


def done(records: Iterable[Record]) -> list[Done]:
    """Those that have metrics."""
    return [record for record in records if isinstance(record, Done)]


def pruned(records: Iterable[Record]) -> list[Pruned]:
    """Those that have metrics, of pruned models."""
    return [record for record in records if isinstance(record, Pruned)]


def settings(records: Iterable[Record]) -> dict[Setting, list[Done]]:
    """Setting -> its pruned runs, and the original model measured in the same way; one without such runs is alone."""
    found = done(records)
    groups: dict[Setting, list[Done]] = {}
    for record in pruned(found):
        groups.setdefault(setting_of(record), []).append(record)
    for setting, members in groups.items():
        members += _originals(found, setting)
    held = {record.id for members in groups.values() for record in members}
    for other in found:
        if other.id not in held:
            groups[Setting(_model(other), _common({"dtype": other.recipe.dtype}, other), "none")] = [other]
    return groups


def _originals(records: Iterable[Done], setting: Setting) -> list[Done]:
    dtype = json.loads(setting.common)["recipe"].get("dtype")
    return [
        record
        for record in records
        if isinstance(record, Original)
        and (_model(record) == setting.model or _compared_with(record) == setting.model[1])
        and json.loads(_common({}, record))["evaluation"] == setting.evaluation
        and record.recipe.dtype == dtype
    ]


def of_its_model(records: Sequence[Done]) -> list[Done]:
    """The records of a setting without those of other models, such as quantized ones, that were measured beside it."""
    models = {_model(record) for record in pruned(records)}
    return [record for record in records if not models or _model(record) in models]


def _compared_with(record: Done) -> str | None:
    """The fingerprint of the dense model that a record's was held against."""
    return record.metrics.fidelity.against.fingerprint if record.metrics.fidelity else None


def describe(groups: Sequence[Setting]) -> tuple[str, list[str]]:
    """What all settings have in common, in words, and what each has besides."""
    words = [_words(setting) for setting in groups]
    common = [phrase for name, phrase in words[0].items() if phrase and _is_shared(name, words)] if words else []
    apart = [[phrase for name, phrase in own.items() if phrase and not _is_shared(name, words)] for own in words]
    for phrases in {tuple(own): None for own in apart}:  # the same for several settings: say what else differs
        alike = [i for i, own in enumerate(apart) if tuple(own) == phrases]
        others = [_other_words(groups[i]) for i in alike]
        for i, own in zip(alike, others, strict=True):
            apart[i] += [phrase for name, phrase in own.items() if not _is_shared(name, others)]
    return ", ".join(common), [", ".join(own) for own in apart]


def _is_shared(name: str, words: Sequence[Mapping[str, str]]) -> bool:
    return len({own.get(name) for own in words}) == 1


def _words(setting: Setting) -> dict[str, str]:
    """What is said of a setting -> in which words; "" where it is as usual."""
    asked, recipe = setting.evaluation, json.loads(setting.common)["recipe"]
    limits = asked.get("limits") or {}
    return {
        "model": setting.model[0],
        "layers": f"layers {recipe.get('layers', 'all')}",
        "calibration": f"calibration {setting.text}" if setting.text else "",
        "protocol": f"protocol {asked['protocol']}" if asked.get("protocol") else "",
        "dtype": recipe["dtype"] if recipe.get("dtype") not in (None, "auto") else "",
        "ratio_of": f"ratio of the {recipe['ratio_of']}" if recipe.get("ratio_of", "chosen") != "chosen" else "",
        "limit": f"only {asked['limit']} documents a task" if asked.get("limit") else "",
        "limits": ", ".join(f"{name} {count}" for name, count in limits.items()),
    }


def _other_words(setting: Setting) -> dict[str, str]:
    """The same of what is said only where nothing else tells two settings apart."""
    others = {"fingerprint": setting.model[1][:8], **json.loads(setting.common)["recipe"], **setting.evaluation}
    return {name: f"{name} {_plain(value)}" for name, value in others.items() if name not in _words(setting)}


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
