"""What must be true of answers to the prompts of the test texts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small_texts
from tests.engine.small import lines

from limbeck import api
from limbeck.data.texts import Document
from limbeck.metrics import cost, overlap
from limbeck.metrics.answers import words
from limbeck.nets.causal_lm import CausalLM
from limbeck.nets.language_models import load_model
from limbeck.scenarios.answers import answered

ASKED = tuple(Document(f"{a} x {b} = {a * b}\n", f"{b} x {a} = ") for a in (2, 3) for b in (4, 5, 6))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def net(folder: Path, name: str) -> CausalLM:
    return CausalLM(load_model(small_texts.model(folder, name)))


def asked(readers: Any, tokens: int = 6) -> dict[str, dict[str, Any]]:
    return answered(readers, ASKED, tokens=tokens, template=False, batch_size=4)


def test_one_network_as_both_agrees_with_itself(tmp_path: Path) -> None:
    reader = (net(tmp_path, "one"), small_texts.tokenizer())
    found = asked({"student": reader, "teacher": reader})
    assert found["student"] == found["teacher"]
    assert found["student"]["answered"] == len(ASKED)
    table = torch.tensor(found["fidelity"]["answer_table"])
    assert float(table.sum()) == pytest.approx(100)
    assert float(table[0].sum()) == pytest.approx(found["student"]["exact_match"])
    assert found["fidelity"]["answer_agreement"] >= float(table[0, 0])


def test_the_figures_are_those_of_greedy_texts(tmp_path: Path) -> None:
    own, tokenizer = net(tmp_path, "one"), small_texts.tokenizer()
    found = asked({"student": (own, tokenizer)})
    said = []
    for document in ASKED:
        ids = tokenizer(document.prompt)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(own.network(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        told = ids[len(tokenizer(document.prompt)["input_ids"]) :]
        said.append(words(tokenizer.decode(told, skip_special_tokens=True)))
    right = [words(document.text) for document in ASKED]
    assert found["student"]["rouge_l"] == pytest.approx(overlap.rouge_l(said, right))
    assert "fidelity" not in found


def test_prompts_without_room_are_left_out(tmp_path: Path) -> None:
    reader = (net(tmp_path, "one"), small_texts.tokenizer())
    assert asked({"student": reader}, tokens=600) == {}


def write(place: Path, splits: list[tuple[str, str, str]]) -> Path:
    place.write_text("".join(json.dumps(dict(zip("spa", each, strict=True))) + "\n" for each in splits))
    return place


def test_a_run_answers_as_many_prompts_as_it_is_told(tmp_path: Path) -> None:
    sums = [(f"{a} x {b} = ", f"{a * b}\n") for a in range(1, 9) for b in range(1, 9)]
    part = ("train", "train", "train", "test", "validation")
    file = write(tmp_path / "sums.jsonl", [(part[n % 5], p, a) for n, (p, a) in enumerate(sums)])
    data = f"data={{name: jsonl, files: ['{file}'], text: a, prompt: p, split: s, length: 24, pack: false}}"
    for count, more in ((0, ""), (5, "scenario.answer_tokens=4")):
        sets = [data, f"scenario.answers={count}", "scenario.epochs=1", *([more] if more else [])]
        api.run(small_texts.recipe(tmp_path, *sets), out=tmp_path / f"run{count}", quiet=True)
        found = json.loads((tmp_path / f"run{count}" / "result.json").read_text())
        assert found["student"].get("answered", 0) == count
        assert ("answer_agreement" in found["fidelity"]) is (count > 0)
    assert 0 <= found["student"]["rouge_l"] <= 1
    assert found["student"]["perplexity"] > 1
    sets = [data, "scenario.answer_tokens=600", "scenario.epochs=1"]
    api.run(small_texts.recipe(tmp_path, *sets), out=tmp_path / "none", quiet=True)
    assert any("leaves room for an answer" in line.get("text", "") for line in lines(tmp_path / "none"))


def test_problems_of_gsm8k_are_judged_by_their_last_number(tmp_path: Path) -> None:
    file = Path(os.environ.get("LIMBECK_DATA", "no folder")) / "gsm8k_1500x500.jsonl.gz"
    if not file.exists():
        pytest.skip("GSM8K: set LIMBECK_DATA to the folder that has gsm8k_1500x500.jsonl.gz")
    with gzip.open(file, "rt") as opened:
        entries = [json.loads(line) for line in opened][:40]
    documents = [Document(entry["answer"], entry["question"][:30]) for entry in entries]
    own = (net(tmp_path, "one"), small_texts.tokenizer())
    found = answered({"student": own}, documents, tokens=3, template=False, batch_size=8)
    assert found["student"]["answered"] == 40
    assert 0 <= found["student"]["exact_match"] <= 100
