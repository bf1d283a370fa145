"""The whole path, as Python: make_plan, apply_plan, prune, load."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicer.calibration import Calibration, load_calibration, load_windows
from dicer.card import model_card
from dicer.checkpoint import CheckpointSink, check_output
from dicer.criteria import CRITERIA, Criterion, find_criterion
from dicer.errors import ModelError, RecipeError, unknown
from dicer.evaluate import perplexity
from dicer.families import legal
from dicer.grouping import GROUPINGS, random_groups, similarity_groups
from dicer.layer_statistics import LayerStatistics, Need, stream
from dicer.merging import MERGES, Survivors, keep_strongest, keep_top, merge_dominant, merge_mean
from dicer.plan import LayerPlan, PrunePlan, load_plan
from dicer.recipe import Method, Recipe, select_layers
from dicer.sources import ModelSource, copy_side_files, from_memory, open_model, tokenize_with
from dicer.surgery import MODELING_FILE, Cut, plan_cut, pruned_config, pruned_widths
from dicer.walk import LayerVisit, Progress, ResidentStore, walk

BATCH_TOKENS = 4096
PERPLEXITY_WINDOWS = 8
PERPLEXITY_LENGTH = 1024


def _silent(*_: object) -> None:
    """The progress callback that says nothing."""


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes, counted from the tensors that are really there.

    Attributes:
        parameters: all of them.
        mlp: those that belong to neurons (with their biases).
        nbytes: of all tensors.
    """

    parameters: int
    mlp: int
    nbytes: int


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
        notes: what the user should know of how the text was sampled, and of choices without effect.
    """

    plan: PrunePlan
    before: Sizes
    after: Sizes
    path: Path | None = None
    model: Any | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def needs_code(self) -> bool:
        """Whether the checkpoint carries a model file (its widths differ)."""
        return self.path is not None and (self.path / MODELING_FILE).is_file()


@dataclass(frozen=True)
class Job:
    """A recipe held against a model: everything that can be wrong has been looked at, and nothing been computed.

    Attributes:
        source: the model.
        recipe: what was asked.
        method: every choice of the recipe made.
        criterion: the scoring function.
        layers: layer -> (units, how many stay).
        calibration: the tokens, or None when nothing of the method looks at text.
    """

    source: ModelSource
    recipe: Recipe
    method: Method
    criterion: Criterion
    layers: dict[int, tuple[int, int]]
    calibration: Calibration | None

    @property
    def needs(self) -> frozenset[Need]:
        """The sums over activations that the method reads."""
        kinds = [kind for kind in ("square_sum", "sum") if kind in self.criterion.needs]
        needs = {Need(kind, self.method.activation) for kind in kinds}
        if self.method.grouped_by is not None:
            needs.add(Need("gram", self.method.grouped_by))
        if self.method.merge == "dominant" and self.method.grouping != "none":
            needs.add(Need("square_sum", "mod"))
        return frozenset(needs)

    @property
    def notes(self) -> list[str]:
        """What the user should know before the result surprises her."""
        notes = list(self.calibration.notes) if self.calibration else []
        if self.method.merge != "prune" and self.method.grouping == "none":
            notes.append(f"merge '{self.method.merge}' has nothing to merge without groups; name a --grouping")
        whole = [i for i, (units, keep) in self.layers.items() if units == keep]
        if whole:
            notes.append(f"{len(whole)} layers keep all their neurons: the ratio rounds to nothing there")
        return notes

    def sizes(self) -> tuple[Sizes, Sizes]:
        """What the model has and what it will have, known before anything is computed."""
        layers = {i: LayerPlan(n, torch.arange(k), torch.zeros(n)) for i, (n, k) in self.layers.items()}
        outline = PrunePlan({}, {}, {}, {}, {"mlp": layers})
        return _sizes(self.source, plan_cut(self.source.tensors, self.source.family, outline))


def prepare(source: ModelSource, recipe: Recipe, tokenizer: Any | None = None) -> Job:
    """Hold a recipe against a model.

    Args:
        source: the model.
        recipe: what was asked.
        tokenizer: for models in memory; others bring their own.

    Raises:
        RecipeError: names that are in no registry, layers that do not exist, a ratio that leaves no neuron.
        CalibrationError: the text cannot be had or is too short.
    """
    method = recipe.resolve()
    criterion = find_criterion(method.criterion, CRITERIA)
    for kind, name, known in (("grouping", method.grouping, GROUPINGS), ("merge", method.merge, MERGES)):
        if name not in known:
            raise RecipeError(unknown(kind, name, known))
    widths = source.family.widths(source.config)
    chosen = select_layers(recipe.layers, len(widths))
    layers = {i: (widths[i], legal(widths[i], recipe.ratio, recipe.width_multiple)) for i in chosen}
    for index, (_, keep) in layers.items():
        if method.groups is not None and method.groups > keep:
            raise RecipeError(
                f"--groups {method.groups} is more than the {keep} neurons that layer {index} keeps; "
                f"ask for at most {keep}."
            )
    job = Job(source, recipe, method, criterion, layers, None)
    if not job.needs and "gradient" not in criterion.needs:
        return job
    calibration = load_calibration(recipe, tokenize_with(tokenizer or source.tokenizer()))
    _check_tokens(calibration.tokens, source)
    return Job(source, recipe, method, criterion, layers, calibration)


def _check_tokens(tokens: Tensor, source: ModelSource) -> None:
    vocabulary, limit = int(source.config.vocab_size), int(source.config.max_position_embeddings)
    if int(tokens.max()) >= vocabulary:
        raise RecipeError(
            f"calibration has token id {int(tokens.max())}, and the model knows 0 to {vocabulary - 1}: these ids are "
            "from another tokenizer."
        )
    if source.family.learned_positions and tokens.shape[1] > limit:
        raise RecipeError(f"samples of {tokens.shape[1]} tokens are longer than the model's {limit} positions.")


def score_model(job: Job, model: Any, progress: Progress = _silent) -> PrunePlan:
    """Run the walk and decide for every chosen layer what stays.

    Args:
        job: from :func:`prepare`.
        model: the model in memory, in the dtype and on the device to compute with.
        progress: called with (stage, done, total).
    """
    recipe = job.recipe
    batches: Sequence[Tensor] = ()
    if job.calibration is not None:
        tokens = job.calibration.tokens
        batches = tokens.split(recipe.batch_size or max(1, BATCH_TOKENS // tokens.shape[1]))
    visits = walk(
        ResidentStore(model, job.source.family),
        job.layers,
        batches,
        needs=job.needs,
        gradient="gradient" in job.criterion.needs,
        checkpointing=recipe.gradient_checkpointing,
        progress=progress,
    )
    layers = {visit.index: _decide(job, visit) for visit in visits}
    return PrunePlan(
        model={
            "name": job.source.name,
            "model_type": str(job.source.config.model_type),
            "fingerprint": job.source.fingerprint,
        },
        recipe=_portable(recipe, job.method),
        calibration=job.calibration.provenance if job.calibration else {},
        versions={name: importlib.metadata.version(name) for name in ("dicer", "torch", "transformers")},
        axes={"mlp": layers},
    )


def _decide(job: Job, visit: LayerVisit) -> LayerPlan:
    """Scores, groups and survivors of one layer."""
    method, seed = job.method, job.recipe.seed
    units, keep = job.layers[visit.index]
    statistics = LayerStatistics(method.activation, visit.sums, stream(seed, visit.index, "criterion"), visit.gradient)
    scores = job.criterion(visit.weights, statistics)
    survivors = _survivors(job, visit, scores, units, keep)
    merge = survivors.merge
    if merge is None:
        return LayerPlan(units, survivors.keep, scores)
    return LayerPlan(units, survivors.keep, scores, merge.row, merge.weight_in, merge.weight_out)


def _survivors(job: Job, visit: LayerVisit, scores: Tensor, units: int, keep: int) -> Survivors:
    method = job.method
    if method.grouping == "none":
        return keep_top(scores, keep)
    if method.grouped_by is not None:
        labels = similarity_groups(visit.sums.get("gram", method.grouped_by), keep)
    else:
        labels = random_groups(units, method.groups or keep, stream(job.recipe.seed, visit.index, "grouping"))
    if method.merge == "mean":
        return merge_mean(scores, labels)
    if method.merge == "dominant":
        return merge_dominant(visit.sums.get("square_sum", "mod").sqrt().float().cpu(), labels)
    return keep_strongest(scores, labels, keep)


def _portable(recipe: Recipe, method: Method) -> dict[str, Any]:
    """The recipe with every choice made and without paths of this machine."""
    criterion = method.criterion
    if ".py:" in criterion:
        file, _, name = criterion.rpartition(":")
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        criterion = f"{Path(file).name}:{name} (sha256 {digest})"
    calib = Path(recipe.calib).name if recipe.calib.endswith((".txt", ".jsonl", ".gz")) else recipe.calib
    choices = method._asdict()
    return {**recipe.model_dump(), "method": choices.pop("preset"), **choices, "criterion": criterion, "calib": calib}


def make_plan(
    model: str | os.PathLike[str], recipe: Recipe | None = None, *, progress: Progress = _silent
) -> PrunePlan:
    """Decide which units of a model stay, and write nothing.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        recipe: what to do; the default is rc-a at 25% in all layers.
        progress: called with (stage, done, total).

    Raises:
        DicerError: anything that the user can mend.
    """
    job = prepare(open_model(model), recipe or Recipe())
    return score_model(job, _load_for_scoring(job), progress)


def _load_for_scoring(job: Job) -> Any:
    return job.source.load_model(job.recipe.dtype, pick_device(job.recipe.device))


def pick_device(asked: str) -> str:
    """``auto`` -> the first accelerator that is there, else the CPU.

    Raises:
        RecipeError: the device does not exist here.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=asked).tolist()  # 'meta' makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise RecipeError(f"device '{asked}' cannot be used here: {reason}. Use --device cpu or auto.") from None
    return asked


