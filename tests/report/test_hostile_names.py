"""Names and texts from outside on pages, cards, pictures and in the terminal: shown, never obeyed."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table
from rich.text import Text
from tests.report.sample_run import write_static
from tests.report.test_page import outline
from tests.test_cli import call

from limbeck.report.arena import write_arena
from limbeck.report.card import write_card
from limbeck.report.compare import compare
from limbeck.report.markdown import block, code, inline
from limbeck.report.page import write_page
from limbeck.report.summary import print_summary
from limbeck.terminal import Terminal

HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{7*7}}|\n---\nlicense: mit\n# $\\x$ \x1b[31m\u202e`"
ARENA = Path(__file__).parents[2] / "demonstrations" / "arena" / "kd-cnn-fashion.json"
HARMLESS = {"title", "style", "svg", "path", "line", "rect", "circle", "g", "text", "a"}


def spoilt(value: Any) -> Any:
    """The same with each text replaced."""
    if isinstance(value, dict):
        return {key: spoilt(part) for key, part in value.items()}
    if isinstance(value, list):
        return [spoilt(part) for part in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run where names, labels, texts of data, terms and warnings are hostile."""
    folder = write_static(tmp_path / 'ru"n`<b>', classes=3)
    result = json.loads((folder / "result.json").read_text())
    for name in ("recipe", "scenario", "data", "data_licence", "data_source", "protocol", "versions"):
        if name in result:
            result[name] = spoilt(result[name])
    result["student"]["class_names"] = [f"{HOSTILE}{place}" for place in range(3)]
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {"name": "x", "description": HOSTILE, "teacher": {"name": HOSTILE}, "data": {"a": HOSTILE}}
        )
    )
    lines = [{"event": "warning", "text": HOSTILE}]
    for step in range(3):
        terms = {HOSTILE: 1.0, "kd": 2.0 - step}
        line = {"event": "step", "stage": HOSTILE, "task": 0, "epoch": 0, "step": step, "loss": 1.0}
        lines.append({**line, "terms": terms, "lr": 0.1, "seconds": 1.0, "teacher_share": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "student").mkdir(exist_ok=True)
    about = {"label_names": [HOSTILE] * 3, "architecture": HOSTILE}
    (folder / "student" / "config.json").write_text(json.dumps(about))
    return folder


def test_the_page_shows_them_as_text(run: Path) -> None:
    text = write_page(run).read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "onerror=alert(1)>" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert not {name for name in outline(run / "report.html").links if "alert" in name}


def test_the_page_of_an_arena_shows_them_as_text(tmp_path: Path) -> None:
    data = spoilt(json.loads(ARENA.read_text()))
    text = write_arena(data, tmp_path / "arena.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "onerror=alert(1)>" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") > 20
    assert not {name for name in outline(tmp_path / "arena.html").links if "alert" in name}


def test_the_card_keeps_its_front_matter_and_its_parts(run: Path) -> None:
    text = write_card(run).read_text(encoding="utf-8")
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "other"
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Figures", "## Protocol", "## Data", "## Teacher", "## How to load it", "## Limits",
        "## How it was made",
    ]  # fmt: skip
    prose = text.split("## How it was made")[0]
    assert "\\<img src=x" in prose
    assert not [
        line for line in prose.splitlines() if "<img" in line.replace("\\<img", "") and "`" not in line
    ]
    assert not [line for line in text.splitlines() if line.startswith("license: mit")]
    assert "\x1b" not in text and "\u202e" not in text
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in tables}) == 1


def test_the_terminal_shows_them_in_sight(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    print_summary(run, Terminal(file=out, width=100, force_terminal=True, color_system=None))
    said = out.getvalue().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "\x1b" not in said and "\u202e" not in said and "\\x1b[31m\\u202e" in said.replace("\n", "")
    assert call("compare", str(run)) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said and "\\u202e" in said


def test_a_comparison_is_drawn(run: Path, tmp_path: Path) -> None:
    drawn = compare([run]).plot(tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<img" not in drawn and "\x1b" not in drawn and "&lt;img" in drawn


def test_a_console_keeps_its_own_colours() -> None:
    out = io.StringIO()
    table = Table("a\x07")
    table.add_row(Text("b\x1b[2J", style="bold"))
    Terminal(file=out, width=40, force_terminal=True).print(table)
    assert "\x1b[1m" in out.getvalue() and "\x1b[2J" not in out.getvalue() and "b\\x1" in out.getvalue()


def test_markdown() -> None:
    assert inline("a | <b> [c](d) `e`\n# f") == r"a \| \<b\> \[c\](d) \`e\` # f"
    assert inline("# a") == r"\# a"
    assert code("a`b\nc") == "`a'b c`"
    assert list(block("a\n```\nb", "yaml")) == ["````yaml", "a\n```\nb", "````"]


def test_the_run_of_an_odd_folder_can_be_named(run: Path) -> None:
    write_card(run)
    named = next(
        line for line in (run / "student" / "README.md").read_text().splitlines() if "load_student" in line
    )
    assert json.dumps(os.path.basename(run)) in named
