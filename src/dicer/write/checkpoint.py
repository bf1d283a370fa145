"""A pruned model as a folder, or in memory, and what is known of the run that made it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicer.decide.plan import PrunePlan
from dicer.model.find import no_bars
from dicer.model.sizes import Sizes
from dicer.model.source import ModelSource
from dicer.write.card import model_card
from dicer.write.config import MODELING_FILE
from dicer.write.opened import check_written, described
from dicer.write.side_files import copy_side_files
from dicer.write.sink import CheckpointSink
from dicer.write.surgery import Cut
from dicer.write.targets import targets_line


@dataclass
class Result:
    """What a run did.

    Attributes:
        plan: which units stay.
        before: sizes of the dense model.
        after: sizes of the pruned one.
        path: the checkpoint folder, when one was written.
        model: the pruned model, when it was asked for in memory.
        seconds: stage -> wall time.
        perplexities: ``before`` and ``after``, when text for it was given.
        fidelity: what was lost of the dense model (:func:`dicer.evaluate.fidelity.fidelity`), when text was given.
        targets: what loads the checkpoint, in one line, when one was written.
        notes: what the user should know of how the text was sampled, and of choices without effect.
    """

    plan: PrunePlan
    before: Sizes
    after: Sizes
    path: Path | None = None
    model: Any | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    targets: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def needs_code(self) -> bool:
        """Whether the checkpoint carries a model file (its widths differ)."""
        return self.path is not None and (self.path / MODELING_FILE).is_file()


def build_model(cut: Cut, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """The pruned model in memory: a new config and sliced tensors; no module is edited.

    Args:
        cut: what becomes of every tensor.
        dtype: ``auto`` (the checkpoint's own) or a torch dtype.
        device: a torch device.
    """
    source = cut.source
    model_class, config = described(cut)
    state = {name: cut.read(name) for name in cut.infos}
    if source.live is not None:  # what was not cut is still the dense model's own memory
        state = {name: tensor if name in cut.made else tensor.clone() for name, tensor in state.items()}
    with no_bars():
        pruned: Any = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if (generation := source.generation_config()) is not None:
        pruned.generation_config = generation
    return pruned.to(device).eval()


def write_checkpoint(
    result: Result,
    cut: Cut,
    out: Path,
    progress: Callable[[str, int, int], None],
    *,
    overwrite: bool = False,
    tokenizer: Any | None = None,
    perplexity_text: str | None = None,
) -> None:
    """Write the checkpoint folder, whole or not at all, shard by shard, and note in ``result`` where it is.

    Args:
        result: the plan, and what the model card says of it.
        cut: what becomes of every tensor.
        out: the folder.
        progress: called with (stage, done, total).
        overwrite: replace an existing checkpoint, once the new one is whole.
        tokenizer: of a model in memory; a model folder has its own.
        perplexity_text: what ``result.perplexities`` were measured on.

    Raises:
        OutputError: it cannot be written, or what was written cannot be opened.
        ModelError: a file of the model cannot be read.
    """
    config, source = dict(cut.config), cut.source
    if "auto_map" in config and (tokenizer_class := source.unnamed_tokenizer_class()) is not None:
        config["tokenizer_class"] = tokenizer_class
    with CheckpointSink(out, overwrite=overwrite) as sink:
        _write_side_files(sink, source, tokenizer)
        result.plan.save(sink.folder)
        if "auto_map" in config:
            code = importlib.resources.files("dicer.write.export").joinpath(MODELING_FILE)
            sink.write_text(MODELING_FILE, code.read_text(encoding="utf-8"))
        sink.write_tensors(cut.infos, cut.written, lambda done: progress("write", done, len(cut.infos)))
        source.check_unchanged()
        sink.write_json("config.json", config)
        result.targets = targets_line(check_written(sink.folder, out, source))
        card = model_card(
            result.plan,
            before=result.before,
            after=result.after,
            needs_code="auto_map" in config,
            targets=result.targets,
            perplexities=result.perplexities,
            fidelity=result.fidelity,
            perplexity_text=Path(perplexity_text).name if perplexity_text else None,
        )
        sink.write_text("README.md", card)
    result.path = out


def _write_side_files(sink: CheckpointSink, source: ModelSource, tokenizer: Any | None) -> None:
    """What belongs to a model besides weights and config, from its folder or from memory."""
    if source.folder is not None:
        copy_side_files(source.folder, sink.folder)
    elif (generation := source.generation_config()) is not None:
        sink.write_json("generation_config.json", generation.to_diff_dict())  # save_pretrained refuses odd, usual ones
    if tokenizer is not None:
        tokenizer.save_pretrained(sink.folder)
