"""What must be true of distillation on the tokens that can still be learnt."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import kl_divergence, select, selection_weights, selective_kl
from limbeck.losses.selective import gap_threshold, token_kl

seeds = st.integers(0, 2**31)
fractions = st.floats(0.01, 1)


def case(seed: int, rows: int = 9, vocabulary: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft, target, reference = 2 * torch.randn(3, rows, vocabulary, generator=generator, dtype=torch.float64)
    return draft.requires_grad_(), target, reference


def gaps(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_all_tokens_are_plain_distillation(seed: int) -> None:
    draft, target, reference = case(seed)
    loss, plain = selective_kl(draft, target, reference, 1.0), kl_divergence(draft, target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, draft)[0] for x in (loss, plain)))


@given(seeds, fractions)
def test_a_draft_like_its_reference_learns_from_all(seed: int, fraction: float) -> None:
    draft, target, _ = case(seed)
    own = token_kl(draft, target)
    assert select(own - token_kl(draft, target), fraction).all()
    torch.testing.assert_close(selective_kl(draft, target, draft, fraction), own.mean())


@given(seeds, st.integers(1, 60), fractions)
def test_how_many_are_selected(seed: int, count: int, fraction: float) -> None:
    place = fraction * (count - 1)
    assume(abs(place - round(place)) > 1e-6)  # there rounding decides whether the one at the threshold is in
    assert select(gaps(seed, count), fraction).sum() == math.floor(place) + 1


def test_ties_at_the_threshold_are_all_kept() -> None:
    gap = torch.tensor([3.0, 1, 1, 1, 0])
    assert select(gap, 0.4).tolist() == [True, True, True, True, False]


@given(seeds, fractions, st.integers(-50, 50))
def test_selection_ignores_a_constant_and_the_order(seed: int, fraction: float, constant: int) -> None:
    gap = gaps(seed, 21).mul(1024).round()  # sums with the constant are exact
    place = fraction * 20
    assume(abs(place - round(place)) > 1e-6)
    chosen = select(gap, fraction)
    assert torch.equal(select(gap + constant, fraction), chosen)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(select(gap[order], fraction), chosen[order])


@given(seeds, st.floats(0.05, 0.95))
def test_gradient_is_that_of_the_selected_rows_alone(seed: int, fraction: float) -> None:
    draft, target, reference = case(seed)
    target.requires_grad_()
    reference.requires_grad_()
    loss = selective_kl(draft, target, reference, fraction)
    grad, *others = torch.autograd.grad(loss, (draft, target, reference), allow_unused=True)
    chosen = select((token_kl(draft, target) - token_kl(reference, target)).detach(), fraction)
    wanted = (draft.softmax(-1) - target.softmax(-1)) / chosen.sum() * chosen[:, None]
    torch.testing.assert_close(grad, wanted.detach())
    assert others == [None, None]


@given(seeds, fractions)
def test_masked_tokens_count_for_nothing(seed: int, fraction: float) -> None:
    draft, target, reference = case(seed)
    mask = torch.tensor([True, False, True, True, False, True, True, True, False])
    small = selective_kl(draft[mask], target[mask], reference[mask], fraction)
    (wanted,) = torch.autograd.grad(small, draft)
    with torch.no_grad():
        for logits in (draft, target, reference):
            logits[~mask] = torch.nan
    loss = selective_kl(draft, target, reference, fraction, mask=mask)
    torch.testing.assert_close(loss, small)
    torch.testing.assert_close(torch.autograd.grad(loss, draft)[0], wanted)


def test_nothing_to_count_is_zero() -> None:
    draft, target, reference = case(0)
    loss = selective_kl(draft, target, reference, mask=torch.zeros(9, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, draft)
    assert loss == 0
    assert (grad == 0).all()
    assert torch.isnan(gap_threshold(torch.empty(0), 0.4))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_broken_network_is_not_passed_over(broken: int) -> None:
    logits = case(1)
    with torch.no_grad():
        logits[broken][4] = torch.nan
    assert torch.isnan(selective_kl(*logits, 0.3))


def test_both_ways_to_normalise() -> None:
    draft, target, reference = case(2)
    gap = token_kl(draft, target) - token_kl(reference, target)
    chosen = select(gap, 0.4)
    assert selection_weights(gap, 0.4).sum().item() == pytest.approx(9)
    assert torch.equal(selection_weights(gap, 0.4, normalise="all"), chosen.double())
    total = selective_kl(draft, target, reference, normalise="all", reduction="sum")
    torch.testing.assert_close(total, token_kl(draft, target)[chosen].sum())
    mean = selective_kl(draft, target, reference)
    torch.testing.assert_close(mean * chosen.sum(), total)
    torch.testing.assert_close(selective_kl(draft, target, reference, normalise="all") * 9, total)


def test_wrong_arguments_are_named() -> None:
    draft, target, reference = case(0)
    for fraction in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="fraction"):
            selective_kl(draft, target, reference, fraction)
    with pytest.raises(ConfigError, match="normalise 'each'"):
        selective_kl(draft, target, reference, normalise="each")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\[9, 5\]"):
        selective_kl(draft, target, reference[:, :5])
