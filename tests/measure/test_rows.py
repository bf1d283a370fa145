"""Calibration reads what people have: every format of rows, folders, and chats through the model's own template."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys

import pytest
import torch
from texts import DOCUMENTS, contains, jsonl, tokenize
from tiny import save_tiny, tiny_tokenizer

import dicer
from dicer.ask.text import Text
from dicer.errors import CalibrationError
from dicer.measure import rows as rows_module
from dicer.measure import text as text_module
from dicer.measure.documents import check_text, is_local, read_documents
from dicer.measure.text import load_calibration, load_windows
from dicer.model.source import tokenize_with

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
BOM = b"\xef\xbb\xbf"
ROWS = [{"text": document, "id": number} for number, document in enumerate(DOCUMENTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter=","):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def parquet(rows):
    from pyarrow import parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


ARRAY = json.dumps(ROWS, indent=2).encode()
FORMATS = {
    "a.jsonl": LINES,
    "A.JSONL": LINES,
    "a.Jsonl.GZ": gzip.compress(LINES),
    "bom.jsonl": BOM + LINES,
    "bom.jsonl.gz": gzip.compress(BOM + LINES),
    "a.ndjson": LINES,
    "a.json": ARRAY,
    "bom.json": BOM + ARRAY,
    "a.json.gz": gzip.compress(ARRAY),
    "lines.json": LINES,
    "under.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "texts.json": json.dumps(DOCUMENTS).encode(),
    "a.csv": table(),
    "A.CSV": table(),
    "bom.csv": BOM + table(),
    "a.csv.gz": gzip.compress(table()),
    "a.tsv": table("\t"),
    "a.parquet": parquet(ROWS),
    "A.PARQUET": parquet(ROWS),
}


def read(source, own=tokenize, **more):
    return load_calibration(Text(calib=str(source), **{"samples": 6, "seq_len": 20, **more}), own)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_samples_in_every_format(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    check_text(Text(calib=str(tmp_path / name)))
    assert list(read_documents(tmp_path / name, "text")) == DOCUMENTS
    expected = read(jsonl(tmp_path / "expected.jsonl", DOCUMENTS))
    assert torch.equal(read(tmp_path / name).tokens, expected.tokens)
    assert read(tmp_path / name).provenance["source"] == name
    assert torch.equal(
        load_windows(str(tmp_path / name), tokenize, 30, 4),
        load_windows(str(tmp_path / "expected.jsonl"), tokenize, 30, 4),
    )


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "A.Txt.Gz", "bom.txt", "a.md", "a.text"])
def test_plain_texts(tmp_path, name):
    content = (BOM if name.startswith("bom") else b"") + "Grüße. ".encode() * 40
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert list(read_documents(tmp_path / name, "text")) == ["Grüße. " * 40]
    assert read(tmp_path / name).tokens.shape == (6, 20)


def test_folder_of_texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for number, document in enumerate(DOCUMENTS):
        (folder / ("deeper" if number % 2 else "") / f"{number:02}.txt").write_text(document)
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\xff")
    check_text(Text(calib=str(folder)))
    assert sorted(read_documents(folder, "text")) == sorted(DOCUMENTS)
    calibration = read(folder)
    assert calibration.provenance["source"] == "texts"
    ids = [tokenize(document) for document in DOCUMENTS]
    assert all(any(contains(document, row) for document in ids) for row in calibration.tokens.tolist())


def test_folder_of_files_of_rows(tmp_path):
    (tmp_path / "0.csv").write_bytes(table())
    (tmp_path / "1.jsonl").write_bytes(LINES)
    (tmp_path / "2.parquet").write_bytes(parquet(ROWS))
    assert list(read_documents(tmp_path, "text")) == DOCUMENTS * 3


@pytest.mark.parametrize("kind", ["one", "splits"])
def test_saved_data_set(tmp_path, kind):
    made = datasets.Dataset.from_list(ROWS)
    if kind == "splits":
        made = datasets.DatasetDict(validation=made, test=made.select(range(1)))
    made.save_to_disk(tmp_path / "owner" / "saved")
    more = {"calib_split": "validation"} if kind == "splits" else {}
    expected = read(jsonl(tmp_path / "expected.jsonl", DOCUMENTS))
    assert torch.equal(read(tmp_path / "owner" / "saved", **more).tokens, expected.tokens)
    if kind == "splits":
        with pytest.raises(CalibrationError, match=r"no split 'train' \(has: validation, test\)"):
            read(tmp_path / "owner" / "saved")


def test_names_of_folders(tmp_path, monkeypatch):
    """OWNER/NAME is the hub's; where a folder here is called so, it has to be said which one is meant."""
    monkeypatch.chdir(tmp_path)
    for name in ("owner/texts", "owner/rows", "texts", "c4", "Salesforce/wikitext"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "owner" / "texts" / "a.txt").write_text("a")
    jsonl(tmp_path / "owner" / "rows" / "train.jsonl", ["a"])
    names = ("./owner/texts", "./owner/rows", "owner/rows/", "texts", "c4", "", "builtin", "nowhere/else", "a/b.txt")
    own = ["./owner/texts", "./owner/rows", "owner/rows/", "texts", "a/b.txt"]
    assert [name for name in names if is_local(name)] == own
    for name, folder in (("owner/texts", "owner/texts"), ("owner/rows",) * 2, ("wikitext2", "Salesforce/wikitext")):
        with pytest.raises(CalibrationError, match=rf"'{name}' is a data set of the hub, and .* write \./{folder} for"):
            check_text(Text(calib=name))
    with pytest.raises(CalibrationError, match=r"texts is a folder without a file that ends in \.txt, "):
        check_text(Text(calib="texts"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved"])
def test_ready_rows_in_every_format(tmp_path, name):
    rows = [
        {"input_ids": [5, 6, 7, 8], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [9, 8, 7], "attention_mask": [1, 1, 1]},
    ]
    path = tmp_path / name
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif name == "a.csv":
        path.write_text('input_ids,attention_mask\n"[5, 6, 7, 8]","[0, 1, 1, 1]"\n"[9, 8, 7]","[1, 1, 1]"\n')
    else:
        content = {"a.jsonl": "\n".join(map(json.dumps, rows)), "a.json": json.dumps(rows)}.get(name)
        path.write_bytes(content.encode() if content else parquet(rows))
    assert load_calibration(Text(calib=str(path)), None).tokens.tolist() == [[6, 7, 8], [9, 8, 7]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"[1, 2]", "a.json, row 1: not a JSON object"),
        ("a.json", b"[{", "a.json is no JSON"),
        ("a.json", b"3", "holds no JSON array of rows"),
        ("a.json", b"[" * 10**5, "a.json is no JSON"),
        ("a.json", b'{"text": "a"}\n{', "a.json, line 2: not a JSON object"),
        ("a.csv", b'id,text\n1,"a', "no CSV|too short"),
        ("a.csv", b"id,text\n1,2,3\n", "row 1: not as many fields"),
        ("a.csv", b"id,body\n1,2\n", r"no text in the field 'text' \(has: id, body\)"),
        ("a.csv", b"id,text\n1,caf\xe9\n", "a.csv cannot be read: 'utf-8'"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet is no parquet file"),
        ("a.parquet", b"", "a.parquet is no parquet file"),
        ("a.txt.gz", b"plain", "a.txt.gz cannot be read: Not a gzipped file"),
        ("mixed/a.jsonl", b'{"input_ids": [5, 6]}', "holds ready input_ids and plain texts"),
    ],
)
def test_what_is_no_such_file(tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if name.startswith("mixed"):
        path.with_name("b.txt").write_text("text")
        path = path.parent
    with pytest.raises(CalibrationError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "what"), [("pyarrow", "a.parquet needs pyarrow"), ("datasets", "saved .* needs")])
def test_libraries_that_are_not_there(tmp_path, monkeypatch, module, what):
    (tmp_path / "a.parquet").write_bytes(FORMATS["a.parquet"])
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CalibrationError, match=rf"{what}.*pip install 'dicer\[data\]'"):
        read(tmp_path / ("a.parquet" if module == "pyarrow" else "saved"))
    assert list(read_documents(jsonl(tmp_path / "a.jsonl", DOCUMENTS), "text")) == DOCUMENTS


