"""What must be true of the losses against labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import DataError, ShapeError
from limbeck.losses import cross_entropy, masked_cross_entropy

seeds = st.integers(0, 2**31)


def case(seed: int, classes: int = 10, low: int = 0, high: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(low, high, (6,), generator=generator)


@given(seeds)
def test_no_smoothing_is_cross_entropy(seed: int) -> None:
    logits, labels = case(seed)
    torch.testing.assert_close(cross_entropy(logits, labels, smoothing=0), F.cross_entropy(logits, labels))


def test_smoothing_has_its_minimum_at_a_finite_gap() -> None:
    smoothing, classes = 0.1, 5
    right = 1 - smoothing + smoothing / classes
    best = torch.log(torch.tensor(right / (smoothing / classes)))
    gap = best.clone().double().requires_grad_()
    logits = torch.cat([gap[None], torch.zeros(classes - 1, dtype=torch.float64)])[None]
    loss = cross_entropy(logits, torch.tensor([0]), smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss, gap)
    assert abs(grad.item()) < 1e-7
    wider = torch.cat([2 * gap[None], torch.zeros(classes - 1, dtype=torch.float64)])[None]
    assert cross_entropy(wider, torch.tensor([0]), smoothing=smoothing) > loss


def test_smoothing_gives_the_true_class_its_share_of_the_even_part() -> None:
    logits, labels = case(0)
    target = 0.01 + 0.9 * F.one_hot(labels, 10).double()
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, smoothing=0.1), expected)


def test_tokens_count_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    labels = torch.randint(5, (2, 3), generator=generator)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    expected = F.cross_entropy(logits[mask], labels[mask])
    torch.testing.assert_close(cross_entropy(logits, labels, mask=mask), expected)


@given(seeds, st.sampled_from([0.0, 0.1]))
def test_the_mean_in_one_step_is_the_mean_of_the_items(seed: int, smoothing: float) -> None:
    logits, labels = case(seed)
    short = cross_entropy(logits, labels, smoothing=smoothing)
    plain = cross_entropy(logits, labels, smoothing=smoothing, mask=torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(short, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (short, plain)))


@given(seeds)
def test_window_equals_minus_infinity_outside(seed: int) -> None:
    logits, labels = case(seed, low=4, high=7)
    masked = logits[:, :7].clone()
    masked[:, :4] = -torch.inf
    loss = masked_cross_entropy(logits, labels, 4, 7)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, F.cross_entropy(masked, labels))
    assert grad[:, :4].abs().max() == 0
    assert grad[:, 7:].abs().max() == 0


@pytest.mark.parametrize("label", [3, 7])
def test_label_outside_the_window_raises(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} .* 4..6"):
        masked_cross_entropy(torch.zeros(2, 10), torch.tensor([4, label]), 4, 7)


@pytest.mark.parametrize(("start", "stop"), [(4, 4), (-1, 3), (4, 11)])
def test_window_outside_the_columns_raises(start: int, stop: int) -> None:
    with pytest.raises(ShapeError, match="window"):
        masked_cross_entropy(torch.zeros(2, 10), torch.tensor([4, 4]), start, stop)


def test_large_logits_in_half_precision_stay_finite() -> None:
    logits = torch.tensor([[200.0, -200]], dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]), smoothing=0.1)
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32
