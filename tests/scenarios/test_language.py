"""Runs on texts: teachers live, remembered and shortened, domains, adapters, and what a run leaves."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, small_texts
from tests.engine.killing import killed_and_resumed

from limbeck import api
from limbeck.data.tokens import Rows, batch_of
from limbeck.engine import capture
from limbeck.engine.fit import Turn
from limbeck.errors import ConfigError, NonFiniteError, ServiceError
from limbeck.metrics import cost
from limbeck.nets.causal_lm import CausalLM
from limbeck.nets.language_models import load_model
from limbeck.scenarios import pair
from limbeck.scenarios.judging import all_logits
from limbeck.scenarios.language import evenly


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@functools.cache
def finished(place: Path, *sets: str) -> Path:
    folder = place / f"run-{len(list(place.iterdir()))}"
    api.run(small_texts.recipe(place, *sets), out=folder, quiet=True)
    return folder


def gap(one: Path, other: Path) -> float:
    """The largest difference of two students' weights."""
    ours, theirs = small.weights(one), small.weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


LIVE = "engine.cache=false"
ONE = "scenario.epochs=1"


def test_cost_is_the_same_whether_an_objective_reads_logits_or_not(place: Path) -> None:
    net = CausalLM(load_model(small_texts.model(place)))
    batch = batch_of(Rows("", *torch.randint(9, (2, 1, 8)), None, torch.zeros(1), ("all",)), torch.arange(1))
    spent = []
    for reads in (True, False):
        net.projects = reads
        spent.append(cost.multiply_adds(lambda: all_logits(net, batch)))
    assert spent[0] == spent[1]


# Teachers live, remembered and shortened


def test_a_teacher_that_is_asked_once_teaches_the_same(place: Path) -> None:
    remembered, live = finished(place), finished(place, LIVE)
    assert gap(remembered, live) < 1e-6
    own, other = figures(remembered), figures(live)
    assert own["student"]["perplexity"] == pytest.approx(other["student"]["perplexity"], rel=1e-5)
    assert not list(remembered.glob("cache/*")) and not list(place.rglob("*.bin"))


def test_runs_may_share_what_a_teacher_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("engine.share_teacher_cache=true", f"engine.cache_root={tmp_path / 'caches'}")
    first = small_texts.recipe(place, *sets)
    one = api.run(first, out=tmp_path / "one", quiet=True).folder
    assert list((tmp_path / "caches").rglob("*.bin"))
    asked: list[None] = []
    ask = pair.Pair.ask_live
    monkeypatch.setattr(pair.Pair, "ask_live", lambda *given: (asked.append(None), ask(*given))[1])
    two = api.run(small_texts.recipe(place, *sets), out=tmp_path / "two", quiet=True).folder
    remembered = len(asked)
    api.run(small_texts.recipe(place), out=tmp_path / "three", quiet=True)
    assert len(asked) - remembered > remembered  # a run of its own asks for all rows
    assert gap(one, two) == gap(one, finished(place)) == 0


def test_what_is_left_out_alone_makes_a_difference(place: Path) -> None:
    live = finished(place, LIVE)
    gaps = {top: gap(live, finished(place, f"engine.cache_top_k={top}")) for top in (1, 4, 15)}
    assert small_texts.tokenizer().vocab_size == 16, "15 of 16 tokens leave nothing to be spread"
    assert min(gaps[1], gaps[4]) > 1e-2
    assert gaps[15] < 1e-3
    told = figures(finished(place, "engine.cache_top_k=4"))["teacher_cache"]
    assert told["kept"] == 4 and told["tokens"] == 16 and 0 < told["left_out"] < 1


@pytest.mark.parametrize("objective", ["divergence", "kd", "first"])
def test_what_is_left_out_is_left_out_live_too(place: Path, objective: str) -> None:
    asked = (f"objective=[{objective}]", "engine.cache_top_k=5")
    assert gap(finished(place, *asked), finished(place, LIVE, *asked)) < 1e-5
    if objective != "first":
        assert gap(finished(place, ONE, *asked), finished(place, ONE, asked[0])) > 1e-3


def test_a_half_precision_cache_is_near(place: Path) -> None:
    assert 0 < gap(finished(place), finished(place, "engine.cache_dtype=float16")) < 1e-2


def test_a_teacher_in_half_precision_is_remembered(place: Path) -> None:
    half = "teacher.dtype=bfloat16"
    for logits in ((), ("objective=[{name: kd, temperature: 2}]",)):
        assert gap(finished(place, half, *logits), finished(place, half, LIVE, *logits)) < 1e-5


