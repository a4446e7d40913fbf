"""What must be true of data pruning with distillation."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine import small
from tests.engine.killing import killed_and_resumed
from torch import Tensor

from limbeck import api, config, losses
from limbeck.errors import ConfigError, DataError, NonFiniteError
from limbeck.losses.pruned import pruned_kd_loss
from limbeck.metrics import cost
from limbeck.metrics.pruning import el2n, forgetting, keep_indices
from limbeck.metrics.ridge_theory import FRACTIONS, ridge_table, ridge_theory
from limbeck.selectors.pruned import Pruned, alpha_rule

LABELS = torch.tensor([0] * 20 + [1] * 10 + [2] * 3)
SMALL = ("scenario.epochs=2", "student.hidden=[16]", "engine.threads=1", "engine.reuse_teachers=false")


def scores(seed: int) -> Tensor:
    return torch.rand(len(LABELS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 1000), st.sampled_from(["hard", "easy", "moderate", "random"]))
def test_a_fraction_of_one_keeps_everything(seed: int, mode: Any) -> None:
    assert torch.equal(keep_indices(scores(seed), 1.0, mode, generator=draws()), torch.arange(33))


@given(st.integers(0, 1000), st.sampled_from(["hard", "easy"]), st.floats(0.05, 1), st.floats(0.05, 1))
def test_kept_sets_are_nested(seed: int, mode: Any, one: float, other: float) -> None:
    small, large = (keep_indices(scores(seed), f, mode) for f in sorted((one, other)))
    assert set(small.tolist()) <= set(large.tolist())


@given(st.integers(0, 1000), st.sampled_from(["hard", "easy", "moderate", "random"]), st.floats(0.2, 1))
def test_balanced_keeps_the_share_of_each_class(seed: int, mode: Any, fraction: float) -> None:
    kept = keep_indices(scores(seed), fraction, mode, LABELS, draws())
    counts = LABELS[kept].bincount(minlength=3).tolist()
    assert counts == [math.floor(fraction * n + 0.5) for n in (20, 10, 3)]


def test_a_random_choice_depends_on_the_seed_alone() -> None:
    first = keep_indices(scores(0), 0.4, "random", generator=draws(3))
    assert torch.equal(first, keep_indices(scores(1), 0.4, "random", generator=draws(3)))
    assert not torch.equal(first, keep_indices(scores(0), 0.4, "random", generator=draws(4)))


def test_ties_go_to_the_first() -> None:
    assert keep_indices(torch.zeros(6), 0.5, "hard").tolist() == [0, 1, 2]
    assert keep_indices(torch.zeros(6), 0.5, "easy").tolist() == [0, 1, 2]


def test_nothing_kept_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="keeps none of 4"):
        keep_indices(torch.zeros(4), 0.1, "easy")
    with pytest.raises(NonFiniteError, match="sample 2"):
        keep_indices(torch.tensor([0.0, 1.0, math.nan, 2.0]), 0.5, "hard")
    with pytest.raises(ConfigError, match="fraction is 0"):
        keep_indices(torch.zeros(4), 0.0, "easy")
    with pytest.raises(ConfigError, match="did you mean 'hard'"):
        keep_indices(torch.zeros(4), 0.5, "hrd")  # type: ignore[arg-type]


def test_el2n_runs_from_perfect_to_certainly_wrong() -> None:
    probs = torch.eye(3, dtype=torch.float64)[None]
    right, wrong = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    assert el2n(probs, right).tolist() == [0, 0, 0]
    torch.testing.assert_close(el2n(probs, wrong), torch.full((3,), math.sqrt(2), dtype=torch.float64))


def test_forgetting_counts_losses_and_the_never_learnt() -> None:
    correct = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]])
    assert forgetting(correct).tolist() == [1, 2, 4, 0]


def test_the_ends_of_alpha() -> None:
    generator = draws()
    student, teacher = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    labels, others = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 2, 1, 0, 3, 2])
    torch.testing.assert_close(
        pruned_kd_loss(student, None, labels, 0.0), losses.cross_entropy(student, labels)
    )
    assert torch.equal(
        pruned_kd_loss(student, teacher, labels, 1.0), pruned_kd_loss(student, teacher, others, 1.0)
    )
    with pytest.raises(ConfigError, match="there is no teacher"):
        pruned_kd_loss(student, None, labels, 0.5)


def test_the_rule_falls_from_one_to_a_half() -> None:
    points = [alpha_rule(f) for f in (0.01, 0.1, 0.3, 0.7, 1.0)]
    assert points == pytest.approx([1, 1, 0.8, 0.5, 0.5])
    assert all(a >= b for a, b in itertools.pairwise(points))


@given(st.integers(0, 300))
def test_ridge_theory(seed: int) -> None:
    chance = np.random.default_rng(seed)
    columns, theta = chance.standard_normal((4, 30)), chance.standard_normal(4)
    found = ridge_theory(columns, np.arange(8), theta, [0.0, 1.0], 0.5, 1.0)
    assert found.error_star < min(found.error) - 1e-9 or found.alpha_star in (0.0, 1.0)
    ours = columns[:, :8]
    plain = np.linalg.inv(ours @ ours.T + 0.5 * np.eye(4)) @ ours
    direct = np.sum((plain @ ours.T @ theta - theta) ** 2) + np.sum(plain**2)
    assert found.error[0] == pytest.approx(direct)
    whole = ridge_theory(columns, np.arange(30), theta, [0.0, 0.5, 1.0], 1e-9, 1.0)
    np.testing.assert_allclose(whole.error, whole.error[0], rtol=1e-6)


def test_a_teacher_with_more_data_does_not_raise_the_error() -> None:
    errors = {n: [] for n in (20, 40, 80)}  # type: dict[int, list[float]]
    for seed in range(60):
        chance = np.random.default_rng(seed)
        columns, theta = chance.standard_normal((6, 80)), chance.standard_normal(6)
        for n, found in errors.items():
            found.append(ridge_theory(columns[:, :n], np.arange(10), theta, [0.0], 1.0, 1.0).error_star)
    means = [np.mean(errors[n]) for n in (20, 40, 80)]
    assert means[0] > means[1] > means[2]


def test_the_table_of_the_theory() -> None:
    table = ridge_table(draws=10)
    assert tuple(table) == FRACTIONS
    assert table[0.1]["0"] > table[0.1]["1"] > table[0.1]["error_star"] - 1e-9
    assert table[0.1]["0"] - table[0.1]["1"] > table[0.9]["0"] - table[0.9]["1"]


def run(place: Path, name: str, *sets: str) -> Path:
    api.run(
        name, [*SMALL, f"engine.cache_root={place / 'caches'}", *sets], seed=1, out=place / "run", quiet=True
    )
    return place / "run"


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def test_keeping_all_is_ordinary_distillation(tmp_path: Path) -> None:
    pruned = run(tmp_path / "a", "data-pruning-kd", "selector.fraction=1", "selector.alpha=null")
    plain = run(tmp_path / "b", "data-pruning-kd", "selector={name: all}")
    assert weights(pruned) == weights(plain)


def test_with_alpha_one_wrong_labels_change_nothing(tmp_path: Path) -> None:
    teacher = "teacher.data={name: part, data: {name: digits}, per_class: 100}"
    sets = (teacher, "selector.alpha=1", "scenario.teacher_epochs=1")
    clean = run(tmp_path / "a", "data-pruning-kd", *sets, "data.noise=0")
    noisy = run(tmp_path / "b", "data-pruning-kd", *sets, "data.noise=0.4")
    assert weights(clean) == weights(noisy)


@pytest.mark.parametrize("score", ["el2n", "grand", "forgetting"])
def test_what_was_kept_is_written_down_and_a_lost_class_is_warned_of(score: str, tmp_path: Path) -> None:
    probes = ("selector.probes=2", "selector.probe_epochs=2", "selector.tap=hidden.-1")
    few = "selector.fraction=0.008"
    folder = run(tmp_path, "data-pruning-hard", f"selector.score={score}", *probes, few)
    found = json.loads((folder / "result.json").read_text())["selection"]
    assert len(found["indices"]) == found["samples"] == 8
    assert (found["score"], found["fraction"], found["mode"]) == (score, 0.008, "hard")
    assert found["seed"] == "the run's"
    assert found["classes_lost"]
    assert "pruning left no sample of class" in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("score", "at"), [("forgetting", 12), ("forgetting", 34), ("el2n", 44)])
def test_killed_and_resumed(score: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    probes = ("selector.probes=2", "selector.probe_epochs=2", "data.per_class=40", "data.noise=0")
    caches = f"engine.cache_root={tmp_path / 'caches'}"
    sets = [*SMALL, *probes, caches, f"selector.score={score}", "engine.checkpoint_seconds=1000"]
    api.run(config.load("data-pruning-hard", sets), out=tmp_path / "whole", quiet=True)
    for seconds in (0, 1000):
        recipe = config.load("data-pruning-hard", [*sets, f"engine.checkpoint_seconds={seconds}"])
        folder = killed_and_resumed(recipe, tmp_path / f"killed{seconds}", at=at)
        small.assert_same(folder, tmp_path / "whole")


def test_alpha_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no objective listens to a teacher"):
        run(tmp_path, "data-pruning", "selector.alpha=0.5")


def test_alpha_zero_says_that_the_teacher_is_asked_in_vain(tmp_path: Path) -> None:
    folder = run(tmp_path, "data-pruning-kd", "selector.alpha=0", "scenario.teacher_epochs=1")
    assert "asked in vain" in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "fields",
    [{"fraction": 0}, {"fraction": 1.5}, {"probes": 0}, {"alpha": 2.0}, {"mode": "hard", "score": "grand"}],
)
def test_wrong_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Pruned(**fields)
