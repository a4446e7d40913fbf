"""What must be true of the exact accept/reject step and of what acceptance is worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, DataError, ShapeError
from limbeck.metrics.speculative import (
    acceptance_probability,
    acceptance_rate,
    block_efficiency,
    greedy_verify,
    residual,
    speculative_verify,
    speedup,
)

seeds = st.integers(0, 2**31)
NEARLY_ONE = 1 - 2.0**-53


def laws(seed: int, *shape: int, sharp: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


@given(seeds, st.integers(2, 9), st.floats(0.1, 20))
def test_one_step_has_the_law_of_the_target(seed: int, vocabulary: int, sharp: float) -> None:
    q, p = laws(seed, vocabulary, sharp=sharp), laws(seed + 1, vocabulary, sharp=sharp)
    accepted = torch.minimum(p, q)  # q · min(1, p / q)
    law = accepted + (1 - accepted.sum()) * residual(p, q)
    torch.testing.assert_close(law, p, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_a_block_has_the_law_of_the_target(seed: int) -> None:
    """All ways in which two proposals can be judged, with their chances."""
    size = 3
    first_q, first_p = laws(seed, size), laws(seed + 1, size)
    second_q, second_p = laws(seed + 2, size, size), laws(seed + 3, size, size)
    third_p = laws(seed + 4, size, size, size)
    law = torch.zeros(size, size, dtype=torch.float64)
    for a, b in itertools.product(range(size), repeat=2):
        proposed = first_q[a] * second_q[a, b]
        draft = torch.stack([first_q, second_q[a]])
        target = torch.stack([first_p, second_p[a], third_p[a, b]])
        one, two = ((target[i, x] / draft[i, x]).clamp(max=1) for i, x in enumerate((a, b)))
        for u, chance in (((0, 0), one * two), ((0, 1), one * (1 - two)), ((1, 0), 1 - one)):
            if chance <= 1e-15:
                continue
            draws = torch.tensor(u, dtype=torch.float64) * NEARLY_ONE
            found = speculative_verify(draft, target, torch.tensor([a, b]), draws, torch.tensor(0.5))
            if found.n_accepted == 0:  # the second token comes from the target's next pass
                for x in range(size):
                    law[x] += proposed * chance * found.next_distribution[x] * second_p[x]
            elif found.n_accepted == 1:
                law[a] += proposed * chance * found.next_distribution
            else:
                torch.testing.assert_close(found.next_distribution, third_p[a, b])
                law[a, b] += proposed * chance
    torch.testing.assert_close(law, first_p[:, None] * second_p, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_the_acceptance_is_one_minus_total_variation(seed: int) -> None:
    p, q = laws(seed, 4, 6), laws(seed + 1, 4, 6)
    torch.testing.assert_close(acceptance_probability(p, q), 1 - (p - q).abs().sum(-1) / 2)
    torch.testing.assert_close(acceptance_probability(p, p), full(1, 4))


@given(seeds, st.floats(0, NEARLY_ONE), st.sampled_from([torch.float32, torch.float64]))
def test_equal_laws_accept_everything(seed: int, u: float, dtype: torch.dtype) -> None:
    p = laws(seed, 5, 6).to(dtype)
    tokens = p[:4].argmin(-1)
    draws = full(min(u, 1 - 2.0**-24), 4).to(dtype)
    found = speculative_verify(p[:4], p, tokens, draws, draws[0])
    assert found.n_accepted == 4
    assert torch.isfinite(found.next_distribution).all()
    torch.testing.assert_close(residual(p, p), p)


@given(seeds, st.floats(0, NEARLY_ONE))
def test_no_token_without_probability_is_emitted(seed: int, u: float) -> None:
    allowed = torch.tensor([False, True, False, True, False])
    p, q = laws(seed, 3, 5) * allowed, laws(seed + 1, 2, 5) * allowed
    p, q = 0.999999 * p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tokens = torch.tensor([1, 3])
    for judge in (0.0, NEARLY_ONE):
        found = speculative_verify(q, p, tokens, full(judge, 2), torch.tensor(u, dtype=torch.float64))
        assert found.next_distribution[found.next_token] > 0
        assert allowed[found.next_token]


def test_tokens_that_the_draft_could_not_propose_are_refused() -> None:
    q = torch.tensor([[0.5, 0.5, 0.0]])
    with pytest.raises(DataError, match="probability 0 under the draft"):
        speculative_verify(q, q.expand(2, 3), torch.tensor([2]), torch.zeros(1), torch.tensor(0.0))


@given(seeds)
def test_blocks_side_by_side_are_judged_apart(seed: int) -> None:
    q, p = laws(seed, 3, 4, 6), laws(seed + 1, 3, 5, 6)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, (3, 4), generator=generator)
    u, final = (torch.rand(3, *s, generator=generator, dtype=torch.float64) for s in ((4,), ()))
    together = speculative_verify(q, p, tokens, u, final)
    for i in range(3):
        alone = speculative_verify(q[i], p[i], tokens[i], u[i], final[i])
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[i], other)
    accepted, token = greedy_verify(tokens, p)
    for i in range(3):
        one, other = greedy_verify(tokens[i], p[i])
        assert (accepted[i], token[i]) == (one, other)


@given(st.lists(st.integers(0, 2), min_size=40, max_size=40), seeds)
def test_greedy_output_is_the_targets_own(proposals: list[int], seed: int) -> None:
    """A target that looks at the last token alone, a draft that proposes anything at all."""
    following = laws(seed, 3, 3).log()
    text = [0]
    for start in range(0, 40, 4):
        block = proposals[start : start + 4]
        logits = following[torch.tensor([text[-1], *block])]
        accepted, token = greedy_verify(torch.tensor(block), logits)
        text += [*block[: int(accepted)], int(token)]
    own = [0]
    while len(own) < len(text):
        own.append(int(following[own[-1]].argmax()))
    assert text == own


def test_unjudged_proposals_and_bonus_tokens_count_for_nothing() -> None:
    found = acceptance_rate(torch.tensor([4, 2, 0, 4, 1]), 4)
    assert found == (11 / 14, 11, 3)
    assert acceptance_rate(torch.tensor([4, 4]), 4).alpha == 1
    assert acceptance_rate(torch.tensor([0, 0]), 4).alpha == 0
    cut = acceptance_rate(torch.tensor([4, 2, 1]), torch.tensor([4, 2, 3]))  # the second was cut short
    assert (cut.accepted, cut.rejected) == (7, 1)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 12), st.floats(0, 2))
def test_block_efficiency_rises_with_acceptance_and_length(a: float, b: float, gamma: int, c: float) -> None:
    low, high = sorted((a, b))
    tau = block_efficiency(high, gamma)
    assert 1 <= block_efficiency(low, gamma) <= tau <= block_efficiency(high, gamma + 1) <= gamma + 2
    if high < 0.999:
        assert tau == pytest.approx((1 - high ** (gamma + 1)) / (1 - high))
    assert block_efficiency(0, gamma) == 1
    assert block_efficiency(1, gamma) == gamma + 1
    assert speedup(high, gamma, 0) == tau
    assert speedup(0, gamma, c) == pytest.approx(1 / (gamma * c + 1))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        block_efficiency(1.5, 4)
    with pytest.raises(ConfigError, match="cost is -1"):
        speedup(0.5, 4, -1)
    with pytest.raises(DataError, match="accepted 5"):
        acceptance_rate(torch.tensor([5]), 4)
    with pytest.raises(DataError, match="0 judged"):
        acceptance_rate(torch.empty(0).long(), 4)
    with pytest.raises(ShapeError, match="one behind the block"):
        greedy_verify(torch.zeros(4).long(), torch.zeros(4, 7))
    with pytest.raises(ShapeError, match="same vocabulary"):
        speculative_verify(
            torch.ones(2, 3), torch.ones(3, 4), torch.zeros(2).long(), torch.zeros(2), torch.zeros(())
        )
