"""What must be true of KD3."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine import small
from tests.engine.killing import killed_and_resumed
from torch import Tensor

from limbeck import api, config
from limbeck.contracts import Batch, Facts, Net, Outputs, Progress, Spec
from limbeck.data.digits import Digits
from limbeck.data.pool import Pool
from limbeck.data.shifted_pool import ShiftedPool
from limbeck.errors import ConfigError, ShapeError
from limbeck.losses.contrastive import nt_xent
from limbeck.losses.kd3 import alpha_schedule, disagreement, mix_distribution, select_instances
from limbeck.metrics import cost
from limbeck.objectives.kd3 import KD3
from limbeck.selectors.kd3 import KD3Selector
from limbeck.students.cnn import CNNStudent
from limbeck.students.kd3 import KD3Student
from limbeck.students.mlp import MLPStudent

SPEC = Spec(classes=10, channels=1, size=8)
SMALL = (
    "scenario.epochs=2", "scenario.teacher_epochs=1", "scenario.batch_size=50", "engine.threads=1",
    "teacher.network.widths=[6, 8]", "teacher.data.test_fraction=0.9", "data.data.test_fraction=0.9",
    "data.uniform=30", "data.blends=30", "engine.reuse_teachers=false",
)  # fmt: skip


def logits(seed: int, count: int = 60, classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(count, classes, generator=generator, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 6) -> Batch:
    index = torch.arange(count)
    return Batch(torch.randn(count, 1, 8, 8, generator=seeded(3)), index % 10, index, 0 * index)


# The schedule and the selection


def test_the_schedule_falls_to_nothing_at_the_half() -> None:
    shares = [alpha_schedule(e) for e in range(1, 131)]
    assert all(0 < a < 1 for a in shares[:119])
    assert all(a > b for a, b in itertools.pairwise(shares[:119]))
    assert shares[119:] == [0.0] * 11
    assert [alpha_schedule(1), alpha_schedule(60)] == pytest.approx([0.992, 0.853], abs=5e-4)
    assert alpha_schedule(119) > 0.26
    assert [alpha_schedule(e, 10) > 0 for e in (1, 9, 10)] == [True, True, False]


@given(st.integers(0, 10**6))
def test_at_the_ends_one_network_decides(seed: int) -> None:
    student, teacher, other = logits(seed), logits(seed + 1), logits(seed + 2)
    by_teacher, by_student = (select_instances(student, teacher, a) for a in (1.0, 0.0))
    assert torch.equal(by_teacher[0], select_instances(other, teacher, 1.0)[0])
    assert torch.equal(by_student[0], select_instances(student, other, 0.0)[0])


@given(st.integers(0, 10**6), st.floats(0.5, 0.99))
def test_the_most_frequent_class_has_the_whole_cutoff(seed: int, cut: float) -> None:
    keep, sure, said, cutoff = select_instances(logits(seed, 12), logits(seed + 1, 12), 0.5, cut)
    counts = said.bincount(minlength=5)
    assert cutoff[counts.argmax()] == pytest.approx(cut)
    assert (cutoff[counts == 0] == 0).all()
    assert torch.equal(keep, sure > cutoff[said])


def test_logits_are_mixed_not_probabilities() -> None:
    student, teacher = torch.tensor([[0.0, 8.0]]), torch.tensor([[20.0, 0.0]])
    _, sure, said, _ = select_instances(student, teacher, 0.5)
    assert said.item() == 0
    assert sure.item() == pytest.approx(torch.tensor([10.0, 4.0]).softmax(0)[0].item())


# The losses


@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_disagreement_grows_from_a_half(seed: int, far: float) -> None:
    own = logits(seed, 4).requires_grad_()
    near, wide = (disagreement(own, own.detach() + shift) for shift in (far, 2 * far))
    torch.testing.assert_close(
        disagreement(own, own), torch.full((4,), 0.5, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert (wide >= near).all() and (near > 0.5).all() and (near <= 1).all()
    assert not near.requires_grad


def test_mixed_images_have_mixed_statistics() -> None:
    images = torch.randn(5, 3, 6, 6, generator=seeded(), dtype=torch.float64) * 2 + 1
    order = torch.tensor([2, 0, 4, 1, 3])
    share = torch.rand(5, 1, 1, 1, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(mix_distribution(images, torch.ones_like(share), order), images)
    torch.testing.assert_close(mix_distribution(images, share, torch.arange(5)), images)
    mixed = mix_distribution(images, share, order)
    mean, scale = images.mean((2, 3)), (images.var((2, 3)) + 1e-6).sqrt()
    part = share[:, :, 0, 0]
    torch.testing.assert_close(mixed.mean((2, 3)), part * mean + (1 - part) * mean[order])
    torch.testing.assert_close(
        mixed.std((2, 3)), part * scale + (1 - part) * scale[order], rtol=1e-5, atol=1e-6
    )
    flat = torch.full((2, 1, 3, 3), 2.0)
    flat[1] = 4.0
    half = mix_distribution(flat, torch.full((2, 1, 1, 1), 0.5), torch.tensor([1, 0]))
    torch.testing.assert_close(half, torch.full_like(half, 3.0))


@given(st.integers(0, 10**6))
def test_contrast(seed: int) -> None:
    one, other = logits(seed, 6, 8), logits(seed + 1, 6, 8)
    value = nt_xent(one, other)
    torch.testing.assert_close(nt_xent(other, one), value)
    torch.testing.assert_close(nt_xent(3 * one, 0.5 * other), value)
    assert nt_xent(one[:1], other[:1]).item() == pytest.approx(0, abs=1e-9)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert nt_xent(apart, apart) <= nt_xent(one[:2], other[:2]) + 1e-9


# The student


def pair(student: Any, teacher: Any) -> tuple[Net, Net]:
    built, taught = student.build(SPEC, seeded(1)), teacher.build(SPEC, seeded(2))
    built.attach_teacher(taught)
    return built, taught


@pytest.mark.parametrize("widths", [(4, 6), (4, 6, 9), (5,)])
def test_other_sizes_and_widths_go_through_the_projector(widths: tuple[int, ...]) -> None:
    student, teacher = pair(KD3Student(network=CNNStudent(widths=widths)), CNNStudent(widths=(6, 12)))
    objective = KD3()
    own = student(batch(), objective.needs().student)
    told = teacher(batch(), objective.needs().teacher)
    assert own.features["projected"].shape[1] == 12
    terms = objective.build(own, told)(replace(own, paths={"kd3": own}), told, batch(), Progress())
    assert set(terms) == {"features", "contrast"}
    assert all(torch.isfinite(term) for term in terms.values())


def test_the_taps_of_the_cifar_recipe_fit_their_networks() -> None:
    recipe = config.load("kd3-cifar10")
    spec = Spec(classes=10, channels=3, size=32)
    student = recipe.student.build(spec, seeded(1))
    student.attach_teacher(recipe.teacher.build(spec, seeded(2)))
    index = torch.arange(2)
    said = student.eval()(Batch(torch.randn(2, 3, 32, 32), index, index, index), ("projected",))
    assert said.logits.shape == (2, 10)
    assert said.features["projected"].shape == (2, 64, 8, 8)


@pytest.mark.usefixtures("quick")
def test_a_schedule_by_epochs_takes_as_many_steps_as_are_selected(tmp_path: Path) -> None:
    sets = ("scenario.equal_steps=false", "scenario.optim.schedule=multistep", "scenario.optim.lr=0.001")
    found = api.run(
        "kd3", [*SMALL, *sets, f"engine.cache_root={tmp_path / 'caches'}"], out=tmp_path / "run", quiet=True
    )
    kept = found.data["selection"]["kept"]
    last = [
        line for line in small.lines(tmp_path / "run") if line["event"] == "step" and line["stage"] == "train"
    ][-1]
    assert last["step"] < sum(-(-count // 50) for count in kept)
    assert last["epoch"] == 1


def test_perceptrons_count_as_maps_of_one_pixel() -> None:
    taps = {"tap": "hidden.-1", "teacher_tap": "hidden.-1"}
    student, _ = pair(KD3Student(network=MLPStudent(hidden=(7,)), **taps), MLPStudent(hidden=(9, 5)))
    assert student(batch(), ("projected",)).features["projected"].shape == (6, 5, 1, 1)


def test_the_answer_goes_through_the_teachers_classifier_which_gets_no_gradient() -> None:
    student, teacher = pair(KD3Student(network=CNNStudent(widths=(4,))), CNNStudent(widths=(6,)))
    teacher.requires_grad_(False)
    said = student.train()(batch(), ("projected", "pooled"))
    head = teacher.get_submodule("network.head")
    torch.testing.assert_close(said.logits, head(said.features["projected"].mean((2, 3))))
    assert said.features["pooled"].shape == (6, 4)
    said.logits.square().sum().backward()
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not any(p.requires_grad for p in student.get_submodule("classifier").parameters())
    with pytest.raises(AttributeError):
        student.get_parameter("body.network.head.weight")


def test_what_has_learnt_keeps_the_classifier_as_it_was_then() -> None:
    student, teacher = pair(KD3Student(network=CNNStudent(widths=(4,))), CNNStudent(widths=(6,)))
    student.eval()
    head = teacher.get_submodule("network.head")
    with torch.no_grad():
        head.weight.add_(1)  # the teacher learnt after it was attached
    then = student(batch()).logits
    student.finish_task()
    with torch.no_grad():
        head.weight.add_(1)
    assert torch.equal(student(batch()).logits, then)
    other, _ = pair(KD3Student(network=CNNStudent(widths=(4,))), CNNStudent(widths=(6,)))
    other.load_state_dict(student.state_dict())
    assert torch.equal(other.eval()(batch()).logits, then)


def test_without_a_teacher_it_does_not_answer() -> None:
    student = KD3Student(network=CNNStudent(widths=(4,))).build(SPEC, seeded())
    with pytest.raises(ConfigError, match="name a teacher"):
        student(batch())


def test_paths_that_are_not_there_are_named() -> None:
    with pytest.raises(ShapeError, match="head"):
        KD3Student(network=CNNStudent(widths=(4,)), classifier="hed").build(SPEC, seeded())


# The objective


def test_the_teachers_embedding_learns_and_needs_a_teacher() -> None:
    student, teacher = pair(KD3Student(network=CNNStudent(widths=(4,))), CNNStudent(widths=(6,)))
    objective = KD3(embed_teacher=True)
    own, told = student(batch(), objective.needs().student), teacher(batch(), objective.needs().teacher)
    with pytest.raises(ConfigError, match="embed_teacher"):
        objective.build(own, told)
    module = objective.build(own, told, Facts(seed=1, teacher=teacher.eval()))
    assert not any(name.startswith("_teacher") for name in module.state_dict())
    terms = module(replace(own, paths={"kd3": own}), told.detach(), batch(), Progress())
    terms["contrast"].backward()
    assert module.embed_teacher.weight.grad.abs().max() > 0


def test_the_view_depends_on_the_seed_and_the_step_alone() -> None:
    student, teacher = pair(KD3Student(network=CNNStudent(widths=(4,))), CNNStudent(widths=(6,)))
    own, told = student(batch(), ("projected", "pooled")), teacher(batch(), ("stages.-1",))
    one, other = (KD3().build(own, told, Facts(seed=5)) for _ in range(2))
    at = Progress(step=7)
    torch.manual_seed(1)
    seen = one.view(batch(), at).inputs
    torch.manual_seed(2)
    assert torch.equal(seen, other.view(batch(), at).inputs)
    assert not torch.equal(seen, one.view(batch(), Progress(step=8)).inputs)


# The pool


def test_the_pool_has_no_labels_and_a_clean_test() -> None:
    pool = ShiftedPool(data=Digits(), uniform=50, blends=40).seeded(3).load()
    clean = Digits().load()
    assert not pool.train.labels.any() and not pool.train.labelled.any()
    assert np.array_equal(pool.test.images, clean.test.images)
    assert 0.4 * len(clean.train) < len(pool.train) - 90 < len(clean.train)
    assert "50 noise, 40 blends" in pool.train.name
    again = ShiftedPool(data=Digits(), uniform=50, blends=40).seeded(3).load()
    assert again.train.fingerprint == pool.train.fingerprint
    assert ShiftedPool(data=Digits()).seeded(4).load().train.fingerprint != pool.train.fingerprint


def test_any_data_set_can_be_a_pool() -> None:
    pool = Pool(data=Digits(), pool=Digits(test_fraction=0.5)).seeded(0).load()
    assert (len(pool.train), len(pool.test)) == (898, 450)
    assert not pool.train.labelled.any()


@pytest.mark.parametrize("fields", [{"contrast": 0}, {"noise": -1}, {"imbalance": 0.5}, {"uniform": -1}])
def test_wrong_pools_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ShiftedPool(data=Digits(), **fields)


# The selector at work


class Course(SimpleNamespace):
    """Two networks that say the same to every image, and a run's memory."""

    def once(self, name: str, compute: Any) -> Any:
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def batches(self, index: Tensor, view: int | None = None) -> Any:
        yield Batch(index.float()[:, None], 0 * index, index, 0 * index)

    def ask(self, batch: Batch) -> Outputs:
        return Outputs(self.told[batch.index])


