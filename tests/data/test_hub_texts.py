from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.data.hub_texts import HubTexts
from limbeck.errors import ConfigError, DataError

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, **parts: int) -> str:
    """A local data set of parquet files, with so many rows in each part."""
    import datasets

    folder.mkdir()
    for part, count in parts.items():
        rows = {
            "question": [f"what is {n}?" for n in range(count)],
            "answer": [f"it is {part} {n}" for n in range(count)],
        }
        datasets.Dataset.from_dict(rows | {"size": list(range(count))}).to_parquet(folder / f"{part}.parquet")
    return str(folder)


def sizes(splits: Any) -> list[int]:
    return [len(part.documents) for part in (splits.train, splits.validation, splits.test)]


def test_parts_of_the_data_sets_own(tmp_path: Path) -> None:
    path = write(tmp_path / "own", train=3, validation=2, test=4)
    splits = HubTexts(path=path, text="answer", prompt="question").load()
    assert sizes(splits) == [3, 2, 4]
    assert splits.train.documents[1].text == "it is train 1"
    assert splits.train.documents[1].prompt == "what is 1?"
    assert splits.test.documents[0].text == "it is test 0"
    assert (splits.name, splits.train.domains) == (path, (path,))
    assert sizes(HubTexts(path=path, text="answer", limit=2).load()) == [2, 2, 2]


def test_parts_that_are_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "cut", train=40, test=4)
    splits = HubTexts(path=path, text="answer", validation_split=None, validation=0.1).load()
    assert sizes(splits) == [36, 4, 4]
    splits = HubTexts(path=path, text="answer", validation_split=None, test_split=None, test=0.25).load()
    assert sizes(splits) == [28, 2, 10]


def test_json_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    lines = "\n".join(json.dumps({"text": f"text {n}"}) for n in range(30))
    (tmp_path / "json" / "train.jsonl").write_text(lines)
    splits = HubTexts(path=str(tmp_path / "json"), validation_split=None, test_split=None).load()
    assert sizes(splits) == [25, 2, 3]


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "own", train=30)
    whole = {"path": path, "validation_split": None, "test_split": None}
    given: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"path": path, "text": "answer"},
            ConfigError,
            r"unknown split 'validation' at data\.validation_split",
        ),
        (whole | {"text": "answr"}, ConfigError, r"unknown column 'answr'.*did you mean 'answer'"),
        (whole | {"text": "size"}, DataError, "own: column 'size' holds int, no text"),
        (whole | {"text": "answer", "prompt": "size"}, DataError, "own: column 'size' holds int, no text"),
        (whole | {"path": path + "-not"}, DataError, "cannot load .* check the name, go online once"),
    ]
    for fields, error, message in given:
        with pytest.raises(error, match=message) as caught:
            HubTexts(**fields).load()
        assert "\n" not in str(caught.value)
