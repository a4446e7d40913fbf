"""What must be true of turning items into one number."""

from __future__ import annotations

import torch

from limbeck.losses.hints import hint_mse
from limbeck.losses.reduction import reduce


def test_no_items_at_all_give_zero_with_a_gradient() -> None:
    items = torch.empty(0, requires_grad=True)
    total = reduce(items)
    total.backward()
    assert float(total) == 0 and items.grad is not None
    assert float(hint_mse(torch.empty(0, 3), torch.empty(0, 3))) == 0


def test_what_does_not_count_may_be_no_number() -> None:
    items = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    mask, weights = torch.tensor([True, False, True]), torch.tensor([2.0, 1.0, 0.0])
    total = reduce(items, mask=mask, weights=weights)
    total.backward()
    assert float(total) == 1 and items.grad is not None
    assert items.grad.tolist() == [1, 0, 0]