class Says(Net):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        assert not self.training
        return Outputs(self.logits[batch.index])


def course(own: Tensor, told: Tensor) -> Any:
    warned: list[str] = []
    net = Says(own).train()
    return Course(
        student=net,
        teacher=net,
        told=told,
        index=torch.arange(len(own)),
        kept={},
        warned=warned,
        warn=warned.append,
    )


def test_all_sure_is_the_whole_pool_and_none_sure_the_surest() -> None:
    index = torch.arange(8)
    sure = course(20 * torch.eye(4).repeat(2, 1), 20 * torch.eye(4).repeat(2, 1))
    chosen = KD3Selector(least=2).prepare(sure)
    assert torch.equal(chosen.indices(index, index, 0, seeded()), index)
    assert sure.student.training and not sure.warned
    flat = torch.zeros(8, 4)
    flat[:, 0] = torch.linspace(0.1, 0.2, 8)
    unsure = course(flat, flat)
    chosen = KD3Selector(least=3).prepare(unsure)
    assert chosen.indices(index, index, 0, seeded()).tolist() == [5, 6, 7]
    assert "only 0 of 8 images are sure enough" in unsure.warned[0]
    assert chosen.facts() == {"pool": 8, "kept": [3]}


def test_it_needs_a_teacher() -> None:
    with pytest.raises(ConfigError, match="name a teacher"):
        KD3Selector().prepare(Course(teacher=None))  # type: ignore[arg-type]


