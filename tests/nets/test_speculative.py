from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from limbeck.errors import ConfigError, DataError, LimbeckError, ShapeError
from limbeck.metrics.speculative import Verified, speculative_verify
from limbeck.nets import speculative
from limbeck.nets.generation import Reader, Sampling, generate
from limbeck.nets.speculative import Speculated, speculate, summary

VOCABULARY = 8
GREEDY = Sampling(temperature=0)
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def llama(seed: int, layers: int = 1, vocabulary: int = VOCABULARY, spread: float = 0.35) -> LlamaForCausalLM:
    """Random weights; ``spread`` says how far from even its distributions are."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, initializer_range=spread, **SIZES)
    return LlamaForCausalLM(config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 0, 1], [7, 7]]


# Greedy: the target's own tokens, whatever the draft


@settings(max_examples=8)
@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 24), st.sets(st.integers(0, 7), max_size=2))
def test_greedy_output_is_the_targets_own(seed: int, gamma: int, limit: int, eos: set[int]) -> None:
    draft, target = llama(seed), llama(seed + 100, layers=2, spread=0.5)
    want = generate(target, PROMPTS, max_new_tokens=limit, eos=eos, sampling=GREEDY)
    got = speculate(draft, target, PROMPTS, gamma=gamma, max_new_tokens=limit, eos=eos, sampling=GREEDY)
    assert [one.tokens for one in got] == want


def test_a_draft_that_is_the_target_is_always_right() -> None:
    target = llama(0, layers=2)
    for sampling in (GREEDY, Sampling(temperature=0.7, top_p=0.9)):
        (one,) = speculate(
            target, target, [[1, 2]], gamma=4, max_new_tokens=30, sampling=sampling, generator=seeded()
        )
        assert len(one.tokens) == 30 and one.proposed == (4,) * 6 and one.accepted == (4,) * 6
        assert (one.target_calls, one.draft_calls, one.rejected) == (6, 24, 0)
        assert summary([one])["acceptance"] == 1 and summary([one])["tokens_per_target_call"] == 5


def test_models_with_a_window_go_back_too() -> None:
    torch.manual_seed(3)
    target = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY, num_hidden_layers=2, sliding_window=4, initializer_range=0.5, **SIZES
        )
    ).eval()
    want = generate(target, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    got = speculate(llama(1), target, PROMPTS, gamma=3, max_new_tokens=20, sampling=GREEDY)
    assert [one.tokens for one in got] == want


def test_vocabularies_padded_differently() -> None:
    want = {}
    for small, large in ((VOCABULARY, VOCABULARY + 3), (VOCABULARY + 3, VOCABULARY)):
        target = llama(5, vocabulary=large)
        if large > VOCABULARY:  # padding rows never win
            with torch.no_grad():
                target.lm_head.weight[VOCABULARY:] = 0
                target.lm_head.weight[0] *= 3
        draft = llama(6, vocabulary=small)
        want[large] = generate(target, PROMPTS, max_new_tokens=10, eos=range(8, 11), sampling=GREEDY)
        got = speculate(draft, target, PROMPTS, gamma=3, max_new_tokens=10, eos=range(8, 11), sampling=GREEDY)
        assert [one.tokens for one in got] == want[large]
        drawn = speculate(
            draft, target, PROMPTS * 3, gamma=3, max_new_tokens=6, eos=range(8, 11), generator=seeded()
        )
        assert all(max(one.tokens) < large for one in drawn)


# Sampling: the law is the target's, and the test would see if it were not


PROMPT, COUNT, LIMIT = [1, 2], 3, 5  # the law of the first COUNT of LIMIT tokens is tested


class Remembering(Reader):
    """Knows the logits behind all short texts beforehand: a reader with a cache, many times faster."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.ids: list[int] = []

    def read(self, tokens: Tensor, keep: int = 1) -> Tensor:
        self.ids += tokens[0].tolist()
        self.length, self.calls = len(self.ids), self.calls + 1
        ends = range(self.length - keep + 1, self.length + 1)
        known = self.model.__dict__.get("known") or self.learn()
        return torch.stack([known[tuple(self.ids[len(PROMPT) : end])] for end in ends])[None]

    def learn(self) -> dict[tuple[int, ...], Tensor]:
        known = self.model.__dict__["known"] = {}
        for count in range(LIMIT):
            texts = all_texts(count)
            said = self.model(torch.cat([torch.tensor([PROMPT]).expand(len(texts), -1), texts], dim=1)).logits
            known |= {tuple(text): row for text, row in zip(texts.tolist(), said[:, -1], strict=True)}
        return known

    def back_to(self, length: int) -> None:
        del self.ids[length:]
        self.length = len(self.ids)


