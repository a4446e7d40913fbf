from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.sample_run import continual, write_continual, write_static

from limbeck.errors import DataError, LimbeckError
from limbeck.report.page import page, write_page
from limbeck.report.run import read_run

VOID = {"meta", "link", "br", "hr", "img", "input"}
SELF_CLOSING = {"path", "line", "rect", "circle"}


class Outline(HTMLParser):
    """Checks that tags nest, and gathers texts, ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if "id" in named:
            self.ids.append(str(named["id"]))
        if tag == "a":
            self.links.append(str(named["href"]))
        if tag == "svg":
            self.pictures.append(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSING

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def outline(path: Path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text(encoding="utf-8"))
    assert not parser.open
    return parser


def text_of(path: Path) -> str:
    return " ".join("".join(outline(path).text).split())


def change(folder: Path, **fields: object) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | fields))


@pytest.mark.parametrize("make", [write_continual, write_static])
def test_page_nests_and_needs_nothing_beside_itself(tmp_path: Path, make) -> None:
    path = write_page(make(tmp_path / "run"))
    found = outline(path)
    assert path == tmp_path / "run" / "report.html"
    raw = path.read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(|\bsrc=", raw)
    assert "prefers-color-scheme: dark" in raw
    assert "nan" not in re.findall(r'(?:d|x|y|cx|cy|r)="([^"]*)"', raw)
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert all(p.get("aria-hidden") or (p["role"] == "img" and p["aria-label"]) for p in found.pictures)


def test_figures_stand_with_protocol_and_definitions(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    text = text_of(write_page(folder))
    student = result["student"]
    for value in (student["average_accuracy"], student["just_learned"], student["incremental_average"]):
        assert f"{value:.1f} %" in text
    for name, value in student["forgetting"].items():
        assert f"forgetting ({name}) {value:.1f}" in text
        assert result["protocol"]["forgetting_definitions"][name] in text
    assert f"teacher {result['teacher']['average_accuracy']:.1f} %" in text
    assert "train: current task; test: none" in text
    for row in student["accuracy_matrix"]:
        assert all(f"{value:.1f}" in text for value in row if value is not None)
    assert "312" not in text and "313 k" in text and "2.31 ms" in text
    assert "the term 'prompt' carries 0.5 % of the gradient" in text
    assert "name: prompted_vit" in text


def test_last_point_of_forgetting_is_the_figure_itself(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run")
    said = {str(p.get("aria-label")) for p in outline(write_page(folder)).pictures}
    result = json.loads((folder / "result.json").read_text())
    for name, value in result["student"]["forgetting"].items():
        [label] = [s for s in said if s.startswith(f"Forgetting ({name})")]
        student = label.partition("student: ")[2].partition(";")[0]
        assert student.split(", ")[-1] == f"{value:.4g} points"
        assert student.split(", ")[0] == "0 points"


def test_student_alone_has_no_teacher_in_it(tmp_path: Path) -> None:
    text = text_of(write_page(write_continual(tmp_path / "run", teacher=False)))
    assert "Accuracy of the student" in text
    assert "Accuracy of the teacher" not in text and "Teacher minus student" not in text


def test_unfinished_run_shows_what_was_logged(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run", finished=False, upto=800, steps=160)
    text = text_of(write_page(folder))
    assert "This run has not finished" in text and f"limbeck resume {folder}" in text
    assert "after 1" in text and "after 2" not in text
    assert "Measured under this protocol" not in text


def test_run_that_logged_nothing_yet(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run", finished=False, upto=0)
    (folder / "metrics.jsonl").unlink()
    assert "This run has not finished" in text_of(write_page(folder))


def test_hundred_classes_and_a_long_log_stay_small(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run", tasks=20, per_task=5, steps=1000, first=60)
    path = write_page(folder)
    assert path.stat().st_size < 1_000_000
    text = text_of(path)
    assert "Most frequent mistakes of the student" in text
    assert "20 x 5" in text and "(100 in all)" in text
    pieces = re.findall(r'<path class="line student" d="([^"]*)"', path.read_text())
    assert max(len(re.findall(r"[ML]", d)) for d in pieces) <= 400


def test_thousand_classes_are_summed_into_a_map(tmp_path: Path) -> None:
    path = write_page(write_static(tmp_path / "run", classes=1000, accuracy=70.0))
    assert path.stat().st_size < 2_000_000
    assert "each cell sums 8 neighbouring classes" in text_of(path)


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    folder = write_static(tmp_path / "run", classes=3)
    change(folder, recipe="<script>alert(1)</script>")
    path = write_page(folder)
    assert "<script" not in path.read_text()
    assert "<script>alert(1)</script>" in text_of(path)


def test_joint_stages_are_parted_by_who_learns(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run", finished=False, upto=0)
    lines = []
    for task in range(2):
        for step in range(3):
            terms = {"teacher/labels": 2.0 - step, "student/kd": 1.0 + step}
            where = {"stage": f"task{task}/joint", "task": task, "step": step}
            lines.append({"event": "step", **where, "loss": 3.0, "terms": terms})
        shares = {"stage": f"task{task}/student", "step": 1, "shares": {"kd": 0.75, "labels": 0.25}}
        lines.append({"event": "gradient_share", **shares})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [str(p.get("aria-label")) for p in outline(write_page(folder)).pictures]
    assert any(s == "labels. labels: 2, 1, 0, 2, 1, 0" for s in said)
    assert any(s == "kd. kd: 1, 2, 3, 1, 2, 3" for s in said)
    assert any(s == "Share of the gradient, student. kd: 75 %, 75 %; labels: 25 %, 25 %" for s in said)


def test_terms_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run", finished=False, upto=20)
    line = {"event": "step", "stage": "task0/teacher", "task": 0, "step": 20, "loss": 1.0}
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(line | {"terms": {"labels": float("nan")}}) + "\n")
    assert "task0/teacher: the term 'labels' was not finite at 1 logged steps" in text_of(write_page(folder))


def test_stage_taken_from_an_earlier_run_is_said(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"event": "teacher_reused", "stage": "task0/teacher", "seconds": 3.0}) + "\n")
    assert "task0/teacher, from an earlier run" in text_of(write_page(folder))


def test_same_run_same_page(tmp_path: Path) -> None:
    run = read_run(write_continual(tmp_path / "run"))
    assert page(run) == page(run)
    out = write_page(run.folder, tmp_path / "elsewhere.html")
    assert out.read_text() == page(run)
    assert not list(tmp_path.glob(".*.new"))


def test_resumed_log_counts_each_step_once_and_a_cut_line_not_at_all(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run", finished=False, upto=30)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines()
    again = json.loads(lines[-1]) | {"loss": 7.0}
    log.write_text("\n".join([*lines, json.dumps(again), '{"event": "st']))
    steps = list(read_run(folder).of("step"))
    assert len(steps) == 30
    assert steps[-1]["loss"] == 7.0


def test_logged_matrix_is_the_triangle(tmp_path: Path) -> None:
    folder = write_continual(tmp_path / "run")
    run = read_run(folder)
    assert run.result is not None
    assert run.logged_matrix("student") == run.result["student"]["accuracy_matrix"]
    assert run.logged_matrix("nobody") is None


def test_one_task_has_figures() -> None:
    assert continual([[90.0]])["forgetting"] == {"cdl": 0.0, "coda": 0.0, "l2p": 0.0}


def test_page_of_one_task(tmp_path: Path) -> None:
    assert "after 0" in text_of(write_page(write_continual(tmp_path / "run", tasks=1, per_task=10)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda f: (f / "recipe.yaml").write_text("a: [1"), "recipe.yaml"),
        (lambda f: (f / "result.json").write_text("{"), "result.json is damaged"),
        (lambda f: (f / "result.json").write_text("{}"), "no field 'student'"),
        (lambda f: (f / "metrics.jsonl").write_text("x\n{}\n"), "damaged at line 1"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path: Path, spoil, said: str) -> None:
    folder = write_continual(tmp_path / "run", steps=4)
    spoil(folder)
    with pytest.raises(LimbeckError) as refused:
        write_page(folder)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (folder / "report.html").exists()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        write_page(tmp_path / "none")