# Whole runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.mark.usefixtures("quick")
def test_killed_resumed_and_exported(tmp_path: Path) -> None:
    asked = config.load(
        "kd3", [*SMALL, "engine.checkpoint_seconds=0", f"engine.cache_root={tmp_path / 'caches'}"]
    )
    whole = api.run(asked, out=tmp_path / "whole", quiet=True)
    small.assert_same(killed_and_resumed(asked, tmp_path / "killed", at=12), tmp_path / "whole")
    assert len(whole.data["selection"]["kept"]) == 2
    assert (tmp_path / "whole" / "report.html").exists()
    exported = small.weights(tmp_path / "whole")
    assert {name.split(".")[0] for name in exported} == {"body", "projector", "classifier", "settled"}
    student = api.load_student(tmp_path / "whole")
    test = asked.data.seeded(asked.seed).load().test
    images = (torch.from_numpy(test.images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    none = torch.zeros(len(images), dtype=torch.int64)
    said = student.predict(student(Batch(images, none, none, none))).argmax(1)
    accuracy = 100 * (said == test.labels).double().mean().item()
    assert accuracy == pytest.approx(
        json.loads((tmp_path / "whole" / "result.json").read_text())["student"]["accuracy"]
    )


def test_labels_of_the_pool_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    caches = f"engine.cache_root={tmp_path / 'caches'}"
    asked = config.load("kd3", [*SMALL, caches])
    api.run(asked, out=tmp_path / "one", quiet=True)
    load = ShiftedPool.load

    def other(self: ShiftedPool) -> Any:
        splits = load(self)
        return replace(splits, train=replace(splits.train, labels=splits.train.labels + 3))

    monkeypatch.setattr(ShiftedPool, "load", other)
    api.run(asked, out=tmp_path / "other", quiet=True)
    assert small.weights(tmp_path / "one").keys() == small.weights(tmp_path / "other").keys()
    files = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]
