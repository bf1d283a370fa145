"""A text's name in files that travel: no path of this machine."""

from __future__ import annotations

import pytest

from dicer.ask.portable import base_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin", "builtin"),
        ("owner/name", "owner/name"),
        ("/home/me/text.txt", "text.txt"),
        ("data/rows.JSONL.GZ", "rows.JSONL.GZ"),
        ("data/rows.parquet", "rows.parquet"),
        ("/home/me/texts", "texts"),
        ("/home/me/texts/", "texts"),
        ("./texts", "texts"),
        ("texts/", "texts"),
        ("~/texts", "texts"),
        ("a/b/texts", "texts"),
    ],
)
def test_base_name(source, name):
    assert base_name(source) == name
