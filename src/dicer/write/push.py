"""A finished checkpoint as a repository of the hub: what goes, what does not and why."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dicer.decide.plan import PLAN_JSON, TENSORS
from dicer.errors import ModelError, OutputError
from dicer.model.beside import TEMPLATES, files_beside, leads_out
from dicer.model.source import ModelSource
from dicer.model.tensors import INDEX, SafetensorsSource
from dicer.write.config import MODELING_FILE
from dicer.write.opened import check_folder
from dicer.write.sink import MADE_BY_EXPORT, is_unfinished

_OURS = ("config.json", INDEX, PLAN_JSON, TENSORS, MADE_BY_EXPORT, "BASE_MODEL_CARD.md")
_LOADED = (".safetensors", ".safetensors.index.json", "adapter_config.json")  # what transformers would also read


@dataclass(frozen=True)
class Upload:
    """What of a folder goes to the hub.

    Attributes:
        folder: the checkpoint.
        goes: (name, bytes) of every file.
        stays: (name, reason) of everything else at its top.
    """

    folder: Path
    goes: tuple[tuple[str, int], ...]
    stays: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files that go."""
        return sum(size for _, size in self.goes)


def look_over(folder: Path) -> Upload:
    """Open a folder as whoever fetches it would, and say which of its files belong to the checkpoint.

    Raises:
        ModelError: it is no finished checkpoint.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give one that 'dicer prune' wrote.")
    if is_unfinished(folder):
        raise ModelError(f"{folder} is not finished: a run of dicer writes it, or was killed. Write it anew.")
    source = check_folder(folder)
    has_code = "auto_map" in source.raw_config
    if has_code and not (folder / MODELING_FILE).is_file():
        raise ModelError(f"{folder}: {MODELING_FILE}, which its config names, is not there. Write the folder anew.")
    wanted = dict(_wanted(folder, source, has_code=has_code))
    goes = tuple((name, path.stat().st_size) for name, path in sorted(wanted.items()))
    return Upload(folder, goes, tuple(_left(folder, set(wanted))))


def _wanted(folder: Path, source: ModelSource, *, has_code: bool) -> Iterator[tuple[str, Path]]:
    weights = source.tensors.files if isinstance(source.tensors, SafetensorsSource) else []
    for name in (*weights, *_OURS, *((MODELING_FILE,) if has_code else ())):
        if (folder / name).is_file() and not leads_out(folder / name, folder):
            yield name, folder / name
    for path, reason in files_beside(folder):
        if reason is None:
            yield path.relative_to(folder).as_posix(), path


def _left(folder: Path, wanted: set[str]) -> Iterator[tuple[str, str]]:
    reasons = {path.relative_to(folder).as_posix(): reason for path, reason in files_beside(folder) if reason}
    for path in sorted(folder.iterdir()):
        if path.name in wanted or (path.name == TEMPLATES and any(name.startswith(f"{TEMPLATES}/") for name in wanted)):
            continue
        if path.is_dir():
            yield path.name, "is a folder"
        elif path.name.startswith("."):
            yield path.name, "is hidden"
        else:
            yield path.name, reasons.get(path.name, "is neither of this checkpoint's weights nor a text beside them")


def check_repository(repository: str) -> None:
    """See to it that a name can be one of the hub, before anything is sent.

    Raises:
        OutputError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its __all__

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(f"'{repository}' is no name of a repository (OWNER/NAME): {error}") from None


def push(upload: Upload, repository: str, *, private: bool = False) -> str:
    """Send the files of a checkpoint, and only them; the repository is made where there is none.

    Args:
        upload: from :func:`look_over`.
        repository: OWNER/NAME, or NAME for one's own.
        private: nobody else may see it; of one that is there, it must be so already.

    Returns:
        Its address.

    Raises:
        OutputError: no token, a repository that holds another model or is public, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    check_repository(repository)
    if get_token() is None:
        raise OutputError("no token of the hub was found: log in with 'hf auth login', or set HF_TOKEN.")
    api, names = HfApi(), [name for name, _ in upload.goes]
    try:
        found = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(found.repo_id).private:
            raise OutputError(
                f"{found.repo_id} is there and public: make it private on the hub, or leave --private out."
            )
        there = [name for name in api.list_repo_files(found.repo_id) if "/" not in name and name.endswith(_LOADED)]
        if others := sorted({*there} - {*names}):
            raise OutputError(
                f"{found.repo_id} holds {others[0]}, which would be loaded beside this model or instead of it: choose "
                "another name, or delete it there first."
            )
        api.upload_folder(
            repo_id=found.repo_id,
            folder_path=upload.folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload a checkpoint pruned by dicer",
        )
    except OutputError:
        raise
    except Exception as error:  # the client raises a dozen kinds: offline, no right to write, too large ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"{repository} was not pushed: {reason.rstrip('.')}. Check the name, the token and the connection."
        ) from None
    return str(found)