def apply_plan(
    plan: PrunePlan | str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Result:
    """Write the checkpoint that a plan describes, shard by shard, without loading the model.

    Args:
        plan: a plan, or where it lies.
        model: the model that the plan was made for.
        output: the folder to write; it appears whole or not at all.
        overwrite: replace an existing checkpoint, once the new one is whole.
        progress: called with (stage, done, total).

    Raises:
        DicerError: anything that the user can mend.
    """
    out = Path(output)
    check_output(out, overwrite=overwrite)
    loaded = plan if isinstance(plan, PrunePlan) else load_plan(Path(plan))
    source = open_model(model)
    loaded.check_model(str(source.config.model_type), source.fingerprint)
    result = Result(loaded, *_sizes(source, plan_cut(source.tensors, source.family, loaded)))
    with _timed(result, "write"):
        _write(result, source, out, overwrite, progress)
    return result


def prune(
    model: Any,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    perplexity_text: str | None = None,
    progress: Progress = _silent,
) -> Result:
    """Prune a model: score, decide, cut.

    Args:
        model: a transformers model in memory, or a hub id, a folder, a ``.gguf`` file, ``builtin:smollm2``.
        recipe: what to do; the default is rc-a at 25% in all layers.
        tokenizer: for a model in memory whose method looks at text.
        output: the folder to write. Without it the pruned model comes back in ``result.model``.
        overwrite: replace an existing checkpoint, once the new one is whole.
        perplexity_text: ``builtin`` or a text file: measure perplexity before and after, and put it into the card.
        progress: called with (stage, done, total).

    Returns:
        Result with ``path`` or ``model``, the plan, sizes and times. A model given in memory is left as it was.

    Raises:
        DicerError: anything that the user can mend; then nothing was written.
    """
    recipe = recipe or Recipe()
    out = Path(output) if output is not None else None
    if out is not None:
        check_output(out, overwrite=overwrite)
    in_memory = not isinstance(model, str | os.PathLike)
    source = from_memory(model) if in_memory else open_model(model)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    job = prepare(source, recipe, tokenizer)
    windows = _windows(perplexity_text, source, tokenizer) if perplexity_text else None
    dense = model if in_memory else _load_for_scoring(job)
    seconds["load"] = time.perf_counter() - start
    start = time.perf_counter()
    plan = score_model(job, dense, progress)
    seconds["score"] = time.perf_counter() - start
    cut = plan_cut(source.tensors, source.family, plan)
    result = Result(plan, *_sizes(source, cut), seconds=seconds, notes=job.notes)
    if windows is not None:
        with _timed(result, "perplexity"):
            result.perplexities["before"] = _perplexity(dense, windows, "perplexity before", progress)
    template = dense if in_memory else None
    del dense
    if out is None or windows is not None:
        with _timed(result, "cut"):
            result.model = _build(source, cut, plan, template, recipe)
    if windows is not None:
        with _timed(result, "perplexity"):
            result.perplexities["after"] = _perplexity(result.model, windows, "perplexity after", progress)
    if out is not None:
        result.model = None
        with _timed(result, "write"):
            _write(result, source, out, overwrite, progress, model if in_memory else None, tokenizer, perplexity_text)
    return result


def _windows(text: str, source: ModelSource, tokenizer: Any | None) -> Tensor:
    tokenize = tokenize_with(tokenizer or source.tokenizer())
    if tokenize is None:
        raise ModelError(f"{source.name} has no tokenizer, so perplexity on text cannot be measured.")
    length = min(PERPLEXITY_LENGTH, int(source.config.max_position_embeddings))
    return load_windows(text, tokenize, length, PERPLEXITY_WINDOWS)


def _perplexity(model: Any, windows: Tensor, stage: str, progress: Progress) -> float:
    return perplexity(model, windows, progress=lambda done, total: progress(stage, done, total))


def _build(source: ModelSource, cut: Cut, plan: PrunePlan, template: Any | None, recipe: Recipe) -> Any:
    """The pruned model in memory: a new config and sliced tensors; no module is edited."""
    import transformers

    from dicer.export import modeling_pruned

    family = source.family
    raw = pruned_config(source.raw_config, family, pruned_widths(source.config, family, plan))
    kind, auto_map = raw.pop("model_type"), raw.pop("auto_map", None)
    config = transformers.AutoConfig.for_model(kind, **raw)
    if auto_map is None:
        model_class = getattr(transformers, family.causal_lm)
    else:
        model_class = getattr(modeling_pruned, family.pruned_classes["AutoModelForCausalLM"])
        config.auto_map = auto_map
    state = {name: cut.read(name) for name in cut.infos}
    if template is not None:
        dtype, device = template.dtype, template.device
    else:
        dtype, device = recipe.dtype, pick_device(recipe.device)
    pruned: Any = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return pruned.to(device).eval()


def _sizes(source: ModelSource, cut: Cut) -> tuple[Sizes, Sizes]:
    mlp = {piece.name for piece in source.family.mlp.slices}
    neurons = {name for name in cut.infos if (place := source.family.locate(name)) and place[1] in mlp}
    return tuple(  # type: ignore[return-value]
        Sizes(
            sum(info.numel for info in infos.values()),
            sum(infos[name].numel for name in neurons),
            sum(info.nbytes for info in infos.values()),
        )
        for infos in (cut.before, cut.infos)
    )


def _write(
    result: Result,
    source: ModelSource,
    out: Path,
    overwrite: bool,
    progress: Progress,
    model: Any | None = None,
    tokenizer: Any | None = None,
    perplexity_text: str | None = None,
) -> None:
    """The checkpoint folder of DESIGN section 4, whole or not at all."""
    cut = plan_cut(source.tensors, source.family, result.plan)
    config = pruned_config(source.raw_config, source.family, pruned_widths(source.config, source.family, result.plan))
    with CheckpointSink(out, overwrite=overwrite) as sink:
        sink.require_space(result.after.nbytes)
        if source.folder is not None:
            copy_side_files(source.folder, sink.folder)
        elif model is not None and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(sink.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(sink.folder)
        result.plan.save(sink.folder)
        if "auto_map" in config:
            code = importlib.resources.files("dicer.export").joinpath(MODELING_FILE)
            sink.write_text(MODELING_FILE, code.read_text(encoding="utf-8"))
        sink.write_tensors(cut.infos, cut.read, lambda done: progress("write", done, len(cut.infos)))
        sink.write_json("config.json", config)
        sink.write_text(
            "README.md",
            model_card(
                result.plan,
                before=result.before,
                after=result.after,
                needs_code="auto_map" in config,
                perplexities=result.perplexities,
                perplexity_text=Path(perplexity_text).name if perplexity_text else None,
            ),
        )
    result.path = out


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
    pieces = {piece.name for piece in family.mlp.slices}
    counts = {
        "MLP neurons": sum(n for name, n in inside.items() if (p := family.locate(name)) and p[1] in pieces),
        "attention": sum(n for name, n in inside.items() if "attn." in name),
        "embeddings and head": sum(
            info.numel for name, info in infos.items() if name not in inside and len(info.shape) == 2
        ),
    }
    total = sum(info.numel for info in infos.values())
    counts["norms and the rest"] = total - sum(counts.values())
    width = str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"
    rows = [
        ("family", family.model_type),
        ("layers", f"{len(widths)} (0 to {len(widths) - 1})"),
        ("neurons a layer", width),
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
        kept = sorted({keep for _, keep in job.layers.values()})
        shown = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        share = after.parameters / total
        left.append((f"{percent}%", shown, f"{after.parameters:,}", f"{share:.1%}", f"{after.nbytes / 1e9:.3f} GB"))
    return Facts(source.name, rows, left)


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """Load a pruned checkpoint, or any other, without running code from its folder.

    Args:
        path: a folder or hub id.
        **options: for ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...).

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)


@contextmanager
def _timed(result: Result, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result.seconds[stage] = result.seconds.get(stage, 0.0) + time.perf_counter() - start


def peak_memory() -> dict[str, int]:
    """Most bytes that this process has held: ``host``, and each CUDA device that was used."""
    scale = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            peaks[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peaks