def all_texts(count: int) -> Tensor:
    """[V ** count, count]: in the order of the numbers that they write."""
    places = torch.arange(VOCABULARY**count).unsqueeze(1)
    return places // VOCABULARY ** torch.arange(count - 1, -1, -1) % VOCABULARY


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "Reader", Remembering)


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A target, and a draft whose weights are the target's and some noise."""
    target, draft, noise = llama(2), llama(2), llama(9)
    with torch.no_grad():
        for weight, other in zip(draft.parameters(), noise.parameters(), strict=True):
            weight += 0.6 * other * (weight.ndim > 1)
    return draft, target


def law_of_first(target: LlamaForCausalLM, sampling: Sampling) -> np.ndarray[Any, Any]:
    """The exact probability [V ** COUNT] of every text of the first tokens."""
    words = all_texts(COUNT)
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(words), -1), words], dim=1)
    with torch.no_grad():
        logits = target(ids).logits[:, len(PROMPT) - 1 : -1]
    each = sampling.probabilities(logits.reshape(-1, VOCABULARY)).reshape(len(words), COUNT, VOCABULARY)
    law: np.ndarray[Any, Any] = each.gather(2, words.unsqueeze(2)).double().prod(1).squeeze(1).numpy()
    return law


def fit(results: list[Speculated], law: np.ndarray[Any, Any]) -> float:
    """The p-value of Pearson's test; texts expected fewer than 5 times are put together."""
    powers = [VOCABULARY ** (COUNT - 1 - place) for place in range(COUNT)]
    seen = np.bincount([int(np.dot(one.tokens, powers)) for one in results], minlength=len(law))
    if seen[law == 0].any():
        return 0.0
    expected = len(results) * law / law.sum()
    bins = np.where(expected < 5, 0, 1 + np.arange(len(law)))[law > 0]
    seen, expected = (np.bincount(bins, weights=each[law > 0]) for each in (seen, expected))
    return float(chisquare(seen[expected > 0], expected[expected > 0]).pvalue)


def speculated(pair: tuple[Any, Any], count: int, gamma: int, sampling: Sampling) -> list[Speculated]:
    ways: dict[str, Any] = {"gamma": gamma, "max_new_tokens": LIMIT, "sampling": sampling}
    results = speculate(*pair, [PROMPT] * count, **ways, generator=seeded())
    assert 0.2 < summary(results)["acceptance"] < 0.95  # both ways out of a block are taken
    return [replace(one, tokens=one.tokens[:COUNT]) for one in results]


SETTINGS = [
    (1, Sampling()),
    (2, Sampling(temperature=0.6)),
    (4, Sampling(temperature=1.5)),
    (3, Sampling(temperature=1.2, top_p=0.8)),
    (4, Sampling(top_k=3)),
]


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize(("gamma", "sampling"), SETTINGS)
def test_the_law_of_the_first_tokens_is_the_targets(pair: Any, gamma: int, sampling: Sampling) -> None:
    law = law_of_first(pair[1], sampling)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    assert fit(speculated(pair, 1000, gamma, sampling), law) > 0.01


def test_the_law_with_caches(pair: Any) -> None:
    sampling = Sampling(temperature=1.2, top_p=0.9)
    assert fit(speculated(pair, 150, 3, sampling), law_of_first(pair[1], sampling)) > 0.01


def accept_always(q: Tensor, p: Tensor, proposed: Tensor, u: Tensor, last: Tensor) -> Verified:
    return speculative_verify(q, p, proposed, torch.zeros_like(u), last)


def residual_of_the_target(q: Tensor, p: Tensor, proposed: Tensor, u: Tensor, last: Tensor) -> Verified:
    took, token, law = speculative_verify(q, p, proposed, u, last)
    if took < len(proposed):
        law = p[took]
        token = (law.cumsum(0) > last * law.sum()).long().argmax()
    return Verified(took, token, law)


