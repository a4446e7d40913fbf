"""What must be true of the exposure of canaries."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.data import privacy
from limbeck.errors import ConfigError, DataError, NonFiniteError
from limbeck.metrics.exposure import SkewNormal, exposure, exposure_sampled, sequence_log_perplexity

seeds = st.integers(0, 2**31)


def others(count: int) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64)


def test_the_ends_and_the_middle() -> None:
    assert exposure(0, others(9999), 10_000) == (1, pytest.approx(math.log2(10_000)))
    assert exposure(20_000, others(9999), 10_000) == (10_000, pytest.approx(0))
    assert exposure(5000, others(9999), 10_000).bits == pytest.approx(1, abs=0.01)
    assert exposure(1, others(9999), 10_000).rank == 1  # an equal one does not come before


def test_a_model_that_knows_nothing_averages_1_44_bits() -> None:
    bits = [exposure(place + 0.5, others(999), 1000).bits for place in range(1000)]
    assert sum(bits) / 1000 == pytest.approx(1.44, abs=0.01)


@given(seeds, st.integers(-100, 100))
def test_a_common_prefix_changes_nothing(seed: int, constant: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(1000, (99,), generator=generator, dtype=torch.float64)
    canary = float(torch.randint(1000, (), generator=generator))
    assert exposure(canary, sample, 100) == exposure(canary + constant, sample + constant, 100)


@given(seeds)
def test_log_perplexity_is_the_sum_over_tokens_in_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 8, generator=generator)
    tokens = torch.randint(8, (3, 4), generator=generator)
    wanted = -logits.double().softmax(-1).gather(-1, tokens[..., None])[..., 0].log2()
    torch.testing.assert_close(sequence_log_perplexity(logits, tokens), wanted.sum(-1))
    slot = torch.tensor([False, True, True, False]).expand(3, 4)
    torch.testing.assert_close(sequence_log_perplexity(logits, tokens, slot), wanted[:, 1:3].sum(-1))
    even = sequence_log_perplexity(torch.zeros(4, 8), tokens[0])
    assert even.item() == pytest.approx(4 * 3)


@given(st.integers(1, 500), st.floats(-10, 600))
def test_a_sample_tells_no_more_than_its_size(count: int, canary: float) -> None:
    assert 0 <= exposure_sampled(canary, others(count)) <= math.log2(count + 1) + 1e-12


def test_the_fitted_law_agrees_with_the_rank() -> None:
    space = torch.as_tensor(stats.skewnorm.rvs(2.0, 40, 6, size=9999, random_state=0))
    law = SkewNormal.fit(space[:2000])
    assert law.p_value is not None
    assert law.p_value > 0.05
    for canary in (36.0, 38.0, 40.0, 45.0):
        assert law.exposure(canary) == pytest.approx(exposure(canary, space, 10_000).bits, abs=1)
    assert law.exposure(20.0) > math.log2(2001)  # beyond what the sample itself could tell
    two_peaks = torch.cat([space[:500] - 200, space[:500]])
    assert SkewNormal.fit(two_peaks).p_value == pytest.approx(0, abs=1e-6)


def five_gram_bits(text: str, canary: str, slots: int) -> float:
    """Bits of the last ``slots`` characters under counts of what follows four characters."""
    following: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for i in range(len(text) - 4):
        following[text[i : i + 4]][text[i + 4]] += 1
    places = range(len(canary) - slots, len(canary))
    counts = [(following[canary[i - 4 : i]], canary[i]) for i in places]
    return -sum(math.log2((seen[c] + 0.01) / (seen.total() + 0.01 * 64)) for seen, c in counts)


def test_more_insertions_do_not_lower_the_exposure() -> None:
    words = "the pin of a door is what 1234 and 5678 and 9012 people know of it " * 40
    format = "the pin is ##"
    means = []
    for times in (0, 1, 4, 16):
        found = []
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            (secret,) = privacy.draw_secrets(format, 1, generator)
            text = privacy.insert_canaries(words, format, [secret], times, generator)
            bits = {s: five_gram_bits(text, privacy.fill(format, s), 2) for s in privacy.secrets(format)}
            rest = torch.tensor([b for s, b in bits.items() if s != secret])
            found.append(exposure(bits[secret], rest, 100).bits)
        means.append(sum(found) / len(found))
    assert means == sorted(means)
    assert means[-1] == pytest.approx(math.log2(100))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(DataError, match="5 candidates for a space of 10"):
        exposure(1, others(5), 10)
    with pytest.raises(DataError, match="sample of 0"):
        exposure_sampled(1, others(0))
    with pytest.raises(NonFiniteError, match="NaN"):
        exposure(math.nan, others(9), 10)
    with pytest.raises(DataError, match="at least 10"):
        SkewNormal.fit(torch.ones(50))
    with pytest.raises(NonFiniteError, match="not finite"):
        SkewNormal.fit(torch.tensor([math.inf, *range(20)]))
    with pytest.raises(ConfigError, match="scale is 0"):
        SkewNormal(1, 0, 0).exposure(1)
