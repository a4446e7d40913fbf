"""What must be true of a stream, whatever learns in it: seen from outside, over whole small runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine import small
from torch import Tensor

from limbeck import api
from limbeck.contracts import Outputs, Progress
from limbeck.data.digits import Digits
from limbeck.data.images import ImageSet, Splits
from limbeck.engine.run import Run
from limbeck.errors import NonFiniteError
from limbeck.metrics import continual as metrics
from limbeck.metrics import cost
from limbeck.scenarios.pair import Pair
from limbeck.scenarios.session import Session

State = dict[str, Tensor]

THREE = ("scenario.tasks=3", "scenario.sizes=[3, 2, 5]", "scenario.epochs=2")
CODA = ("student.prompts.pool=6", "teacher.prompts.pool=6")
DUAL = tuple(
    f"{who}.prompts={{name: dualprompt, g_blocks: [0], e_blocks: [1]}}" for who in ("student", "teacher")
)
L2P = tuple(f"{who}.prompts={{name: l2p, pool: 6, top_k: 2}}" for who in ("student", "teacher"))
VARIANTS = {"coda": (*THREE, *CODA), "dualprompt": (*THREE, *DUAL), "l2p": (*THREE, *L2P)}
ALONE = ("teacher=none", "objective=[{name: labels}]", "student.kd_prompts=null")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report and the timing of forward passes."""
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def carry_out(place: Path, name: str, *sets: str) -> Path:
    api.run(small.recipe(place, *sets, f"engine.cache_root={place / 'caches'}"), out=place / name, quiet=True)
    return place / name


@dataclass
class Told:
    """The states of both networks at the turning points of each task, and what was asked of them."""

    moments: dict[tuple[int, str], dict[str, State]] = field(default_factory=dict)
    needs_grad: list[bool] = field(default_factory=list)
    session: Any = None

    def at(self, task: int, moment: str, who: str = "student") -> State:
        return self.moments[task, moment][who]


@functools.cache
def told(place: Path, variant: str) -> Told:
    """One run, looked at before and after every phase."""
    story = Told()

    def snapshot(session: Session, moment: str) -> None:
        nets = session.pair.nets().items()
        states = {who: {k: v.clone() for k, v in net.state_dict().items()} for who, net in nets}
        story.moments[session.task.number, moment] = states

    def watched(name: str, moment: str) -> Callable[..., None]:
        true = getattr(Session, name)

        def phase(session: Session, *arguments: Any) -> None:
            story.session = session
            true(session, *arguments)
            snapshot(session, moment)
            if name == "student_phase" and session.teacher is not None:
                story.needs_grad += [p.requires_grad for p in session.teacher.parameters()]

        return phase

    with pytest.MonkeyPatch.context() as patch:
        for name, moment in (("start_task", "start"), ("teacher_phase", "taught"), ("student_phase", "end")):
            patch.setattr(Session, name, watched(name, moment))
        carry_out(place, variant, *VARIANTS[variant])
    return story


EDGES = [0, 3, 5, 10]


def moved(before: State, after: State, name: str) -> Tensor:
    """Which elements differ."""
    return before[name] != after[name]


