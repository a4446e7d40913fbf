"""What must be true of concentrated knowledge and of its re-calibration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, NonFiniteError, ShapeError
from limbeck.losses import first_loss, kl_divergence
from limbeck.losses.first import (
    label_smooth,
    linear_normalise,
    recalibrate,
    target_with_rest,
    top_probabilities,
    with_rest,
)

seeds = st.integers(0, 2**31)
scalings = st.sampled_from(["linear", "probability", "power"])


def draw(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.integers(1, 8))
def test_kept_tokens_are_the_most_probable_in_order(seed: int, k: int) -> None:
    logits = draw(seed, 3, 8)
    ids, probs = top_probabilities(logits, k)
    assert (probs.diff(dim=-1) <= 0).all()
    assert torch.equal(probs, logits.softmax(-1).gather(-1, ids))
    coverage = probs.sum(-1)
    assert ((coverage > 0) & (coverage <= 1 + 1e-12)).all()
    if k == 8:
        torch.testing.assert_close(coverage, torch.ones(3, dtype=torch.float64))


@given(seeds)
def test_all_tokens_kept_is_plain_kl(seed: int) -> None:
    student, teacher = draw(seed, 4, 8), draw(seed + 1, 4, 8)
    ids, probs = top_probabilities(teacher, 8)
    loss = first_loss(student, ids, recalibrate(probs, "linear", eps=0), eps=0)
    torch.testing.assert_close(loss, kl_divergence(student, teacher))


@given(seeds, st.floats(0.02, 50))
def test_softmax_over_probabilities(seed: int, c: float) -> None:
    _, probs = top_probabilities(draw(seed, 4, 20), 5)
    scaled = recalibrate(probs, "probability", c)
    torch.testing.assert_close(scaled.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (scaled.diff(dim=-1) <= 0).all()
    bound = ((probs[:, 0] - probs[:, -1]) / c).exp()
    assert (scaled[:, 0] <= bound * scaled[:, -1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("scaling", ["probability", "power"])
def test_limits_of_the_temperature(scaling: str) -> None:
    probs = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05], dtype=torch.float64)
    cold, hot = (recalibrate(probs, scaling, c) for c in (1e-4, 1e6))  # type: ignore[arg-type]
    torch.testing.assert_close(cold, torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(hot, torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@given(seeds, st.floats(0.2, 5))
def test_power_is_a_temperature_of_the_logits(seed: int, c: float) -> None:
    logits = draw(seed, 3, 6)
    ids, probs = top_probabilities(logits, 6)
    wanted = (logits / c).softmax(-1).gather(-1, ids)
    torch.testing.assert_close(recalibrate(probs, "power", c), wanted)


@given(seeds, st.floats(0, 0.9), st.booleans())
def test_smoothing_keeps_the_sum(seed: int, delta: float, keep_order: bool) -> None:
    _, probs = top_probabilities(draw(seed, 4, 20), 5)
    smooth = label_smooth(probs, delta, keep_order=keep_order)
    torch.testing.assert_close(smooth.sum(-1), probs.sum(-1))
    if keep_order:
        assert (smooth[:, 0] >= smooth[:, 1] - 1e-12).all()
        assert (smooth >= 0).all()


def test_smoothing_stops_where_the_answer_would_change() -> None:
    probs = torch.tensor([0.33, 0.21, 0.15, 0.11, 0.08], dtype=torch.float64)
    free = label_smooth(probs, 0.1, keep_order=False)
    assert free[0] == pytest.approx(0.23)
    assert free[0] < free[1]
    kept = label_smooth(probs, 0.1)
    assert kept[0] == pytest.approx(float(kept[1]))
    with pytest.raises(ShapeError, match="at least 2"):
        label_smooth(probs[:1], 0.1)
    with pytest.raises(ConfigError, match="delta"):
        label_smooth(probs, -0.1)


@given(seeds, scalings, st.floats(0.3, 3))
def test_the_rest_keeps_the_teachers_mass(seed: int, scaling: str, c: float) -> None:
    _, probs = top_probabilities(draw(seed, 4, 20), 5)
    target = target_with_rest(probs, scaling, c)  # type: ignore[arg-type]
    torch.testing.assert_close(target.sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(target[:, -1], 1 - probs.sum(-1), rtol=0, atol=1e-5)


@given(seeds, st.booleans())
def test_student_that_is_the_teacher(seed: int, rest: bool) -> None:
    teacher = draw(seed, 4, 12)
    ids, probs = top_probabilities(teacher, 5)
    student = teacher.clone().requires_grad_()
    loss = first_loss(student, ids, linear_normalise(with_rest(probs) if rest else probs))
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert grad.abs().max() < 1e-12


@given(seeds)
def test_what_the_student_says_elsewhere(seed: int) -> None:
    student, teacher = draw(seed, 3, 12), draw(seed + 1, 3, 12)
    ids, probs = top_probabilities(teacher, 5)
    outside = torch.ones(3, 12, dtype=torch.bool).scatter(-1, ids, False)
    grads = []
    for target in (linear_normalise(probs), linear_normalise(with_rest(probs))):
        leaf = student.clone().requires_grad_()
        (grad,) = torch.autograd.grad(first_loss(leaf, ids, target, eps=1e-9), leaf)
        grads.append(grad[outside].abs().max().item())
    assert grads[0] < 1e-5  # only through eps
    assert grads[1] > 10 * grads[0]
    # without eps they are free altogether
    moved = torch.where(outside, student + 1, student)
    target = linear_normalise(probs)
    torch.testing.assert_close(first_loss(moved, ids, target, eps=0), first_loss(student, ids, target, eps=0))


def test_masked_positions_have_no_influence() -> None:
    student, teacher = draw(0, 2, 3, 9), draw(1, 2, 3, 9)
    ids, probs = top_probabilities(teacher, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    target = linear_normalise(probs)
    wanted = first_loss(student[mask], ids[mask], target[mask])
    student[~mask], target[~mask] = torch.nan, torch.nan
    leaf = student.requires_grad_()
    loss = first_loss(leaf, ids, target, mask=mask)
    torch.testing.assert_close(loss, wanted)
    assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()
    none = first_loss(leaf, ids, target, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert none == 0
    assert (torch.autograd.grad(none, leaf)[0] == 0).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_stored_pairs_give_the_same_loss(dtype: torch.dtype, rtol: float) -> None:
    student, teacher = draw(3, 6, 30).float(), draw(4, 6, 30).float()
    ids, probs = top_probabilities(teacher, 5)
    live = first_loss(student, ids, recalibrate(probs, "power", 1.5))
    stored = first_loss(student, ids.int().long(), recalibrate(probs.to(dtype).float(), "power", 1.5))
    torch.testing.assert_close(stored, live, rtol=rtol, atol=0)


def test_a_student_sure_of_another_token_stays_finite() -> None:
    student = torch.tensor([[300.0, 0, 0, -300]], requires_grad=True)
    target = torch.tensor([[0.6, 0.3, 0.1]])
    loss = first_loss(student, torch.tensor([[3, 2]]), target)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_a_broken_row_is_refused_when_stored() -> None:
    logits = draw(0, 4, 6)
    for value in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[2, 1] = value
        with pytest.raises(NonFiniteError, match="row 2"):
            top_probabilities(broken, 3)
    logits[1, 0] = -torch.inf  # a token that is not allowed
    assert torch.isfinite(top_probabilities(logits, 3)[1]).all()


def test_wrong_arguments_are_named() -> None:
    probs = torch.tensor([[0.5, 0.3]])
    with pytest.raises(ConfigError, match="scaling 'softmax'"):
        recalibrate(probs, "softmax")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="c is 0"):
        recalibrate(probs, "power", 0.0)
    with pytest.raises(ConfigError, match="k is 7"):
        top_probabilities(torch.zeros(1, 6), 7)
    with pytest.raises(ShapeError, match="for ids"):
        first_loss(torch.zeros(1, 6), torch.zeros(1, 2).long(), torch.full((1, 4), math.e))
