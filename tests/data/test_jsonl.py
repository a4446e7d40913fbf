from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.data.jsonl import JsonLines
from limbeck.errors import ConfigError, DataError


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def entries(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"question": f"what is {n}?", "answer": f"it is {n}", **fields} for n in range(count)]


def load(folder: Path, *files: str, **fields: Any) -> Any:
    return JsonLines(files=files, root=str(folder), **{"text": "answer", **fields}).load()


def test_prompts_and_answers_of_two_files(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", entries(40))
    write(tmp_path / "two.jsonl.gz", entries(20))
    splits = load(tmp_path, "one.jsonl", "two.jsonl.gz", prompt="question", test=0.25)
    assert [len(part.documents) for part in (splits.train, splits.validation, splits.test)] == [42, 3, 15]
    assert splits.train.domains == ("one", "two")
    first = splits.train.documents[0]
    assert (first.prompt, first.text, first.domain) == ("what is 0?", "it is 0", 0)
    assert {d.domain for d in splits.validation.documents} == {0, 1}


def test_lines_may_say_their_part(tmp_path: Path) -> None:
    lines = [*entries(25, split="train"), *entries(4, split="validation"), *entries(6, split="test")]
    write(tmp_path / "a.jsonl", lines)
    splits = load(tmp_path, "a.jsonl", split="split")
    assert [len(part.documents) for part in (splits.train, splits.validation, splits.test)] == [25, 4, 6]
    splits = load(tmp_path, "a.jsonl", split="split", limit=3)
    assert [len(part.documents) for part in (splits.train, splits.validation, splits.test)] == [3, 3, 3]
    write(tmp_path / "b.jsonl", [*entries(30, split="train"), *entries(6, split="test")])
    splits = load(tmp_path, "b.jsonl", split="split", validation=0.1)
    assert [len(part.documents) for part in (splits.train, splits.validation, splits.test)] == [27, 3, 6]
    write(tmp_path / "c.jsonl", entries(30, split="dev"))
    with pytest.raises(
        DataError, match=r"c\.jsonl, line 1: split is 'dev': allowed are train, validation, test"
    ):
        load(tmp_path, "c.jsonl", split="split")


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"answer": f"{n}\u2028\x85 and\u2029 on"} for n in range(30)])
    splits = load(tmp_path, "a.jsonl")
    assert splits.train.documents[0].text == "0\u2028\x85 and\u2029 on"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"answer": "a"}\n{"answer": ', r"a\.jsonl, line 2: no JSON \("),
        ('["answer"]', r"a\.jsonl, line 1: a list, but each line must be an object"),
        ('{"answer": 3}', r"a\.jsonl, line 1: field 'answer' holds no text: the line has answer"),
        ("\n{}", r"a\.jsonl, line 2: field 'answer' holds no text: the line has nothing"),
        ("", "a: too little text of domain 'a' for its parts"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, "a.jsonl")
    assert "\n" not in str(error.value)


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match="files is empty: name at least one file of JSON lines"):
        JsonLines(files=())
    with pytest.raises(ConfigError, match="files names one file twice"):
        JsonLines(files=("a", "a"))