def test_a_spoilt_teacher_is_named(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is finite in the dry run and not later, also where its top tokens alone are kept."""
    own = capture.most_probable

    def spoilt(hidden: torch.Tensor, *given: Any) -> Any:
        return own(torch.full_like(hidden, torch.nan), *given)

    monkeypatch.setattr(capture, "most_probable", spoilt)
    with pytest.raises(NonFiniteError, match="the teacher's output is not finite: mend its weights"):
        api.run(small_texts.recipe(place, "engine.cache_top_k=3"), out=tmp_path / "run", quiet=True)


@pytest.mark.parametrize("at", [2, 11])
def test_killed_and_resumed(place: Path, tmp_path: Path, at: int) -> None:
    sets = ("engine.cache_top_k=4", "engine.checkpoint_seconds=0")
    small.assert_same(
        killed_and_resumed(small_texts.recipe(place, *sets), tmp_path / "run", at=at),
        finished(place, sets[0]),
    )


# Objectives of classifiers on tokens


@pytest.mark.parametrize(
    "objective",
    ["kd", "{name: kd, standardise: true}", "{name: dkd, warmup_epochs: 0}", "dist", "pld",
     "{name: labels, smoothing: 0.1}", "{name: probability_mse}"],
)  # fmt: skip
def test_what_matches_logits_matches_those_of_tokens(place: Path, objective: str) -> None:
    alone = "labels" in objective
    sets = ("teacher={name: none}", "data.tokenizer=characters") if alone else ()
    found = figures(finished(place, f"objective=[{objective}]", *sets))
    assert 1 < found["student"]["perplexity"] < (16 if alone else 100)
    assert "nan" not in json.dumps(found).lower()


def test_logits_of_the_top_tokens_share_what_is_left(place: Path) -> None:
    whole, most = (finished(place, "objective=[kd]", *sets) for sets in ((), ("engine.cache_top_k=15",)))
    assert gap(whole, most) < 1e-3 < gap(whole, finished(place, "objective=[kd]", "engine.cache_top_k=2"))


def test_features_of_tokens_can_be_matched(place: Path) -> None:
    tap = "model.layers.-1"
    sets = (f"objective=[{{name: labels}}, {{name: fitnets, student_tap: {tap}, teacher_tap: {tap}}}]",)
    assert gap(finished(place, *sets), finished(place, *sets, LIVE)) < 1e-5


# Domains, rows, figures


def test_domains_have_figures_of_their_own(place: Path) -> None:
    two = (
        "data={name: python_texts, domains: [sums, names], shares: [0.1, 0.005], length: 24}",
        "data.tokenizer=characters",
        "teacher={name: trained, network: {name: llama, layers: 1, width: 8, heads: 2}}",
    )
    for sets in (two, (*two, "scenario.eval_rows=12")):
        found = figures(finished(place, *sets))
        assert found["data"] == "Python's sums and names"
        for who in ("student", "teacher"):
            by = found[who]["domain_perplexity"]
            assert list(by) == ["sums", "names"]
            assert min(by.values()) <= found[who]["perplexity"] <= max(by.values())
    assert found["protocol"]["test_rows"] == 12
    assert found["protocol"]["test_tokens"] < 12 * 24


def test_the_figures_are_those_of_a_plain_loop(place: Path) -> None:
    folder = finished(place)
    found = figures(folder)
    transformers = pytest.importorskip("transformers")
    student = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(place / "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    nll, kl, reverse, least, same, hits = [], [], [], [], [], []
    recipe = small_texts.recipe(place)
    for document in recipe.data.load().test.documents:
        whole = [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(whole) - 1, 24):
            ids = torch.tensor(whole[start : start + 25])
            with torch.no_grad():
                q, p = (
                    net(ids[None, :-1]).logits[0, :, : len(tokenizer)].log_softmax(-1)
                    for net in (student, teacher)
                )
            nll += (-q.gather(1, ids[1:, None]).squeeze(1)).tolist()
            kl += (p.exp() * (p - q)).sum(1).tolist()
            reverse += (q.exp() * (q - p)).sum(1).tolist()
            least += torch.minimum(p, q).exp().sum(1).tolist()
            same += (p.argmax(1) == q.argmax(1)).tolist()
            hits += (q.argmax(1) == ids[1:]).tolist()
    mean = {name: sum(x) / len(x) for name, x in (("nll", nll), ("kl", kl), ("r", reverse), ("a", least))}
    assert found["protocol"]["test_tokens"] == len(nll)
    assert found["student"]["nll"] == pytest.approx(mean["nll"], rel=1e-4)
    assert found["student"]["perplexity"] == pytest.approx(torch.tensor(mean["nll"]).exp().item(), rel=1e-4)
    assert found["student"]["accuracy"] == pytest.approx(100 * sum(hits) / len(hits))
    assert found["fidelity"]["kl"] == pytest.approx(mean["kl"], rel=1e-3)
    assert found["fidelity"]["reverse_kl"] == pytest.approx(mean["r"], rel=1e-3)
    assert found["fidelity"]["acceptance"] == pytest.approx(mean["a"], rel=1e-3)
    assert found["fidelity"]["agreement"] == pytest.approx(100 * sum(same) / len(same))


def test_trust_is_accuracy_less_calibration_error(place: Path) -> None:
    student = figures(finished(place))["student"]
    assert student["trust"] == pytest.approx(student["accuracy"] / 100 - student["ece"], abs=0.05)
    assert student["trust"] < student["accuracy"] / 100


def test_rows_are_evenly_spread() -> None:
    assert evenly(None, 3).tolist() == evenly(9, 3).tolist() == [0, 1, 2]
    assert evenly(4, 10).tolist() == [0, 2, 5, 7]


# Steps of an epoch, teachers that learn


def test_an_epoch_may_be_so_many_steps(place: Path) -> None:
    found = finished(place, "scenario.epochs=1", "scenario.epoch_steps=30")
    steps = [line["step"] for line in small.lines(found) if line["event"] == "step"]
    assert max(steps) >= 28
    assert figures(found)["protocol"]["epoch_steps"] == 30
    assert gap(found, finished(place, "scenario.epochs=1", "scenario.epoch_steps=30", LIVE)) < 1e-6


def test_a_teacher_that_learns_is_taken_from_another_run(place: Path) -> None:
    learns = (
        "teacher={name: trained, network: {name: llama, layers: 1, width: 16, heads: 2}}",
        "data.tokenizer=characters", "engine.reuse_teachers=true", f"engine.cache_root={place / 'shared'}",
    )  # fmt: skip
    first = finished(place, *learns, "scenario.teacher_epochs=1")
    again = finished(place, *learns, "scenario.teacher_epochs=1", "student.width=4")
    other = finished(place, *learns, "scenario.teacher_epochs=2", "student.width=4")
    teachers = [figures(folder)["teacher"]["perplexity"] for folder in (first, again, other)]
    assert teachers[0] == teachers[1] != teachers[2]
    assert teachers[2] < teachers[0] < 16


# What a run leaves


CUT = "student={{name: causal_lm, model: '{}', layers: 1}}"
LORA = "student={{name: causal_lm, model: '{}', lora: {{r: 2, target_modules: [q_proj, v_proj]}}}}"


START = ("scenario.start_epochs=1", "engine.reuse_teachers=true")


def test_a_student_may_begin_with_the_texts_alone(place: Path, tmp_path: Path) -> None:
    folders = []
    for number, rate in enumerate((1e-9, 1e-9, 0.01)):
        sets = (*START, ONE, "scenario.teacher_optim.lr=0.01", f"scenario.optim.lr={rate}")
        recipe = small_texts.recipe(place, *sets, f"engine.cache_root={tmp_path / 'caches'}")
        folders.append(api.run(recipe, out=tmp_path / str(number), quiet=True).folder)
    logs = [[json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in folders]
    steps = [line for line in logs[0] if line["event"] == "step" and line["stage"] == "start"]
    assert list(steps[0]["terms"]) == ["labels"] and steps[-1]["loss"] < steps[0]["loss"]
    assert [any(line["event"] == "teacher_reused" for line in log) for log in logs] == [False, True, True]
    assert gap(folders[0], folders[1]) == 0
    assert gap(folders[0], folders[2]) > 1e-3
    # a distillation that does not move leaves what the labels taught
    untaught = finished(place, ONE, "scenario.optim.lr=1e-9")
    assert figures(folders[0])["student"]["nll"] < figures(untaught)["student"]["nll"] - 0.1


@pytest.mark.parametrize("at", [3, 25])
def test_a_start_that_was_killed_is_resumed(place: Path, tmp_path: Path, at: int) -> None:
    sets = ("scenario.start_epochs=1", ONE)
    folder = killed_and_resumed(small_texts.recipe(place, *sets), tmp_path / "run", at=at)
    small.assert_same(folder, finished(place, *sets))


@pytest.mark.parametrize("at", [6, 20])
def test_texts_that_come_again_are_the_same_behind_a_kill(place: Path, tmp_path: Path, at: int) -> None:
    sets = (
        "objective=[{name: labels}]", "engine.checkpoint_seconds=0",
        "scenario.writing={by: teacher, share: 1, replays: 1, prompt: 4, lag: 2}",
    )  # fmt: skip
    folder = killed_and_resumed(small_texts.recipe(place, *sets), tmp_path / "run", at=at)
    small.assert_same(folder, finished(place, *sets))
    kept = sorted((folder / "checkpoints" / "written").iterdir())
    assert [p.name for p in kept] == [f"{0:06d}-{first:09d}.json" for first in range(0, 2 * len(kept), 2)]


BUFFER = "scenario.writing={share: 0.6, prompt: 4, buffer: {capacity: 12, tolerance: 0, rise: 0.2}}"


@pytest.mark.parametrize("at", [5, 9, 20])
def test_a_students_texts_of_a_buffer_are_the_same_behind_a_kill(
    place: Path, tmp_path: Path, at: int
) -> None:
    sets = (BUFFER, "engine.checkpoint_seconds=0", "scenario.optim.lr=0.3")
    folder = killed_and_resumed(small_texts.recipe(place, *sets), tmp_path / "run", at=at)
    small.assert_same(folder, finished(place, *sets))
    found = figures(folder)["writing"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [(x["validation"], x["share"]) for x in lines if x["event"] == "writing"]
    assert told == list(zip(found["validation"], found["share"], strict=True))
    assert found["share"][0] == 0.6 and found["written"] >= 12


@pytest.mark.parametrize("at", [4, 18])  # where the buffer has become full, where an epoch begins
def test_a_buffer_is_the_same_behind_a_step_that_failed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    own = Turn.step

    def failing(self: Turn, batch: Any, where: Any, run: Any) -> Any:
        if where.step == at:
            raise ServiceError("the teacher does not answer")
        return own(self, batch, where, run)

    with monkeypatch.context() as patch:
        patch.setattr(Turn, "step", failing)
        with pytest.raises(ServiceError):
            api.run(small_texts.recipe(place, BUFFER), out=tmp_path / "run", quiet=True)
    folder = api.resume(tmp_path / "run", quiet=True).folder
    small.assert_same(folder, finished(place, BUFFER))


def test_the_loss_that_a_buffer_goes_by_is_that_of_the_texts_held_out(place: Path) -> None:
    found = figures(finished(place, BUFFER, "scenario.optim.lr=1e-9"))["writing"]["validation"]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(math.log(16), rel=0.2)  # a student that knows nothing


def test_a_buffer_that_cannot_be_is_refused(place: Path) -> None:
    small_one = "scenario.writing={buffer: {capacity: 7}}"
    with pytest.raises(ConfigError, match=r"buffer\.capacity is 7 but a batch has 8 rows.*at least 8"):
        api.run(small_texts.recipe(place, small_one), out=place / "refused", quiet=True)


def test_a_student_of_its_teachers_weights_has_begun(place: Path, tmp_path: Path) -> None:
    asked = small_texts.recipe(place, "student={name: elastic}", "scenario.start_epochs=1")
    with pytest.raises(ConfigError, match=r"start_epochs is 1.*its teacher's weights"):
        api.run(asked, out=tmp_path / "run", quiet=True)


@pytest.mark.parametrize("student", [None, CUT, LORA], ids=["fresh", "cut", "adapters"])
def test_the_student_is_a_folder_of_transformers(place: Path, student: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    folder = finished(place, *([] if student is None else [student.format(small_texts.model(place))]))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    text = "3 x 4 = 12\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(ids[0]) == text
    rows = Rows("", ids[:, :-1], ids[:, 1:], None, torch.zeros(1), ("all",))
    own = api.load_student(folder)
    assert not own.training
    with torch.no_grad():
        said = own(batch_of(rows, torch.tensor([0]))).logits
        torch.testing.assert_close(said, network(ids[:, :-1]).logits[0])
    assert not any("lora" in name for name in network.state_dict())
    if student is not None:
        assert network.config.num_hidden_layers == (1 if student == CUT else 2)


def test_adapters_alone_are_trained(place: Path) -> None:
    found = figures(finished(place, LORA.format(small_texts.model(place))))
    assert 0 < found["cost"]["student"]["trainable"] < 0.2 * found["cost"]["student"]["parameters"]
