from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from limbeck.data.text_files import TextFiles, domain_names
from limbeck.errors import ConfigError, DataError

TEXT = "".join(f"line {n}\n" for n in range(100))


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)


def test_a_file_is_one_document_cut_in_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "story.txt").write_text(TEXT)
    by_path = TextFiles(files=(str(tmp_path / "story.txt"),)).load()
    by_root = TextFiles(files=("story.txt",), root=str(tmp_path)).load()
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    by_environment = TextFiles(files=("story.txt",)).load()
    assert by_path.train.fingerprint == by_root.train.fingerprint == by_environment.train.fingerprint
    parts = (by_path.train, by_path.validation, by_path.test)
    assert "".join(d.text for part in parts for d in part.documents) == TEXT
    assert all(part.documents[0].text.endswith("\n") for part in parts)
    assert (by_path.name, by_path.train.domains) == ("story", ("story",))


def test_packed_files_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode("utf-8-sig")))
    splits = TextFiles(files=("a.txt.gz",), root=str(tmp_path)).load()
    assert splits.train.documents[0].text.startswith("line 0\n")
    assert splits.train.domains == ("a",)


def test_documents_are_parted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("---".join(f"text {n}" for n in range(40)) + "---\n---")
    splits = TextFiles(files=("a.txt",), root=str(tmp_path), separator="---", test=0.2).load()
    assert [len(part.documents) for part in (splits.train, splits.validation, splits.test)] == [30, 2, 8]
    few = TextFiles(files=("a.txt",), root=str(tmp_path), separator="---", characters=80, test=0.3).load()
    assert sum(len(d.text) for d in few.train.documents) < 80


def test_test_files_pair_with_files(tmp_path: Path) -> None:
    for name in ("one", "two", "one_test", "two_test"):
        (tmp_path / f"{name}.txt").write_text(name + TEXT)
    splits = TextFiles(
        files=("one.txt", "two.txt"), test_files=("one_test.txt", "two_test.txt"), root=str(tmp_path)
    ).load()
    assert splits.test.domains == ("one", "two")
    assert [(d.text[:8], d.domain) for d in splits.test.documents] == [("one_test", 0), ("two_test", 1)]
    learnt = "".join(
        d.text for part in (splits.train, splits.validation) for d in part.documents if not d.domain
    )
    assert learnt == "one" + TEXT


def test_domains_have_names_of_their_own() -> None:
    assert domain_names(("x/a.txt.gz", "y/b.txt")) == ("a", "b")
    assert domain_names(("x/a.txt", "y/a.txt")) == ("x/a.txt", "y/a.txt")


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    for fields, message in (
        ({"files": ()}, "files is empty: name at least one text file"),
        ({"files": ("a", "a")}, "files names one file twice"),
        ({"files": ("a", "b"), "test_files": ("c",)}, "test_files names 1 but files 2: pair them"),
        ({"files": ("a",), "characters": 0}, "characters is 0: allowed are values of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            TextFiles(**fields)
    with pytest.raises(
        DataError, match=r"text file 'no\.txt' is not there: give its path, or set data\.root"
    ):
        TextFiles(files=("no.txt",), root=str(tmp_path)).load()
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "odd.gz").write_bytes(b"no gzip")
    (tmp_path / "empty.txt").write_text(" \n")
    for name in ("odd.txt", "odd.gz"):
        with pytest.raises(DataError, match=f"{name} is (no readable UTF-8 text|damaged)") as error:
            TextFiles(files=(name,), root=str(tmp_path)).load()
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="empty: too little text of domain 'empty' for its parts"):
        TextFiles(files=("empty.txt",), root=str(tmp_path)).load()
