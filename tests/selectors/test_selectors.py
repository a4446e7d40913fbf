from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import registry
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.selectors.random import Random


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", registry.names("selectors"))
def test_every_selector_keeps_the_contract(name: str) -> None:
    """Indices are a part of what was given, each once; weights are not negative and sum to B."""
    selector = registry.get("selectors", name)()
    index = torch.arange(100, 140)
    kept = selector.indices(index, torch.zeros(40).long(), 0, seeded())
    assert 0 < len(kept) <= 40
    assert set(kept.tolist()) <= set(index.tolist())
    assert len(kept.unique()) == len(kept)
    again = selector.indices(index, torch.zeros(40).long(), 0, seeded())
    assert torch.equal(kept, again)
    batch = Batch(torch.zeros(4, 1), torch.zeros(4).long(), torch.arange(4), torch.zeros(4).long())
    outputs = Outputs(torch.zeros(4, 2))
    weights = selector.weights(batch, outputs, outputs, Progress())
    if weights is not None:
        assert weights.shape == (4,)
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(4)


@given(st.integers(1, 50), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_random_keeps_the_fraction_rounded_up(count: int, fraction: float) -> None:
    kept = Random(fraction=fraction).indices(torch.arange(count), torch.zeros(count).long(), 0, seeded(count))
    assert len(kept) == math.ceil(fraction * count)


def test_random_draws_anew_and_every_sample_alike() -> None:
    generator, times = seeded(), torch.zeros(20)
    draws = []
    for epoch in range(400):
        kept = Random(fraction=0.3).indices(torch.arange(20), torch.zeros(20).long(), epoch, generator)
        times[kept] += 1
        draws.append(tuple(sorted(kept.tolist())))
    assert len(set(draws)) > 300
    expected, deviation = 400 * 0.3, math.sqrt(400 * 0.3 * 0.7)
    assert ((times - expected).abs() < 4.5 * deviation).all()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_random_refuses_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction is .* but must lie in \(0, 1\]"):
        Random(fraction=fraction)