# What stands still (cdl 3, 5, 8; l2p 5, 6; dualprompt 1; coda 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_current_tasks_columns_of_the_heads_move(place: Path, variant: str) -> None:
    story = told(place, variant)
    for task in range(3):
        start, stop = EDGES[task], EDGES[task + 1]
        for who, moments in (("student", ("taught", "end")), ("teacher", ("start", "taught"))):
            before, after = (story.at(task, moment, who) for moment in moments)
            heads = [name for name in before if name.split(".")[0] in ("head", "kd_head")]
            assert len(heads) == (4 if who == "student" else 2)
            for name in heads:
                rows = moved(before, after, name).reshape(10, -1).any(1)
                assert rows[start:stop].all(), name
                assert not rows[:start].any() and not rows[stop:].any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_teacher_stands_still_while_the_student_learns(place: Path, variant: str) -> None:
    story = told(place, variant)
    assert not any(story.needs_grad)
    for task in range(3):
        before, after = story.at(task, "taught", "teacher"), story.at(task, "end", "teacher")
        assert all(torch.equal(before[name], after[name]) for name in before)
        learnt = [name for name in before if moved(story.at(task, "start", "teacher"), before, name).any()]
        assert learnt, "the teacher did learn before"
        student = story.at(task, "start"), story.at(task, "taught")
        assert all(torch.equal(student[0][name], student[1][name]) for name in student[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbones_never_move(place: Path, variant: str) -> None:
    story = told(place, variant)
    for who in ("student", "teacher"):
        first, last = story.at(0, "start", who), story.at(2, "end", who)
        names = [name for name in first if name.startswith("backbone.")]
        assert names
        assert all(torch.equal(first[name], last[name]) for name in names)


def test_the_query_is_the_same_before_and_after(place: Path) -> None:
    session = told(place, "l2p").session
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    fresh = small.recipe(place, *VARIANTS["l2p"]).student
    net = fresh.build(session.plan.spec(session.recipe, 10), torch.Generator().manual_seed(0))
    assert torch.equal(session.student.query(images), net.query(images))


def test_kd_prompts_go_on_and_coda_groups_of_other_tasks_stand(place: Path) -> None:
    story = told(place, "coda")
    for task in range(3):
        before, after = story.at(task, "taught"), story.at(task, "end")
        assert all(moved(before, after, name).any() for name in before if name.startswith("kd_prompts."))
        for name in ("prompts.keys", "prompts.attention", "prompts.prompts"):
            groups = moved(before, after, name).transpose(0, 1).flatten(1).any(1)
            own = slice(2 * task, 2 * task + 2)
            assert groups[own].all()
            groups[own] = False
            assert not groups.any()
        if task < 2:
            later = story.at(task + 1, "start")
            kept = [name for name in after if name.startswith("kd_prompts.")]
            assert kept and all(torch.equal(after[name], later[name]) for name in kept)


def test_dualprompt_moves_its_own_experts_and_the_general_prompts(place: Path) -> None:
    story = told(place, "dualprompt")
    for task in range(3):
        before, after = story.at(task, "taught"), story.at(task, "end")
        experts = moved(before, after, "prompts.experts").transpose(0, 2).flatten(1).any(1)
        keys = moved(before, after, "prompts.keys").transpose(0, 1).flatten(1).any(1)
        assert experts.tolist() == keys.tolist() == [number == task for number in range(3)]
        assert moved(before, after, "prompts.general").any()


def test_after_the_stream_all_groups_answer(place: Path) -> None:
    story = told(place, "coda")
    assert story.session.student.prompts.task == 2
    student = api.load_student(place / "coda")
    assert student.prompts.task == 2
    batch = next(iter(story.session.tests[0].epoch(0)))
    story.session.student.eval()
    assert torch.equal(student(batch).logits, story.session.student(batch).logits)


# One task, and what follows from the matrix (dualprompt 4; cdl 9)


def test_one_task_needs_no_key_and_forgets_nothing(place: Path) -> None:
    folder = carry_out(place, "one task", *DUAL, *ALONE, "scenario.tasks=1", "scenario.epochs=1")
    figures = small.figures(folder)["student"]
    assert len(figures["accuracy_matrix"]) == 1
    assert set(figures["forgetting"].values()) == {0.0}
    assert figures["average_accuracy"] == figures["accuracy_matrix"][0][0] == figures["just_learned"]
    student = api.load_student(folder)
    batch = next(iter(Pairless(folder).batches.epoch(0)))
    answers = student(batch).logits
    student.train()
    assert torch.equal(student(batch).logits, answers)


class Pairless:
    """The test data of a finished run, without a session."""

    def __init__(self, folder: Path) -> None:
        from limbeck import config
        from limbeck.data.batches import Batches

        data = config.load(folder / "recipe.yaml").data.load().test
        self.batches = Batches(
            data, batch_size=32, size=8, channels=1, mean=(0.5,), std=(0.5,), shuffle=False
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_follow_from_the_matrix(place: Path, variant: str) -> None:
    told(place, variant)
    found = small.figures(place / variant)
    for who in ("student", "teacher"):
        side = found[who]
        matrix = [[0.0 if value is None else value for value in row] for row in side["accuracy_matrix"]]
        last = matrix[-1]
        assert side["average_accuracy"] == pytest.approx(sum(last) / 3)
        lost = [matrix[t][t] - last[t] for t in range(3)]
        assert side["forgetting"]["cdl"] == pytest.approx(sum(lost) / 3)
        assert side["just_learned"] == pytest.approx(side["average_accuracy"] + side["forgetting"]["cdl"])
        for name in metrics.FORGETTING:
            assert side["forgetting"][name] == pytest.approx(metrics.forgetting(matrix, name))
    confusion = np.array(found["student"]["confusion"])
    right = [confusion[i, i].sum() for i in range(10)]
    for task, (start, stop) in enumerate(pairwise(EDGES)):
        accuracy = 100 * sum(right[start:stop]) / confusion[start:stop].sum()
        assert accuracy == pytest.approx(found["student"]["accuracy_matrix"][2][task])
    logged = [line for line in small.lines(place / variant) if line["event"] == "evaluation"]
    rows = [line["accuracy"] for line in logged if line["who"] == "student"]
    assert [len(row) for row in rows] == [1, 2, 3]
    assert rows[-1] == found["student"]["accuracy_matrix"][-1]
    gaps = zip(found["teacher"]["accuracy_matrix"][-1], found["student"]["accuracy_matrix"][-1], strict=True)
    assert found["fidelity"]["gap_per_task"] == pytest.approx([t - s for t, s in gaps])


def test_the_same_seed_gives_the_same_run_and_another_does_not(place: Path) -> None:
    told(place, "coda")
    again = carry_out(place, "again", *VARIANTS["coda"])
    small.assert_same(again, place / "coda")
    other = carry_out(place, "other", *VARIANTS["coda"], "seed=1")
    assert small.figures(other)["student"] != small.figures(again)["student"]


def test_a_query_of_the_teachers_own(place: Path) -> None:
    own = carry_out(place, "own query", "scenario.query=own", "scenario.epochs=1")
    assert small.figures(own)["protocol"]["query"] == "own"
    keys = [v for k, v in api.load_student(own).state_dict().items() if k == "prompts.keys"]
    assert keys[0].shape[-1] == 12


# The heads are apart, the prompts are not (cdl 1, 4, 6)


@contextmanager
def opened(place: Path, folder: Path, *sets: str) -> Iterator[Session]:
    """A session that stands at the start of its first task."""
    recipe = small.recipe(place, *sets)
    with Run(folder, recipe.engine, recipe.seed, quiet=True) as run:
        session = Session(recipe, run)
        session.start_task(0)
        assert session.teacher is not None
        session.pair.teach(False)
        yield session


def gradients(session: Session, change: Callable[[Outputs], Outputs] | None = None) -> tuple[State, State]:
    """The gradient of every learnt part of the student after one step's backward, and the terms."""
    pair: Pair = session.pair

    def ask(batch: Any) -> Outputs:
        said = pair.ask_live(batch)
        return said if change is None else change(said)

    step = pair.distillation(session.window, ask).train()
    terms = step(next(iter(session.source.epoch(0))), Progress())
    pair.student.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    named = {name: p for name, p in pair.student.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}, terms


def weights(labels: float, kd: float) -> str:
    return f"objective=[{{name: labels, weight: {labels}}}, {{name: kd, weight: {kd}, temperature: 2}}]"


def test_each_loss_has_its_own_head_and_both_reach_the_prompts(place: Path, tmp_path: Path) -> None:
    with opened(place, tmp_path / "labels", weights(1, 0)) as session:
        of_labels, _ = gradients(session)
    with opened(place, tmp_path / "kd", weights(0, 1)) as session:
        of_kd, _ = gradients(session)
    with opened(place, tmp_path / "both", weights(0.5, 0.5)) as session:
        of_both, _ = gradients(session)
    assert not of_labels["kd_head.weight"].any() and not of_labels["kd_head.bias"].any()
    assert not of_kd["head.weight"].any() and not of_kd["head.bias"].any()
    for name in ("kd_prompts.token", "kd_prompts.prompts", "prompts.prompts"):
        assert of_labels[name].any() and of_kd[name].any()
    for name, grad in of_both.items():
        torch.testing.assert_close(grad, 0.5 * of_labels[name] + 0.5 * of_kd[name], rtol=1e-4, atol=1e-6)


def test_a_silent_teacher_leaves_the_base_learner(place: Path) -> None:
    """alpha = 0 and no KD prompts: bit for bit the student that learns alone."""
    alone = carry_out(place, "alone", *ALONE, "scenario.epochs=1")
    silent = carry_out(place, "silent", weights(1, 0), "student.kd_prompts=null", "scenario.epochs=1")
    layers = carry_out(place, "no layers", weights(1, 0), "student.kd_prompts.layers=0", "scenario.epochs=1")
    one, two, three = map(small.weights, (alone, silent, layers))
    assert one.keys() == two.keys() == three.keys()
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)


def test_what_the_teacher_says_of_other_classes_is_not_heard(place: Path, tmp_path: Path) -> None:
    def shout(said: Outputs) -> Outputs:
        logits = said.logits.clone()
        logits[:, 5:] += 100 * torch.randn(logits[:, 5:].shape)
        return replace(said, logits=logits)

    with opened(place, tmp_path / "run") as session:
        assert session.window == (0, 5)
        plain, shouted = gradients(session), gradients(session, shout)
    for before, after in zip(plain, shouted, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


# No replay of data


class Counted:
    """Pixels that tell which of them were read while which task was learnt."""

    def __init__(self, images: ImageSet, reads: list[tuple[int, list[int]]], task: Callable[[], int]) -> None:
        self.pixels, self.reads, self.task = images.images, reads, task
        self.shape = self.pixels.shape

    def read(self, positions: Any) -> Any:
        self.reads.append((self.task(), positions.tolist()))
        return self.pixels[positions]


def counting(patch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Every read of a training image from now on, with the task of the time."""
    reads: list[tuple[int, list[int]]] = []
    now = [-1]
    load, start = Digits.load, Session.start_task

    def counted(data: Digits) -> Splits:
        splits = load(data)
        return Splits(replace(splits.train, images=Counted(splits.train, reads, lambda: now[0])), splits.test)

    def started(session: Session, number: int) -> None:
        now[0] = number
        start(session, number)

    patch.setattr(Digits, "load", counted)
    patch.setattr(Session, "start_task", started)
    return reads


@pytest.mark.parametrize(
    "sets", [(), small.FRESH, small.REPLAYED, small.JOINT], ids=["plain", "fresh", "replayed", "joint"]
)
def test_no_sample_of_an_earlier_task_is_read(place: Path, tmp_path: Path, sets: tuple[str, ...]) -> None:
    """Over a whole run with its caches, killed in its second task, and over the resumed one."""
    recipe = small.recipe(place, *sets, "scenario.epochs=2", f"engine.cache_root={tmp_path / 'caches'}")
    stream = recipe.scenario.stream(recipe.data.load(), recipe.seed)
    owned = [set(task.train_index.tolist()) for task in stream]

    class Killed(BaseException):
        pass

    def killed(run: Run, stage: str, turns: Any) -> None:
        leave(run, stage, turns)
        if stage == "task1/teacher":
            raise Killed

    leave = Run.leave
    with pytest.MonkeyPatch.context() as patch:
        reads = counting(patch)
        patch.setattr(Run, "leave", killed)
        try:
            api.run(recipe, out=tmp_path / "run", quiet=True)
        except Killed:
            patch.setattr(Run, "leave", leave)
            before = len(reads)
            api.resume(tmp_path / "run", quiet=True)
            resumed = {task for task, positions in reads[before:] if positions}
            assert resumed <= {1}, "nothing of the first task is read again"
    assert {task for task, _ in reads} == {0, 1}
    for task in (0, 1):
        seen = {place for number, positions in reads if number == task for place in positions}
        assert seen <= owned[task]
        assert len(seen) > 0.8 * len(owned[task])


# Caches and kept teachers change nothing


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in small.lines(folder) if line["event"] == "step"]


def test_a_cached_teacher_teaches_like_a_live_one(place: Path) -> None:
    sets = (*small.REPLAYED, "scenario.epochs=3")
    live = losses(carry_out(place, "live", *sets, "engine.cache=false"))
    cached = losses(carry_out(place, "cached", *sets))
    assert len(live) == len(cached) > 10
    np.testing.assert_allclose(cached, live, rtol=1e-4)


def test_the_off_switch_writes_no_cache(place: Path, tmp_path: Path) -> None:
    sets = ("engine.cache=false", f"engine.cache_root={tmp_path / 'caches'}", "scenario.epochs=2")
    api.run(small.recipe(place, *sets), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "caches").exists()


def test_a_damaged_query_cache_is_made_anew(place: Path, tmp_path: Path) -> None:
    sets = (f"engine.cache_root={tmp_path / 'caches'}", *ALONE, "scenario.epochs=1")
    api.run(small.recipe(place, *sets), out=tmp_path / "one", quiet=True)
    damaged = next((tmp_path / "caches").rglob("query.bin"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-4])
    api.run(small.recipe(place, *sets), out=tmp_path / "two", quiet=True)
    said = [line["text"] for line in small.lines(tmp_path / "two") if line["event"] == "warning"]
    assert any("query.bin is damaged" in text for text in said)
    assert damaged.read_bytes() == whole
    assert all(torch.equal(a, b) for a, b in zip(
        small.weights(tmp_path / "one").values(), small.weights(tmp_path / "two").values(), strict=True
    ))  # fmt: skip


def test_a_kept_teacher_ends_where_a_trained_one_does(place: Path, tmp_path: Path) -> None:
    keep = ("engine.reuse_teachers=true", f"engine.cache_root={tmp_path / 'caches'}", "scenario.epochs=2")
    api.run(small.recipe(place, *keep, weights(1, 0.5)), out=tmp_path / "first", quiet=True)
    api.run(small.recipe(place, *keep), out=tmp_path / "reused", quiet=True)
    fresh = carry_out(place, "fresh teacher", "scenario.epochs=2")
    events = [line["stage"] for line in small.lines(tmp_path / "reused") if line["event"] == "teacher_reused"]
    assert events == ["task0/teacher", "task1/teacher"]
    assert small.weights(tmp_path / "reused").keys() == small.weights(fresh).keys()
    for name, value in small.weights(fresh).items():
        assert torch.equal(value, small.weights(tmp_path / "reused")[name])
    taken, trained = small.figures(tmp_path / "reused"), small.figures(fresh)
    lessons = {stage for stage in trained["terms"] if stage.endswith("teacher")}
    assert lessons and not lessons & taken["terms"].keys()  # a teacher that was taken over learnt elsewhere
    trained["terms"] = {stage: terms for stage, terms in trained["terms"].items() if stage not in lessons}
    assert taken == trained
    api.run(small.recipe(place, *keep, "teacher.prompts.length=2"), out=tmp_path / "other", quiet=True)
    assert "teacher_reused" not in {line["event"] for line in small.lines(tmp_path / "other")}


def test_a_damaged_kept_teacher_is_trained_anew(place: Path, tmp_path: Path) -> None:
    keep = ("engine.reuse_teachers=true", f"engine.cache_root={tmp_path / 'caches'}", "scenario.epochs=1")
    api.run(small.recipe(place, *keep), out=tmp_path / "first", quiet=True)
    for path in (tmp_path / "caches" / "teachers").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    api.run(small.recipe(place, *keep), out=tmp_path / "second", quiet=True)
    warned = [line["text"] for line in small.lines(tmp_path / "second") if line["event"] == "warning"]
    assert sum("the teacher is trained anew" in text for text in warned) == 2
    assert small.figures(tmp_path / "first") == small.figures(tmp_path / "second")
    api.run(small.recipe(place, *keep), out=tmp_path / "third", quiet=True)
    assert sum(line["event"] == "teacher_reused" for line in small.lines(tmp_path / "third")) == 2


# A teacher that says nothing sensible (cdl 10)


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_teacher_that_says_nan_is_named_with_task_and_sample(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    true = Session.student_phase

    def poisoned(session: Session) -> None:
        assert session.teacher is not None
        if session.task.number == 1:
            with torch.no_grad():
                session.teacher.head.bias[6] = torch.nan
        true(session)

    monkeypatch.setattr(Session, "student_phase", poisoned)
    sets = (f"engine.cache={cache}", "scenario.epochs=2", f"engine.cache_root={tmp_path / 'caches'}")
    with pytest.raises(NonFiniteError) as caught:
        api.run(small.recipe(place, *sets), out=tmp_path / "run", quiet=True)
    text = str(caught.value)
    assert text.startswith(
        "task1/student, epoch 0, step 0: loss term 'kd' is nan; the teacher's output is not"
    )
    assert "first at sample" in text
    assert "\n" not in text
    monkeypatch.undo()
    facts = json.loads((tmp_path / "run" / "checkpoints" / "facts.json").read_text())
    assert "task0/evaluation" in facts, "what was learnt before is not lost"


# Settings of the machine


def test_bf16_runs_a_stream(place: Path) -> None:
    exact = carry_out(place, "float32", "scenario.epochs=1")
    half = carry_out(place, "bf16", "scenario.epochs=1", "engine.precision=bf16")
    assert {value.dtype for value in small.weights(half).values()} <= {torch.float32, torch.int64}
    np.testing.assert_allclose(losses(half), losses(exact), rtol=0.1)
    assert losses(half) != losses(exact)


def test_compiled_steps_are_the_plain_ones(place: Path) -> None:
    """One short stage under ``torch.compile``, with autograd captured but no code generated."""
    sets = (
        *ALONE,
        "scenario.tasks=1",
        "student.prompts.pool=2",
        "scenario.epochs=1",
        "engine.diagnose_every=0",
    )
    plain = carry_out(place, "plain steps", *sets)
    true = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(true, backend="aot_eager"))
        compiled = carry_out(place, "compiled steps", *sets, "engine.compile=true")
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-4)