def bonus_of_the_draft(q: Tensor, p: Tensor, proposed: Tensor, u: Tensor, last: Tensor) -> Verified:
    took, token, law = speculative_verify(q, p, proposed, u, last)
    if took == len(proposed) > 0:
        law = q[-1]
        token = (law.cumsum(0) > last * law.sum()).long().argmax()
    return Verified(took, token, law)


def flattened_draft(q: Tensor, p: Tensor, proposed: Tensor, u: Tensor, last: Tensor) -> Verified:
    return speculative_verify(q.sqrt() / q.sqrt().sum(-1, keepdim=True), p, proposed, u, last)


WRONG = [accept_always, residual_of_the_target, bonus_of_the_draft, flattened_draft]


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_step_would_be_seen(monkeypatch: pytest.MonkeyPatch, pair: Any, wrong: Any) -> None:
    monkeypatch.setattr(speculative, "speculative_verify", wrong)
    ways: dict[str, Any] = {"gamma": 2, "max_new_tokens": LIMIT}
    results = speculate(*pair, [PROMPT] * 1000, **ways, generator=seeded())
    cut = [replace(one, tokens=one.tokens[:COUNT]) for one in results]
    assert fit(cut, law_of_first(pair[1], Sampling())) < 1e-6


# What is counted


def test_each_block_gives_what_it_accepted_and_one_token_more() -> None:
    results = speculate(
        llama(1), llama(2), PROMPTS * 5, gamma=4, max_new_tokens=25, eos=[6], generator=seeded()
    )
    for one in results:
        given = sum(one.accepted) + len(one.accepted)
        assert len(one.tokens) in (given, given - 1)  # one less where an accepted end of text closed it
        assert (len(one.tokens) < given) <= (one.tokens[-1] == 6 and one.accepted[-1] == one.proposed[-1])
        assert all(0 <= took <= gave <= 4 for took, gave in zip(one.accepted, one.proposed, strict=True))
        assert one.draft_calls == sum(one.proposed) and one.tokens.count(6) == (one.tokens[-1] == 6)
        assert len(one.tokens) <= 25
    figures = summary(results)
    accepted = sum(sum(one.accepted) for one in results)
    rejected = sum(one.rejected for one in results)
    assert figures["acceptance"] == accepted / (accepted + rejected)
    assert figures["rejected"] == rejected and figures["accepted"] == accepted
    assert figures["tokens_per_target_call"] == figures["tokens"] / figures["target_calls"]


def test_nothing_is_proposed_that_could_not_be_used() -> None:
    target = llama(2)
    (one,) = speculate(target, target, [[1]], gamma=4, max_new_tokens=7, sampling=GREEDY)
    assert one.proposed == (4, 1) and len(one.tokens) == 7
    (one,) = speculate(target, target, [[1]], gamma=4, max_new_tokens=1, sampling=GREEDY)
    assert one.proposed == (0,) and one.draft_calls == 0 and len(one.tokens) == 1
    with pytest.raises(DataError, match="0 judged proposals"):
        summary([one])


def test_a_prompt_draws_the_same_whatever_stands_beside_it() -> None:
    draft, target = llama(1), llama(2)
    ways: dict[str, Any] = {"gamma": 3, "max_new_tokens": 12, "eos": [3]}
    together = speculate(draft, target, PROMPTS, **ways, generator=seeded())
    alone = speculate(draft, target, PROMPTS[2:3], **ways, generator=seeded(), keys=[2])
    assert alone == together[2:3]


def test_both_models_get_their_mode_back() -> None:
    draft, target = llama(1).train(), llama(2)
    speculate(draft, target, [[1]], gamma=2, max_new_tokens=3, sampling=GREEDY)
    assert draft.training and not target.training


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"gamma": 0}, ConfigError, "gamma is 0"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ({"max_new_tokens": 65}, ShapeError, "reads 64"),
        ({"prompts": [[]]}, DataError, "prompt 0 is empty"),
        ({"prompts": [[9]]}, ShapeError, "token 9 is not in the vocabulary"),
        ({"sampling": Sampling()}, ConfigError, "no generator"),
    ],
)
def test_bad_input_is_named_in_one_line(change: dict, error: type[LimbeckError], match: str) -> None:
    given = {"prompts": [[1]], "gamma": 2, "max_new_tokens": 4, "sampling": GREEDY} | change
    with pytest.raises(error, match=match) as caught:
        speculate(llama(1), llama(2), given.pop("prompts"), **given)
    assert "\n" not in str(caught.value)
