"""What must be true of token divergences, of top tokens, of sorted tokens and of what the student wrote."""

from __future__ import annotations

import math
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck import losses
from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import (
    DIVERGENCES,
    JSD,
    AdaptiveKL,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TopTokens,
    TotalVariation,
    token_divergence,
    top_divergence,
)

seeds = st.integers(0, 2**31)
betas = st.floats(0.01, 0.99)
every = pytest.mark.parametrize(
    "divergence", [kind() for kind in DIVERGENCES.values()], ids=list(DIVERGENCES)
)


def draw(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    shape = shape or (4, 7)
    return draw(seed, *shape).requires_grad_(), draw(seed + 1, *shape)


def top(teacher: Tensor, k: int, *, tail: bool = True) -> TopTokens:
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    return TopTokens(ids, log_probs, tail)


def grad(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


@every
@given(seeds)
def test_zero_with_zero_gradient_where_both_agree(divergence: Divergence, seed: int) -> None:
    teacher = draw(seed, 4, 7)
    student = (teacher + draw(seed + 1, 4, 1)).requires_grad_()
    loss = token_divergence(divergence, student, teacher)
    assert abs(loss.item()) < 1e-10
    # Total variation has a kink there: rounding alone chooses the subgradient.
    if not isinstance(divergence, TotalVariation):
        assert grad(loss, student).abs().max() < 1e-10


def test_total_variation_has_no_gradient_at_ties() -> None:
    student = draw(0, 4, 7).requires_grad_()
    assert not grad(token_divergence(TotalVariation(), student, student.detach()), student).any()


@every
@given(seeds)
def test_never_negative_and_constants_per_row_change_nothing(divergence: Divergence, seed: int) -> None:
    student, teacher = pair(seed)
    loss = token_divergence(divergence, student, teacher, 2.0)
    moved = token_divergence(divergence, student + draw(seed + 2, 4, 1), teacher + draw(seed + 3, 4, 1), 2.0)
    assert loss >= -1e-12
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(grad(loss, student).sum(-1), torch.zeros(4).double(), atol=1e-12, rtol=0)


@every
@given(seeds)
def test_the_slope_is_the_gradient(divergence: Divergence, seed: int) -> None:
    student, teacher = pair(seed)
    found = losses.pair_of(student, teacher)
    wanted = grad(divergence.items(found).sum(), student)
    with torch.no_grad():
        items, slope = divergence.both(found)
        torch.testing.assert_close(slope, divergence.slope(found))
        torch.testing.assert_close(items, divergence.items(found))
        slope = losses.centred(slope, found.q)
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(0.3, 5))
def test_cross_entropy_is_forward_kl_with_the_entropy_in_it(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    p = (teacher / temperature).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    kl = token_divergence(ForwardKL(), student, teacher, temperature)
    ce = token_divergence(ForwardKL(cross_entropy=True), student, teacher, temperature)
    torch.testing.assert_close(ce - kl, entropy)
    closed = ((student / temperature).softmax(-1) - p) / (4 * temperature)
    for loss in (kl, ce):
        torch.testing.assert_close(grad(loss, student), closed.detach(), rtol=1e-9, atol=1e-12)
    own = token_divergence(ForwardKL(cross_entropy=True), teacher, teacher, temperature)
    torch.testing.assert_close(own, entropy)


@given(seeds)
def test_forward_kl_is_the_kl_of_the_house(seed: int) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(
        token_divergence(ForwardKL(), student, teacher, 2.0), losses.kl_divergence(student, teacher, 2.0) / 4
    )


@given(seeds, betas)
def test_bounds_and_symmetries(seed: int, beta: float) -> None:
    p, q = draw(seed, 4, 7), draw(seed + 1, 4, 7)
    variation = token_divergence(TotalVariation(), q, p, reduction="none")
    assert (variation >= 0).all()
    assert (variation <= 1).all()
    torch.testing.assert_close(variation, token_divergence(TotalVariation(), p, q, reduction="none"))
    kl = token_divergence(ForwardKL(), q, p, reduction="none")
    assert (variation**2 <= kl / 2 + 1e-12).all()  # Pinsker
    jsd = token_divergence(JSD(beta), q, p, reduction="none")
    torch.testing.assert_close(jsd, token_divergence(JSD(1 - beta), p, q, reduction="none"))
    assert (jsd <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12).all()
    both = token_divergence(SymmetricKL(), q, p, reduction="none")
    torch.testing.assert_close(both, token_divergence(SymmetricKL(), p, q, reduction="none"))


@given(seeds)
def test_limits(seed: int) -> None:
    student, teacher = draw(seed, 4, 7) / 3, draw(seed + 1, 4, 7) / 3
    forward, reverse = (token_divergence(d, student, teacher) for d in (ForwardKL(), ReverseKL()))
    near = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(token_divergence(JSD(1e-6), student, teacher) / 1e-6, forward, **near)
    torch.testing.assert_close(token_divergence(JSD(1 - 1e-6), student, teacher) / 1e-6, reverse, **near)
    torch.testing.assert_close(
        token_divergence(JSD(1e-6, normalised=True), student, teacher), forward, **near
    )
    assert token_divergence(JSD(0.0), student, teacher) == forward  # by convention, not by limit
    assert token_divergence(JSD(1.0), student, teacher) == reverse
    for alpha in (0.0, 1e-7):
        torch.testing.assert_close(token_divergence(SkewForwardKL(alpha), student, teacher), forward, **near)
        torch.testing.assert_close(token_divergence(SkewReverseKL(alpha), student, teacher), reverse, **near)


@given(seeds)
def test_the_parts_of_adaptive_kl(seed: int) -> None:
    student, teacher = pair(seed)
    found = losses.pair_of(student, teacher)
    forward, reverse = ForwardKL().items(found), ReverseKL().items(found)
    for share, wanted in ((1.0, forward), (0.0, reverse)):
        with patch.object(AdaptiveKL, "head_weight", lambda _, pair, w=share: pair.p.new_full((4,), w)):
            torch.testing.assert_close(AdaptiveKL().items(found), wanted)
    one_token = AdaptiveKL(0.0).head_weight(found)  # the likeliest alone
    best = found.p.argmax(-1, keepdim=True)
    gap = (found.p - found.q).abs()
    torch.testing.assert_close(one_token, (gap.gather(-1, best)[:, 0] / gap.sum(-1)).detach())
    torch.testing.assert_close(AdaptiveKL(0.0).items(found), one_token * forward + (1 - one_token) * reverse)
    same = losses.pair_of(teacher, teacher)
    assert (AdaptiveKL().head_weight(same) == 0.5).all()


@every
def test_what_is_masked_out_may_be_anything(divergence: Divergence) -> None:
    student, teacher = draw(0, 2, 3, 7), draw(1, 2, 3, 7)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = student.clone().requires_grad_()
    loss = token_divergence(divergence, clean, teacher, mask=mask)
    wanted = grad(loss, clean)
    for bad in (torch.nan, torch.inf, -torch.inf, 17.0):
        own, other = student.clone(), teacher.clone()
        own[~mask], other[~mask] = bad, bad
        own.requires_grad_()
        again = token_divergence(divergence, own, other, mask=mask)
        assert again == loss
        assert torch.equal(grad(again, own), wanted)


@every
def test_no_token_that_counts_gives_zero_with_a_gradient(divergence: Divergence) -> None:
    student, teacher = pair(0)
    loss = token_divergence(divergence, student, teacher, mask=torch.zeros(4, dtype=torch.bool))
    assert loss == 0
    assert not grad(loss, student).any()
    single = torch.zeros(3, 1, requires_grad=True)
    assert token_divergence(divergence, single, torch.ones(3, 1)) == 0


@every
def test_infinite_logits_are_left_out(divergence: Divergence) -> None:
    student, teacher = draw(0, 3, 7), draw(1, 3, 7)
    own, other = F.pad(student, (0, 2), value=-torch.inf), F.pad(teacher, (0, 2), value=-torch.inf)
    own[0, 7] = torch.inf
    own.requires_grad_()
    loss = token_divergence(divergence, own, other)
    torch.testing.assert_close(loss, token_divergence(divergence, student, teacher))
    assert torch.isfinite(grad(loss, own)).all()
    other[0, 3] = -torch.inf  # banned by the teacher alone: that term is dropped
    assert torch.isfinite(grad(token_divergence(divergence, own, other), own)).all()


@every
def test_micro_batches_over_the_number_of_all_tokens_are_the_batch(divergence: Divergence) -> None:
    student, teacher = pair(0, 6, 5, 7)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) > 0.4
    whole = token_divergence(divergence, student, teacher, mask=mask)
    parts = [
        token_divergence(divergence, student[s], teacher[s], mask=mask[s], reduction="sum") / mask.sum()
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(grad(sum(parts), student), grad(whole, student))


def test_the_mean_over_texts() -> None:
    student, teacher = pair(0, 3, 5, 7)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    items = token_divergence(ForwardKL(), student, teacher, reduction="none")
    weights = losses.sequence_weights(mask.nonzero()[:, 0], 3)
    torch.testing.assert_close(weights.sum(), torch.tensor(5.0))
    mean = losses.reduce(items[mask], weights=weights)
    torch.testing.assert_close(mean, (items[0, :4].mean() + items[2, 0]) / 2)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = draw(0, 4, 7).to(dtype), draw(1, 4, 7).to(dtype)
    loss = token_divergence(divergence, student, teacher)
    assert loss.dtype == torch.float32
    assert loss == token_divergence(divergence, student.float(), teacher.float())
    large = torch.tensor([[500.0, -500, 0], [-500, 500, 0]], dtype=dtype, requires_grad=True)
    huge = token_divergence(divergence, large, large.detach().flip(0))
    assert torch.isfinite(huge)
    assert torch.isfinite(grad(huge, large)).all()


@every
def test_the_teacher_gets_no_gradient(divergence: Divergence) -> None:
    student, teacher = draw(0, 4, 7).requires_grad_(), draw(1, 4, 7).requires_grad_()
    token_divergence(divergence, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@every
@given(seeds)
def test_all_tokens_and_the_tail_are_the_whole(divergence: Divergence, seed: int) -> None:
    student, teacher = pair(seed)
    for tail in (True, False):
        found = top_divergence(divergence, student, top(teacher, 7, tail=tail))
        whole = token_divergence(divergence, student, teacher)
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(grad(found, student), grad(whole, student), atol=1e-9, rtol=1e-9)


@given(seeds)
def test_fewer_tokens_never_tell_more(seed: int) -> None:
    student, teacher = draw(seed, 4, 7), draw(seed + 1, 4, 7)
    for divergence in (ForwardKL(), ReverseKL(), JSD(0.3), TotalVariation(), SkewForwardKL(0.2)):
        values = [top_divergence(divergence, student, top(teacher, k)) for k in range(1, 8)]
        values.append(token_divergence(divergence, student, teacher))
        assert all(few <= more + 1e-9 for few, more in pairwise(values))


def test_without_the_tail_one_token_says_nothing_and_other_tokens_are_free() -> None:
    student, teacher = pair(0)
    assert top_divergence(ForwardKL(), student, top(teacher, 1, tail=False)).abs() < 1e-12
    found = top(teacher, 3, tail=False)
    slope = grad(top_divergence(ForwardKL(), student, found), student)
    assert slope.scatter(-1, found.ids, 0).abs().max() < 1e-15
    pushed = grad(top_divergence(ForwardKL(), student, top(teacher, 3)), student)
    assert pushed.scatter(-1, found.ids, 0).abs().max() > 1e-3


def test_missing_top_tokens_count_for_the_tail() -> None:
    student, teacher = pair(0)
    three = top(teacher, 3)
    filler = torch.full((4, 1), -torch.inf).double()
    padded = TopTokens(
        torch.cat([three.ids, three.ids[:, :1]], -1), torch.cat([three.log_probs, filler], -1), three.tail
    )
    few, more = (top_divergence(ForwardKL(), student, t) for t in (three, padded))
    torch.testing.assert_close(more, few)
    torch.testing.assert_close(grad(more, student), grad(few, student))


def test_a_student_that_is_sure_is_still_called_back_to_the_tail() -> None:
    student = torch.tensor([[60.0, 0, 0, 0]], requires_grad=True)
    teacher = TopTokens(torch.tensor([[0]]), torch.tensor([[0.5]]).log())
    slope = grad(top_divergence(ForwardKL(), student, teacher), student)
    torch.testing.assert_close(slope, torch.tensor([[0.5, -1 / 6, -1 / 6, -1 / 6]]))


def test_masked_top_tokens_may_be_anything() -> None:
    student, teacher = pair(0)
    mask, good = torch.tensor([True, False, True, False]), top(teacher, 3)
    loss = top_divergence(ForwardKL(), student, good, mask=mask)
    ids, log_probs = good.ids.clone(), good.log_probs.clone()
    ids[1], log_probs[1] = 99, torch.nan
    again = top_divergence(ForwardKL(), student, TopTokens(ids, log_probs), mask=mask)
    assert again == loss
    torch.testing.assert_close(grad(again, student), grad(loss, student))


@given(seeds)
def test_uld_sees_no_identity(seed: int) -> None:
    student, teacher = draw(seed, 2, 4, 6), draw(seed + 1, 2, 5, 9)
    masks = (torch.ones(2, 4).bool(), torch.ones(2, 5).bool())
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    loss = losses.uld(student, teacher, *masks)
    assert 0 <= loss <= 2
    torch.testing.assert_close(losses.uld(student.flip(-1), teacher[..., order], *masks), loss)
    same = F.pad(student.flip(-1), (0, 3), value=-torch.inf)
    assert losses.uld(student, same, masks[0], masks[0]) < 1e-12


def test_uld_pairs_counted_positions_in_their_order() -> None:
    student, teacher = pair(0, 2, 5, 6)[0], draw(3, 2, 6, 9)
    own = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    other = torch.tensor([[0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    loss = losses.uld(student, teacher, own, other)
    wanted = losses.sorted_l1(student[0, 1:3], teacher[0, [3, 5]]).mean()  # the second text has no answer
    torch.testing.assert_close(loss, wanted)
    slope = grad(loss, student)
    assert not slope[1].any()
    nothing = losses.uld(student, teacher, torch.zeros_like(own), other)
    assert nothing == 0
    assert not grad(nothing, student).any()


def test_what_counts_of_a_text_the_student_wrote() -> None:
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    written = torch.tensor([[2, 5, 6, 7, 2, 8, 2], [3, 2, 4, 9, 9, 9, 9], [3, 3, 4, 8, 5, 5, 5]])
    attention, labels = losses.on_policy_labels(prompt, written, [2, 8])
    assert attention.tolist() == [[0, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    ignored = [-100] * 3
    assert labels.tolist() == [
        [*ignored, 7, 2, -100, -100],  # the first end is learnt, though padding may have the same id
        [*ignored, 9, 9, 9, 9],
        [*ignored, 8, -100, -100, -100],
    ]
    assert losses.on_policy_labels(prompt, written, None)[0][:, 3:].all()


@given(seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_advantages_add_up_what_is_ahead(seed: int, gamma: float) -> None:
    student, teacher = -draw(seed, 2, 4).abs(), -draw(seed + 1, 2, 4).abs()
    reward = losses.minillm_reward(student, teacher)
    plain = losses.minillm_advantage(reward, gamma=gamma, length_normalised=False)
    normal = losses.minillm_advantage(reward, gamma=gamma)
    for t in range(4):
        ahead = [gamma ** (i - t) for i in range(t, 4)]
        total = sum(g * reward[:, t + i] for i, g in enumerate(ahead))
        torch.testing.assert_close(plain[:, t], total)
        torch.testing.assert_close(normal[:, t], total / sum(ahead))
    broken = reward.clone()
    broken[:, 2:] = torch.nan
    mask = torch.tensor([[1, 1, 0, 0]] * 2)
    assert torch.isfinite(losses.minillm_advantage(broken, mask, gamma=gamma)).all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"beta is 1.5 .*\[0, 1\]"):
        JSD(1.5)
    with pytest.raises(ConfigError, match=r"alpha is 1.0 .*\[0, 1\)"):
        SkewForwardKL(1.0)
    student, teacher = pair(0)
    with pytest.raises(ShapeError, match=r"\[4, 7\].*\[4, 6\]"):
        token_divergence(ForwardKL(), student, teacher[:, :6])
    with pytest.raises(ShapeError, match="top tokens"):
        top_divergence(ForwardKL(), student[:3], top(teacher, 2))
    with pytest.raises(ShapeError, match="mask"):
        losses.uld(student[None], teacher[None], torch.ones(1, 3), torch.ones(1, 4))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 5)])
def test_a_mask_of_other_positions_is_refused(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(ShapeError, match=r"mask is \[.*\] but must lead the items' shape \[2, 3\]"):
        token_divergence(ForwardKL(), logits, logits, mask=torch.ones(shape, dtype=torch.bool))
