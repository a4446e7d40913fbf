"""What must be true of the contrastive loss and its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses import crd, likelihoods, noise_contrast, remembered


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen_rows(batch: int, count: int, rows: int) -> Tensor:
    return torch.randint(rows, (batch, count), generator=torch.Generator().manual_seed(7))


def test_both_ways_to_ask_the_memory_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, chosen = F.normalize(draw(0, 20, 6), dim=1), chosen_rows(4, 9, 20)
    found = []
    for whole in (True, False):
        monkeypatch.setattr(crd, "_all_rows", lambda *_, whole=whole: whole)
        leaf = F.normalize(draw(1, 4, 6), dim=1).requires_grad_()
        value = likelihoods(leaf, memory, chosen, 0.1)
        found.append((value.detach(), *torch.autograd.grad(value.log().square().sum(), leaf)))
    torch.testing.assert_close(found[0], found[1])
    picked = (memory[chosen] * F.normalize(draw(1, 4, 6), dim=1)[:, None]).sum(2)
    torch.testing.assert_close(found[0][0], (picked / 0.1).exp())


@pytest.mark.parametrize("whole", [True, False])
def test_the_memory_may_be_written_to_before_the_backward_pass(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crd, "_all_rows", lambda *_: whole)
    memory, leaf = draw(0, 20, 6), draw(1, 4, 6).requires_grad_()
    value = likelihoods(leaf, memory, chosen_rows(4, 9, 20)).log().sum()
    expected = memory[chosen_rows(4, 9, 20)].sum(1) / 0.07
    memory.zero_()
    value.backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_the_smaller_way_is_taken() -> None:
    embedding, memory = torch.empty(64, 128, device="meta"), torch.empty(50_000, 128, device="meta")
    many = torch.empty(64, 16_385, dtype=torch.int64, device="meta")
    assert crd._all_rows(embedding, memory, many)
    assert not crd._all_rows(embedding, memory, many[:, :100])


@pytest.mark.parametrize(("count", "rows"), [(3, 40), (30, 40)])
def test_rows_that_are_gathered_in_parts_are_the_same(count: int, rows: int) -> None:
    memory, chosen = draw(0, rows, 6), chosen_rows(11, count, rows)  # 33 chosen rows, and 330
    leaf = draw(1, 11, 6).requires_grad_()
    scores = crd.Scores.apply(leaf, memory, chosen)
    torch.testing.assert_close(scores, (memory[chosen] * leaf[:, None]).sum(2))
    assert torch.autograd.gradcheck(lambda x: crd.Scores.apply(x, memory, chosen), leaf)
    assert torch.autograd.gradgradcheck(lambda x: crd.Scores.apply(x, memory, chosen).square(), leaf)


def test_the_loss_falls_with_the_positive_and_rises_with_the_negatives() -> None:
    fits = draw(0, 4, 9).exp().requires_grad_()
    noise_contrast(fits, 20).backward()
    assert (fits.grad[:, 0] < 0).all()
    assert (fits.grad[:, 1:] > 0).all()


def test_the_loss_is_that_of_a_classifier_of_data_against_noise() -> None:
    fits, samples = draw(0, 4, 9).exp(), 20
    data = fits / (fits + 8 / samples)
    truth = torch.zeros_like(data)
    truth[:, 0] = 1
    expected = F.binary_cross_entropy(data, truth, reduction="sum") / 4
    torch.testing.assert_close(noise_contrast(fits, samples), expected, rtol=1e-5, atol=0)


def test_items_are_samples_and_weights_count() -> None:
    fits = draw(0, 4, 9).exp()
    items = noise_contrast(fits, 20, reduction="none")
    assert items.shape == (4,)
    weights = torch.tensor([4.0, 0, 0, 0])
    torch.testing.assert_close(noise_contrast(fits, 20, weights=weights), items[0])


def test_what_is_remembered_has_length_one() -> None:
    rows, embedding = draw(0, 4, 6), F.normalize(draw(1, 4, 6), dim=1)
    found = remembered(rows, embedding.requires_grad_(), 0.5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert not found.requires_grad
    torch.testing.assert_close(remembered(rows, embedding, 0.0), embedding.detach())
