"""What goes to the hub: the files that are listed, of a folder that opens. Nothing here reaches a network."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from tiny import save_tiny

import dicer
from dicer.errors import ModelError, OutputError
from dicer.write.push import look_over, push

ALWAYS = {"README.md", "config.json", "dicer_plan.json", "dicer_plan.tensors", "generation_config.json"}
ALWAYS |= {"model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
STAY = ("optimizer.pt", "pytorch_model.bin", "own.py", ".env", "model.safetensors.bak", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    base = tmp_path_factory.mktemp("push")
    dense = save_tiny(base / "dense")
    for name, layers in (("differ", "1-2"), ("alike", "all")):
        dicer.prune(dense, dicer.Recipe(method="weight-l2", layers=layers), output=base / name)
    return base


@pytest.fixture
def folder(kept, tmp_path):
    return shutil.copytree(kept / "differ", tmp_path / "out")


class Hub:
    """The requests that are sent, and what a repository there holds."""

    def __init__(self):
        self.commits, self.made, self.files, self.private, self.error = [], [], [], True, None

    def create_repo(self, _, repo_id, *, private, exist_ok):
        assert exist_ok
        self.made.append((repo_id, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def upload_folder(self, _, *, repo_id, folder_path, allow_patterns, commit_message):
        """What the client's own filter lets through, as its upload_folder does."""
        assert commit_message
        if self.error:
            raise self.error
        there = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        self.commits.append((repo_id, set(filter_repo_objects(there, allow_patterns=allow_patterns))))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    for name in ("create_repo", "upload_folder"):
        method = getattr(found, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, *a, _m=method, **k: _m(api, *a, **k))
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "repo_info", lambda *_, **__: SimpleNamespace(private=found.private))
    monkeypatch.setattr(api, "list_repo_files", lambda *_, **__: found.files)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return found


@pytest.mark.parametrize("name", ["differ", "alike"])
def test_files_of_a_checkpoint(name, kept, tmp_path, hub):
    folder = shutil.copytree(kept / name, tmp_path / "out")
    for more in (*STAY, "NOTICE [1].txt", "added.vocab"):
        (folder / more).write_bytes(b"x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "config.json").write_text("{}")
    (folder / "adapter_model.safetensors").unlink()  # which is refused as what it is, beside weights
    upload = look_over(folder)
    names = {name for name, _ in upload.goes}
    code = {"modeling_pruned.py"} if name == "differ" else set()
    assert names == ALWAYS | code | {"NOTICE [1].txt", "added.vocab"}
    assert dict(upload.goes) == {name: (folder / name).stat().st_size for name in names}
    assert {name for name, _ in upload.stays} == {*STAY, "checkpoint-5"} - {"adapter_model.safetensors"}
    assert push(upload, "small", private=True) == "https://huggingface.co/me/small"
    assert hub.made == [("small", True)]
    assert hub.commits == [("me/small", names)]


def test_templates_in_their_folder(folder, hub):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    upload = look_over(folder)
    assert "additional_chat_templates/tools.jinja" in dict(upload.goes)
    assert upload.stays == ()
    push(upload, "me/small")
    assert "additional_chat_templates/tools.jinja" in hub.commits[0][1]


def test_dry_run(folder, hub, run):
    (folder / "optimizer.pt").write_bytes(b"x")
    out = run("push", folder, "me/small", "--dry-run")
    size = sum(file.stat().st_size for file in folder.iterdir()) - 1
    assert f"Would push 10 files ({size:,} bytes) to me/small; nothing was sent." in out
    assert "Stays here: optimizer.pt" in out
    for name in (ALWAYS - {"generation_config.json"}) | {"modeling_pruned.py"}:
        assert name in out
    assert (hub.made, hub.commits) == ([], [])


def test_pushed(folder, hub, run):
    assert "to https://huggingface.co/me/small." in run("push", folder, "me/small")
    assert hub.made == [("me/small", False)]


def half_written(folder):
    (folder / ".dicer-partial").write_text("")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")


def plan_alone(folder):
    for file in folder.iterdir():
        if not file.name.startswith("dicer_plan"):
            file.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (half_written, "is not finished"),
        (truncated, "model.safetensors"),
        (plan_alone, "config.json"),
        (adapter_beside, "adapter"),
        (lambda folder: (folder / "modeling_pruned.py").unlink(), "modeling_pruned.py"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (shutil.rmtree, "no folder"),
    ],
    ids=["half-written", "truncated", "a plan alone", "adapter", "no code", "no weights", "no folder"],
)
def test_no_finished_checkpoint(damage, says, folder, hub, refused):
    damage(folder)
    for more in ((), ("--dry-run",)):
        refused("push", folder, "me/small", *more, says=[says])
    assert (hub.made, hub.commits) == ([], [])


def test_folder_that_is_being_written(folder, tmp_path):
    (tmp_path / ".dicer-partial").write_text("")
    with pytest.raises(ModelError, match="is not finished"):
        look_over(folder)


def test_bad_name(folder, hub, refused):
    for name in ("a b", "a/b/c", ""):
        refused("push", folder, name, "--dry-run", says=["no name of a repository"])


def test_no_token(folder, hub, refused, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("push", folder, "me/small", says=["HF_TOKEN"])
    assert hub.made == []


def test_another_model_there(folder, hub):
    upload = look_over(folder)
    hub.files = ["README.md", "model-00001-of-00002.safetensors", "old/model.safetensors"]
    with pytest.raises(OutputError, match=r"holds model-00001-of-00002\.safetensors"):
        push(upload, "me/small")
    hub.files = ["model.safetensors", "config.json", "notes.txt"]  # an earlier one of the same layout is replaced
    push(upload, "me/small")
    assert len(hub.commits) == 1


def test_public_one_there(folder, hub, refused):
    hub.private = False
    refused("push", folder, "me/small", "--private", says=["is there and public"])
    assert hub.commits == []


FORBIDDEN = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route\nto host"), HfHubHTTPError("403 Forbidden", response=FORBIDDEN)],
    ids=["offline", "forbidden"],
)
def test_refusal_of_the_hub(error, folder, hub, refused):
    hub.error = error
    refused("push", folder, "me/small", says=["me/small was not pushed", str(error).splitlines()[0]])
