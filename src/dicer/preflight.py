"""What is known of a run before anything is read or computed, and all that can be wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.ask.recipe import Recipe
from dicer.decide.cost import check_streams, planned_bytes
from dicer.decide.task import Asked, Decided, prepare
from dicer.errors import RecipeError
from dicer.evaluate.texts import check_texts
from dicer.holds import check_output
from dicer.machine import pick_device
from dicer.measure.documents import check_source, check_text
from dicer.model.sizes import Sizes, count_sizes
from dicer.model.source import from_memory, open_model
from dicer.write.opened import as_source, check_cut
from dicer.write.proof import Proof, check_proofs
from dicer.write.prove import proofs_for, prove
from dicer.write.sink import check_space
from dicer.write.surgery import Cut, plan_cut
from dicer.write.targets import targets_line


@dataclass(frozen=True)
class Look:
    """What is known of a run before anything is read or computed.

    Attributes:
        task: the recipe, held against the model; a ``Decided`` where it is known how much stays.
        before: sizes of the model.
        after: sizes of what it will be; the same as before where only a run of the model can tell.
        device: to compute on.
        cut: what would become of every tensor; None where only a run of the model can tell.
        proofs: of the structure, where it was found.
        tokenizer: of a model on disk, where a text will be read.
    """

    task: Asked
    before: Sizes
    after: Sizes
    device: str
    cut: Cut | None = None
    proofs: Sequence[Proof] = ()
    tokenizer: Any | None = None

    @property
    def targets(self) -> str:
        """What will load the result, in one line; empty where only a run of the model can tell."""
        return "" if self.cut is None else targets_line(as_source(self.cut))


def look(
    model: Any,
    recipe: Recipe | None = None,
    compute: Compute | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    perplexity_text: str | None = None,
    fidelity_text: str | None = None,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> Look:
    """Check everything that can be wrong with a run, and say what it would do; no text is read, no weight loaded.

    Args:
        model: as for :func:`prune`.
        recipe: what to do.
        compute: how.
        output: the folder that would be written.
        overwrite: whether an earlier checkpoint there may be replaced.
        perplexity_text: what perplexity would be measured on.
        fidelity_text: what the pruned model would be compared with the dense one on, with a comma between two.
        inputs: what else the run reads, which must not lie in ``output``.

    Raises:
        DicerError: anything that the user can mend.
    """
    recipe = recipe or Recipe()
    compute = recipe.compute_or(compute)
    in_memory = not isinstance(model, str | os.PathLike)
    if output is not None:
        texts: dict[str, Any] = {"perplexity_text": perplexity_text, "fidelity_text": fidelity_text}
        check_place(model, recipe, output, overwrite=overwrite, inputs=inputs, **texts)
    source = from_memory(model, recipe.family) if in_memory else open_model(model, recipe.family)
    task = prepare(source, recipe, _as_it_is(model, compute) if in_memory else compute)
    check_streams(task, whole=bool(perplexity_text or fidelity_text))
    if task.runs_model:
        for text in recipe.texts:
            check_text(text)
    if perplexity_text is not None:
        check_source(perplexity_text, ("builtin",), "perplexity text")
    check_texts(fidelity_evaluation(fidelity_text).text)
    source.generation_config()
    reads = task.runs_model or perplexity_text is not None or fidelity_text is not None
    tokenizer = source.tokenizer() if reads else None
    check_proofs(source, proofs := prove(source, proven_axes(task)))
    cut = None
    if isinstance(task, Decided):
        proofs = proofs_for(source, task.outline(), proofs)
        check_cut(cut := plan_cut(source, task.outline()))
        before, after = cut.sizes()
        if "auto_map" in cut.config:
            source.unnamed_tokenizer_class()
        if recipe.stock and "auto_map" in cut.config:
            raise RecipeError(
                f"{source.name}: transformers' own {source.family.causal_lm} does not take the config that this would "
                "have (fewer heads with longrope, say): use --axis mlp, or leave --stock out."
            )
    else:
        before, after = foreseen(task)
    if output is not None:
        check_space(Path(output), after.nbytes + planned_bytes(task))
    return Look(task, before, after, pick_device(task.compute.device), cut, proofs, tokenizer)


def check_place(
    model: Any,
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    perplexity_text: str | None,
    fidelity_text: str | None,
    inputs: Iterable[str | os.PathLike[str] | None],
) -> None:
    """Refuse an output that the run could not write, or that holds what it reads; before anything else is done."""
    texts = [perplexity_text, *fidelity_evaluation(fidelity_text).text]
    read = [*recipe.files(), *texts, model if isinstance(model, str | os.PathLike) else None, *inputs]
    check_output(Path(output), overwrite=overwrite, inputs=read)


def proven_axes(task: Asked) -> list[str]:
    """The axes that a run would cut; ``block`` where whole layers may go."""
    axes = sorted({place.axis for place in task.places})
    return axes + (["block"] if task.method.axis == "block" else [])


def foreseen(task: Asked) -> tuple[Sizes, Sizes]:
    """What the model has and what it will have; the same again where the model has to run first."""
    if isinstance(task, Decided):
        return plan_cut(task.source, task.outline()).sizes()
    sizes = count_sizes(task.source.family, task.source.tensors.infos())
    return sizes, sizes


def fidelity_evaluation(text: str | None) -> Evaluation:
    """The comparison with the dense model on these texts; none without."""
    return Evaluation(text=text) if text else Evaluation()  # type: ignore[arg-type]


def _as_it_is(model: Any, compute: Compute) -> Compute:
    """Machine options with device and dtype of a model in memory, which nothing changes.

    Raises:
        RecipeError: others are asked for.
    """
    found = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    for name, value in found.items():
        asked = getattr(compute, name)
        if asked not in ("auto", value, value.partition(":")[0]):  # a GPU's own number need not be said
            raise RecipeError(f"{name} {asked} is asked for, and the model in memory has {value}; move it first.")
    return compute.model_copy(update=found)
