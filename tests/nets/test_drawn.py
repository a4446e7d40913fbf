"""What must be true of tokens with the probability that they were drawn with, from one model or from two."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare
from tests.nets.test_generation import GREEDY, PROMPTS, VOCABULARY, llama, seeded

from limbeck.nets.generation import Mixture, Sampling, drawn, generate

SHARE = 0.3


def law(tokens: list[int], *, share: float = 0.0, temperature: float = 1.0) -> torch.Tensor:
    """The distribution of the next token behind ``tokens``, of one model or of two."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        own, other = (llama(seed)(ids).logits[0, -1].softmax(-1) for seed in (0, 1))
    mixed = (1 - share) * own + share * other
    return (mixed.log() / temperature).softmax(-1)


@pytest.mark.parametrize("share", [0.0, SHARE])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_comes_with_its_probability(share: float, temperature: float) -> None:
    other = (llama(1), share) if share else None
    sampling = Sampling(temperature=temperature)
    told = drawn(
        llama(), PROMPTS, max_new_tokens=5, eos=(2,), sampling=sampling, generator=seeded(), other=other
    )
    for prompt, text in zip(PROMPTS, told, strict=True):
        read = list(prompt)
        for token, probability in text:
            wanted = float(law(read, share=share, temperature=temperature)[token])
            assert probability == pytest.approx(wanted, rel=1e-4)
            read.append(token)


def test_without_a_second_model_the_tokens_are_those_of_generate() -> None:
    for sampling in (Sampling(top_k=4), GREEDY):
        told = drawn(llama(), PROMPTS, generator=seeded(3), max_new_tokens=6, eos=(2,), sampling=sampling)
        plain = generate(llama(), PROMPTS, generator=seeded(3), max_new_tokens=6, eos=(2,), sampling=sampling)
        assert [[token for token, _ in text] for text in told] == plain
    assert all(probability == 1 for text in told for _, probability in text)


def test_the_mixture_is_drawn_from() -> None:
    count = 3000
    told = drawn(
        llama(), [[1, 2]] * count, max_new_tokens=1, generator=seeded(), other=(llama(1), SHARE),
        batch_size=count,
    )  # fmt: skip
    seen = torch.bincount(torch.tensor([text[0][0] for text in told]), minlength=VOCABULARY)
    expected = count * law([1, 2], share=SHARE).double()
    often = expected > 5
    assert seen[~often].sum() < 0.05 * count
    assert (
        chisquare(seen[often].double(), expected[often] * seen[often].sum() / expected[often].sum()).pvalue
        > 1e-3
    )


def test_a_second_model_with_room_for_more_tokens_is_cut() -> None:
    mixture = Mixture(llama(), llama(1, vocabulary=VOCABULARY + 4), SHARE)
    with torch.no_grad():
        said = mixture.read(torch.tensor([[1, 2, 3]]))
    assert said.shape == (1, 1, VOCABULARY)
    assert float(said.exp().sum()) == pytest.approx(1, rel=1e-5)
    assert math.isfinite(float(said.min()))
