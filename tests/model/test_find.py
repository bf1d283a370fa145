"""Where converted models are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicer.errors import ModelError
from dicer.model.find import cache_folder, find_model


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DICER_CACHE": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/own"),
        ({"DICER_CACHE": "", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/dicer"),
        ({"HOME": "/home/me"}, "/home/me/.cache/dicer"),
    ],
)
def test_cache_folder_on_linux(monkeypatch, environment, folder):
    for name in ("DICER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_no_home(monkeypatch, tmp_path):
    def unknown(*_):
        raise KeyError("no such user")

    for name in ("DICER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no home folder to keep x\.gguf converted in\. Set DICER_CACHE"):
        find_model(str(tmp_path / "x.gguf"))
