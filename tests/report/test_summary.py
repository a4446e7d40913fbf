from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.report.sample_run import DEFINITIONS, write_continual, write_static

from limbeck.errors import DataError
from limbeck.report.summary import print_summary


def printed(folder: Path, **options: object) -> str:
    out = io.StringIO()
    print_summary(folder, Console(file=out, **({"width": 100} | options)))  # type: ignore[arg-type]
    return out.getvalue()


def test_plain_text_where_there_is_no_terminal(tmp_path: Path) -> None:
    text = printed(write_continual(tmp_path / "run"))
    assert text.isascii() and "\x1b" not in text
    assert text.startswith("cdl-kdp  scenario continual, data digits, seed 0")
    for name, definition in DEFINITIONS.items():
        assert f"forgetting ({name}), points" in text and definition in text
    for word in ("average accuracy", "agreement", "ECE", "multiply-adds", "head masking", "last epoch"):
        assert word in text


def test_colour_on_a_terminal(tmp_path: Path) -> None:
    assert "\x1b[" in printed(write_continual(tmp_path / "run"), force_terminal=True)


def test_student_alone_has_no_teacher_column(tmp_path: Path) -> None:
    text = printed(write_continual(tmp_path / "run", teacher=False))
    assert "teacher" not in text and "average accuracy" in text


def test_static(tmp_path: Path) -> None:
    text = printed(write_static(tmp_path / "run"))
    assert "accuracy" in text and "CKA" in text and "90.0 to 92.0" in text
    assert "forgetting" not in text


def test_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has not finished"):
        printed(write_continual(tmp_path / "run", finished=False))
