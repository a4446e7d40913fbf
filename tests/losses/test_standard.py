"""What must be true of standardised logits."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import decoupled_kl, kl_divergence, standardise

seeds = st.integers(0, 2**31)
scales = st.floats(0.2, 20)


def draw(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_rows_have_mean_0_and_deviation_1(seed: int) -> None:
    z = standardise(draw(seed, 4, 6))
    torch.testing.assert_close(z.mean(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.std(-1), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)


@given(seeds, scales, scales)
def test_scale_and_shift_of_either_side_change_nothing(seed: int, one: float, other: float) -> None:
    student, teacher, shift = draw(seed, 4, 6), draw(seed + 1, 4, 6), draw(seed + 2, 4, 1)
    plain = kl_divergence(standardise(student), standardise(teacher), 2)
    moved = kl_divergence(standardise(one * student + shift), standardise(other * teacher - shift), 2)
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-6)


def test_the_scale_of_the_teacher_moves_plain_kd_alone() -> None:
    student, teacher, labels = draw(0, 4, 6), draw(1, 4, 6), torch.arange(4)
    plain = [kl_divergence(student, scale * teacher, 2).item() for scale in (0.2, 1, 5)]
    assert max(plain) > 2 * min(plain)
    own = standardise(student)
    for loss in (kl_divergence, lambda s, t, tau: sum(decoupled_kl(s, t, labels, tau))):
        found = torch.stack([loss(own, standardise(scale * teacher), 2.0) for scale in (0.2, 1, 5)])
        torch.testing.assert_close(found, found[1].expand(3), rtol=1e-5, atol=0)


def test_a_constant_row_gives_zeros_with_gradient_zero() -> None:
    logits = torch.tensor([[2.0, 2, 2], [1, 2, 4]], requires_grad=True)
    z = standardise(logits)
    z.square().sum().backward()
    assert z[0].abs().max() == 0
    assert logits.grad[0].abs().max() == 0
    assert torch.isfinite(logits.grad).all()
    assert standardise(torch.full((2, 1), 3.0)).abs().max() == 0


def test_a_broken_teacher_is_seen_and_large_logits_stay_finite() -> None:
    assert torch.isnan(standardise(torch.tensor([[torch.nan, 1, 2]]))).all()
    assert not torch.isfinite(standardise(torch.tensor([[torch.inf, 1, 2]]))).any()
    half = standardise(torch.tensor([[200.0, -200, 0]], dtype=torch.float16))
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()
