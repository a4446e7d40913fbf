"""Run folders of strangers: what no run writes is refused by name, whatever it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.report import sample_run

from limbeck import api
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine
from limbeck.errors import ConfigError, DataError
from limbeck.report.card import write_card
from limbeck.report.compare import compare
from limbeck.report.page import write_page
from limbeck.report.run import read_run
from limbeck.report.study import study


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return sample_run.write_continual(tmp_path / "run")


LINES = {
    "no terms": ('{"event": "step", "stage": "a", "step": 1, "loss": 1}', "terms: Field required"),
    "terms of words": (
        '{"event": "step", "stage": "a", "step": 1, "loss": 1, "terms": {"a": "b"}}',
        r"terms\.a",
    ),
    "a step that is no number": (
        '{"event": "step", "stage": "a", "step": [], "loss": 1, "terms": {}}',
        "step: ",
    ),
    "null": ("null", "no event"),
    "depth": ("[" * 10**5, "lists and maps within one another without end"),
    "a task": ('{"event": "evaluation", "who": "student", "task": {}}', "task: "),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_of_the_log(run: Path, case: str) -> None:
    line, message = LINES[case]
    log = run / "metrics.jsonl"
    log.write_text(line + "\n" + log.read_text())
    with pytest.raises(DataError, match=rf"metrics\.jsonl is damaged at line 1: {message}"):
        read_run(run)


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "result.json"])
def test_a_file_that_is_no_text(run: Path, name: str) -> None:
    (run / name).write_bytes(b"\xff\xfe\x80")
    with pytest.raises(DataError, match=rf"{name} (cannot be read|is damaged): 'utf-8' codec"):
        read_run(run)


READERS: dict[str, Callable[[Path], object]] = {
    "page": write_page,
    "card": write_card,
    "compare": lambda run: compare([run]),
    "study": lambda run: study([run, run], baseline="x"),
}


@pytest.mark.parametrize("reader", ["page", "card", "compare"])
@pytest.mark.parametrize("field", ["student", "cost", "protocol", "time", "fidelity"])
def test_figures_of_another_kind(run: Path, reader: str, field: str) -> None:
    figures = json.loads((run / "result.json").read_text())
    spoilt = {"student": {"accuracy_matrix": "x", "average_accuracy": [], "class_names": 3}}.get(
        field, [["x"]]
    )
    (run / "result.json").write_text(json.dumps({**figures, field: spoilt}))
    before = (run / "report.html").exists()
    try:
        READERS[reader](run)
    except DataError as error:
        assert "holds what no run writes" in str(error)
        assert (run / "report.html").exists() == before


def test_one_of_them_is_refused(run: Path) -> None:
    figures = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**figures, "student": {"average_accuracy": []}}))
    with pytest.raises(DataError, match="holds what no run writes"):
        write_page(run)


def test_figures_that_are_none(run: Path) -> None:
    for text in ("[]", "null", '{"student": 3}'):
        (run / "result.json").write_text(text)
        assert api.read_result(run) is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_a_log_that_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"cannot write into .*metrics\.jsonl there is no plain file"):
        Run(tmp_path, Engine(), 0)