def test_limit_of_a_stream(tmp_path, monkeypatch):
    seen = []

    def endless(path, split):
        for number in range(10**9):
            seen.append(number)
            yield rows_module.Row("row", {"text": DOCUMENTS[number % 12]})

    monkeypatch.setattr(text_module, "_MOST_CHARACTERS", 5000)
    monkeypatch.setattr("dicer.measure.documents.read_rows", endless)
    calibration = read(tmp_path / "a.jsonl")
    assert len(seen) < 30
    assert re.match(r"of 'a.jsonl' the first 5,\d\d\d characters are drawn from", calibration.notes[0])


# Chats

TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t }}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}</s>\n"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
]
SHAREGPT = [{"from": name, "value": m["content"]} for name, m in zip(("system", "human", "gpt"), CHAT, strict=True)]
SAID = "<|system|>Be kind.</s>\n<|user|>Hi?</s>\n<|assistant|>Yes.</s>\n"


@pytest.fixture(scope="module")
def chatting():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenize_with(tokenizer)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": CHAT}, SAID),
        ({"conversations": SHAREGPT}, SAID),
        ({"conversations": SHAREGPT[1:], "system": "Be kind."}, SAID),
        ({"conversation": CHAT, "id": 3, "text": None}, SAID),
        ({"messages": [m | {"name": None, "weight": 1} for m in CHAT]}, SAID),
        ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]}, SAID),
        ({"messages": CHAT, "tools": [{"name": "clock"}]}, "<tool>{'name': 'clock'}" + SAID),
        ({"messages": CHAT, "tools": '[{"name": "clock"}]'}, "<tool>{'name': 'clock'}" + SAID),
        ({"messages": CHAT, "tools": None, "chat_template_kwargs": {"tools": [{"a": 1}]}}, "<tool>{'a': 1}" + SAID),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "<|assistant|>['f']</s>\n"),
        ({"messages": CHAT, "text": "its own text"}, "its own text"),
    ],
)
def test_chats(tmp_path, chatting, row, text):
    assert list(read_documents(jsonl(tmp_path / "a.jsonl", [row]), "text", chatting.template)) == [text]


