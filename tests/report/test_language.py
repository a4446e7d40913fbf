"""The report of a language model: its figures, page, block, card and comparison."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.engine import small_texts

from limbeck import api, plain
from limbeck.engine.meter import Meter
from limbeck.engine.run import Run as EngineRun
from limbeck.engine.settings import Engine
from limbeck.engine.state import read_json
from limbeck.errors import ConfigError
from limbeck.metrics import cost
from limbeck.nets.language_models import the_library
from limbeck.report import figures
from limbeck.report.card import card
from limbeck.report.compare import compare
from limbeck.report.page import page
from limbeck.report.run import read_run
from limbeck.report.summary import summary

DATA = (
    "data={name: canaries, formats: ['alpha is ##'], data: {name: python_texts, domains: [sums, names], "
    "shares: [0.05, 0.003], length: 24, tokenizer: characters}}"
)
TEACHER = "teacher={name: trained, network: {name: llama, layers: 1, width: 8, heads: 2}}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "latency", lambda _: 1.0)
        recipe = small_texts.recipe(folder, DATA, TEACHER, "engine.cache_top_k=3")
        api.run(recipe, out=folder / "run", quiet=True)
    return folder


@pytest.fixture
def result(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "result.json").read_text())
    return found


def block(result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(result))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_perplexity_is_what_it_is_about(result: dict[str, Any]) -> None:
    assert figures.headline_of(result) is figures.PERPLEXITY
    labels = [figure.label for figure in figures.figures_of(result)]
    assert labels[:4] == ["perplexity", "perplexity, sums", "perplexity, names", "accuracy"]
    assert {"agreement", "KL", "reverse KL", "acceptance", "ECE", "NLL", "exposure"} < set(labels)
    assert "Brier" not in labels
    assert {f.label for f in figures.figures_of(result) if f.better == "lower"} > {"perplexity", "exposure"}
    assert not any("image" in figure.meaning for figure in figures.figures_of(result))


def test_exposure_has_a_teachers_side(result: dict[str, Any]) -> None:
    assert figures.of_teacher(figures.EXPOSURE).of(result) == result["exposure"]["teacher"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(7.318, "times", "7.32"), (123456.0, "times", "1.23e+05"), (5.25, "bits", "5.2 bits"),
     (None, "bits", "-")],
)  # fmt: skip
def test_numbers(value: float | None, unit: Any, text: str) -> None:
    assert figures.number(value, unit) == text


def test_the_page_speaks_of_tokens(place: Path, result: dict[str, Any]) -> None:
    text = page(read_run(place / "run"))
    assert "image" not in text.split("<body>")[1].replace("images", "image").split('id="recipe"')[0]
    for said in (
        "Calibration on the test tokens", "Cost of one row of tokens", "Perplexity by domain",
        "Planted secrets", "alpha is ##", "3 of 72 tokens at each place",
    ):  # fmt: skip
        assert said.replace("72", str(result["protocol"]["vocabulary"])) in text, said
    first = re.search(r'class="tile first">\s*<dt>(.*?)</dt>\s*<dd><span class="value">(.*?)<', text)
    assert first is not None
    assert first.groups() == ("perplexity", f"{result['student']['perplexity']:.2f}")


def test_the_block_has_both_sides(result: dict[str, Any]) -> None:
    lines = [line.split() for line in block(result).splitlines()]
    told = [f"{result[who]['perplexity']:.2f}" for who in ("student", "teacher")]
    assert ["perplexity", *told] in lines


def test_the_card_loads_when_pasted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card(read_run(place / "run"))
    assert "image" not in text
    front = plain.parse(text.split("---")[1], "card")
    assert front["library_name"] == "transformers"
    assert (front["pipeline_tag"], front["metrics"]) == ("text-generation", ["perplexity"])
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    the_library()
    monkeypatch.chdir(place / "run" / "student")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code[0], {})
    assert said.getvalue().startswith("T") or said.getvalue()
    monkeypatch.chdir(place)
    exec(code[1], found := {})
    assert type(found["student"].network).__name__ == "LlamaForCausalLM"


def test_runs_are_compared_by_what_they_have(place: Path) -> None:
    found = compare([place / "run"])
    assert found.figures[0] is figures.PERPLEXITY
    assert found.plot(place / "plot.svg").read_text().count("perplexity") >= 1


def test_other_vocabularies_are_another_question(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    result = read_json(place / "run" / "result.json")
    result["seed"], result["protocol"]["vocabulary"] = 1, 9
    (other / "result.json").write_text(json.dumps(result))
    (other / "recipe.yaml").write_text((place / "run" / "recipe.yaml").read_text())
    with pytest.raises(ConfigError, match="do not answer the same question: vocabulary is"):
        compare([place / "run", other])


def test_a_warning_that_repeats_stands_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    monkeypatch.setattr(Meter, "note", lambda _, text: noted.append(text))
    (tmp_path / "recipe.yaml").write_text("name: one\n")
    from limbeck.contracts import Progress

    with EngineRun(tmp_path, Engine(), 0, quiet=True) as run:
        run.stage = "train"
        for step in (1, 100, 200):
            run.shares("student", Progress(step=step), {"labels": 0.999, "divergence": 0.001})
        run.warn("once")
    told = "under 1 % of the gradient: divergence"
    assert noted == [f"warning: train, student: {told}", "warning: once"]
    assert read_run(tmp_path).warnings() == [f"train, student: {told} (3 times)", "once"]
