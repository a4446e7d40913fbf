"""What must be true of importance scores, nested masks, the router's choice and the budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.contracts import Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import (
    budget_probabilities,
    embedding_importance,
    expected_cost,
    ffn_importance,
    gumbel_softmax,
    gumbel_temperature,
    head_importance,
    importance_ranks,
    layer_importance,
    mamba_importance,
    mamba_mask,
    mixed_mask,
    prefix_masks,
    router_logit_scale,
    router_loss,
)

seeds = st.integers(0, 2**31)
COUNTS = (2, 5, 8)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_widths_are_scored_by_absolute_activity() -> None:
    x, weight = draw(0, 2, 5, 6), draw(1, 4, 6)
    assert torch.equal(embedding_importance(x), x.abs().sum((0, 1)))
    torch.testing.assert_close(ffn_importance(x, weight), (x @ weight.T).abs().sum((0, 1)))
    queries = draw(2, 2, 5, 12)
    expected = torch.stack([queries[..., 4 * h : 4 * h + 4].abs().sum() for h in range(3)])
    torch.testing.assert_close(head_importance(queries, 3), expected)
    with pytest.raises(ShapeError, match="12 features but must be a multiple of heads = 5"):
        head_importance(queries, 5)


@given(seeds)
def test_batches_add_up(seed: int) -> None:
    x = draw(seed, 4, 3, 6)
    torch.testing.assert_close(
        embedding_importance(x[:1]) + embedding_importance(x[1:]), embedding_importance(x)
    )


@given(seeds, st.floats(0.01, 100))
def test_a_layer_counts_nothing_only_if_it_does_nothing_whatever_the_scale(seed: int, scale: float) -> None:
    full = draw(seed, 2, 3, 7)
    ablated = torch.stack([full, full + 0.1, 0 * full])
    scores = layer_importance(full, ablated)
    assert scores[0] == 0
    assert scores[1] > 0
    assert scores[2] == pytest.approx(1)
    torch.testing.assert_close(layer_importance(scale * full, scale * ablated), scores)
    with pytest.raises(ShapeError, match="ablated is"):
        layer_importance(full, ablated[:, :1])


@given(seeds, st.sampled_from([1, 2, 3, 4]))
def test_ranks_order_by_falling_score_within_each_group(seed: int, groups: int) -> None:
    scores = draw(seed, 12)
    ranks = importance_ranks(scores, groups)
    for own, rank in zip(scores.chunk(groups), ranks.chunk(groups), strict=True):
        assert own[rank.argsort()].tolist() == sorted(own.tolist(), reverse=True)


def test_equal_scores_keep_their_order() -> None:
    assert importance_ranks(torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist() == [2, 0, 3, 1]
    with pytest.raises(ConfigError, match="groups is 3 but must divide"):
        importance_ranks(torch.ones(4), 3)


@given(seeds)
def test_masks_are_nested_and_hold_what_their_options_say(seed: int) -> None:
    masks = prefix_masks(importance_ranks(draw(seed, 8)), COUNTS)
    assert masks.sum(1).tolist() == list(COUNTS)
    assert (masks[:-1] <= masks[1:]).all()
    assert prefix_masks(torch.arange(1), [1]).tolist() == [[True]]


@pytest.mark.parametrize("count", [0, 9])
def test_a_count_that_is_not_there(count: int) -> None:
    with pytest.raises(ConfigError, match=f"count is {count} but must be from 1 to 8"):
        prefix_masks(torch.arange(8), [count])


@given(seeds, st.sampled_from([(2, 1), (4, 2), (6, 4)]))
def test_a_mamba_mask_keeps_as_many_heads_in_every_group(seed: int, keep: tuple[int, int]) -> None:
    found = mamba_importance(draw(seed, 2, 4, 8), draw(seed + 1, 24, 8), heads=6, top_channels=2)
    heads, channels = importance_ranks(found.heads, 2), importance_ranks(found.channels)
    mask = mamba_mask(heads, channels, 2, *keep)
    assert mask.sum().item() == keep[0] * keep[1]
    assert [int(part.any(1).sum()) for part in mask.chunk(2)] == [keep[0] // 2] * 2
    assert (mask.sum(1)[mask.any(1)] == keep[1]).all()
    assert (mask[:, channels == 0].any()).item()


def test_mamba_heads_that_fit_no_group() -> None:
    ranks, channels = torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(4)
    with pytest.raises(ConfigError, match="keep_heads is 3 but must be a multiple of groups = 2"):
        mamba_mask(ranks, channels, 2, 3, 2)
    with pytest.raises(ConfigError, match="groups is 4 but must divide"):
        mamba_mask(ranks, channels, 4, 4, 2)
    with pytest.raises(ConfigError, match="keep_channels is 5"):
        mamba_mask(ranks, channels, 2, 4, 5)
    with pytest.raises(ConfigError, match="top_channels is 0"):
        mamba_importance(draw(0, 2, 8), draw(1, 24, 8), 6, 0)


@given(seeds)
def test_the_gumbel_softmax_sums_to_1_and_hardens(seed: int) -> None:
    z, g = draw(seed, 5, 3), draw(seed + 1, 5, 3)
    torch.testing.assert_close(gumbel_softmax(z, g, 1.0).sum(-1), torch.ones(5, dtype=torch.float64))
    hard = gumbel_softmax(z, g, 1e-6)
    assert torch.equal(hard.round(), torch.nn.functional.one_hot((z + g).argmax(-1), 3).double())


def test_soft_masks_teach_all_logits_and_hard_ones_the_chosen_logit_alone() -> None:
    z, masks = draw(0, 3).requires_grad_(), prefix_masks(torch.arange(8), COUNTS)
    pi = gumbel_softmax(z, torch.zeros(3), 1.0)
    weight = draw(1, 8)
    (soft,) = torch.autograd.grad((mixed_mask(masks, z, pi, "soft") * weight).sum(), z, retain_graph=True)
    assert (soft != 0).all()
    best = int(pi.argmax())
    (hard,) = torch.autograd.grad((mixed_mask(masks, z, pi, "hard") * weight).sum(), z)
    expected = torch.zeros(3, dtype=torch.float64)
    expected[best] = weight[masks[best]].sum()
    torch.testing.assert_close(hard, expected)


def test_masks_mix_for_each_text_of_a_batch() -> None:
    z, masks = draw(0, 4, 3), prefix_masks(torch.arange(8), COUNTS)
    pi = gumbel_softmax(z, torch.zeros(4, 3), 1.0)
    for mode in ("soft", "hard"):
        rows = torch.stack([mixed_mask(masks, z[i], pi[i], mode) for i in range(4)])  # type: ignore[arg-type]
        torch.testing.assert_close(mixed_mask(masks, z, pi, mode), rows)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown mode 'sof'"):
        mixed_mask(masks, z, pi, "sof")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [4.0, 6.5])
def test_the_router_pays_nothing_at_its_target_and_is_pushed_towards_it(target: float) -> None:
    costs = torch.tensor(COUNTS, dtype=torch.float64)
    certain = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert router_loss(expected_cost(certain, costs), 5.0) == 0
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    cost = expected_cost(gumbel_softmax(z, torch.zeros(3), 1.0), costs)
    (grad,) = torch.autograd.grad(router_loss(cost, target), z)
    with torch.no_grad():
        moved = expected_cost(gumbel_softmax(z - 0.01 * grad, torch.zeros(3), 1.0), costs)
    assert abs(moved - target) < abs(cost - target)


def test_budgets_are_drawn_by_their_weights() -> None:
    assert budget_probabilities([1, 1, 1, 1]).tolist() == [0.25] * 4
    assert budget_probabilities([2, 3, 5]).tolist() == pytest.approx([0.2, 0.3, 0.5])
    drawn = budget_probabilities([2, 3, 5]).multinomial(
        20_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    assert (drawn.bincount() / 20_000).tolist() == pytest.approx([0.2, 0.3, 0.5], abs=0.02)
    for weights in ([], [0.0, 0.0], [1.0, -1.0], [float("nan")]):
        with pytest.raises(ConfigError, match="must be finite numbers >= 0"):
            budget_probabilities(weights)


def test_schedules_start_and_end_where_the_paper_says() -> None:
    ends = [Progress(step=0, steps=100), Progress(step=99, steps=100)]
    assert [gumbel_temperature(at) for at in ends] == pytest.approx([1.0, 0.05])
    assert [router_logit_scale(at) for at in ends] == pytest.approx([1.0, 10.0])
    falling = [gumbel_temperature(Progress(step=s, steps=100)) for s in range(100)]
    assert falling == sorted(falling, reverse=True)
    assert gumbel_temperature(Progress(step=0, steps=1)) == 1.0