def test_special_tokens_of_a_template(chatting):
    ids = chatting(chatting.template(CHAT[1:2]))
    assert ids[-2:] == [2, *tokenize("\n")]  # </s>, once


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "saved"])
def test_chats_in_every_format(tmp_path, chatting, name):
    rows = [{"messages": CHAT}] * 20
    path = tmp_path / name
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_bytes(
            {"a.jsonl": "\n".join(map(json.dumps, rows)).encode(), "a.json": json.dumps(rows).encode()}.get(name)
            or parquet(rows)
        )
    calibration = read(path, own=chatting)
    assert contains(chatting("\n\n".join([SAID] * 20)), calibration.tokens[0].tolist())


def test_chats_of_the_hub(monkeypatch, chatting):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: ({"messages": CHAT} for _ in range(20)))
    assert contains(chatting("\n\n".join([SAID] * 20)), read("owner/chats", own=chatting).tokens[0].tolist())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "alien", "content": "x"}]}, r"a role \(not 'alien'\) and a text"),
        ({"messages": [{"role": "user"}]}, "a message must have a role"),
        ({"messages": ["Hi"]}, "a message must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "other parts than text"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, "'weight' leaves a message out"),
        ({"conversations": [{"from": "human", "value": 3}]}, "and a text"),
        ({"messages": CHAT, "tools": "clock"}, "tools are no JSON list"),
    ],
)
def test_what_is_no_chat(tmp_path, chatting, row, says):
    with pytest.raises(CalibrationError, match=rf"a\.jsonl, row 1: .*{says}") as caught:
        list(read_documents(jsonl(tmp_path / "a.jsonl", [row]), "text", chatting.template))
    assert "\n" not in str(caught.value)


def test_chats_without_a_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"row 1: 'messages' is a chat, .* has no chat template"):
        read(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(CalibrationError, match="row 1: the model's chat template refuses it: roles must alternate"):
        read(path, own=tokenize_with(tokenizer))


def test_chats_from_end_to_end(tmp_path):
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    path = jsonl(tmp_path / "a.jsonl", [{"conversations": SHAREGPT}] * 40)
    recipe = dicer.Recipe(calib=str(path), samples=4, seq_len=32)
    assert dicer.prune(model, recipe, output=tmp_path / "out", perplexity_text=str(path)).perplexities["before"] > 0
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
