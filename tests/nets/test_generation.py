from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from limbeck.errors import ConfigError, DataError, LimbeckError, NonFiniteError, ShapeError
from limbeck.nets.generation import Reader, Sampling, answering, batches, generate, quantile

VOCABULARY = 11
GREEDY = Sampling(temperature=0)


def llama(seed: int = 0, vocabulary: int = VOCABULARY, layers: int = 2, length: int = 64) -> LlamaForCausalLM:
    """A tiny model with random weights, large enough that its distributions are far from even."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length, initializer_range=0.5,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7], [8, 9], [1, 1, 1], [3]]


# Against transformers, and against reading everything again


def theirs(model: LlamaForCausalLM, prompt: list[int], limit: int, eos: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit,
        eos_token_id=eos or None, pad_token_id=0,
    )  # fmt: skip
    return said[0, len(prompt) :].tolist()


@pytest.mark.parametrize("eos", [[], [2, 7]])
def test_greedy_tokens_are_those_of_transformers(eos: list[int]) -> None:
    model = llama()
    ours = generate(model, PROMPTS, max_new_tokens=12, eos=eos, sampling=GREEDY, batch_size=2)
    assert ours == [theirs(model, prompt, 12, eos) for prompt in PROMPTS]
    if eos:
        assert any(len(tokens) < 12 for tokens in ours)


@pytest.mark.parametrize("kind", ["positions", "window"])
def test_other_architectures_too(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "positions":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, initializer_range=0.5, eos_token_id=None, bos_token_id=None, **sizes
            )
        )
    else:
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=4,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    model.eval()
    ours = generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY)
    assert ours == [theirs(model, prompt, 12, []) for prompt in PROMPTS]


@given(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), min_size=1, max_size=6))
def test_the_cache_changes_nothing(prompts: list[list[int]]) -> None:
    model = llama(layers=1)
    for prompt, tokens in zip(
        prompts, generate(model, prompts, max_new_tokens=5, sampling=GREEDY), strict=True
    ):
        ids = list(prompt)
        for token in tokens:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


# Draws


def test_a_prompt_draws_the_same_whatever_stands_beside_it() -> None:
    model, ways = llama(), {"max_new_tokens": 20, "eos": [2]}
    together = generate(model, PROMPTS, **ways, generator=seeded())
    assert together == generate(model, PROMPTS, **ways, generator=seeded(), batch_size=1)
    keys = [4, 0, 3]
    some = generate(model, [PROMPTS[i] for i in keys], **ways, generator=seeded(), keys=keys)
    assert some == [together[i] for i in keys]
    assert together != generate(model, PROMPTS, **ways, generator=seeded(1))


def test_equal_prompts_draw_apart_and_each_call_draws_anew() -> None:
    model, generator = llama(), seeded()
    first = generate(model, [[1, 2]] * 8, max_new_tokens=10, generator=generator)
    assert len(set(map(tuple, first))) > 4
    assert first != generate(model, [[1, 2]] * 8, max_new_tokens=10, generator=generator)


def test_a_larger_limit_goes_on_where_a_smaller_one_stopped() -> None:
    model = llama()
    short = generate(model, PROMPTS, max_new_tokens=4, eos=[2], generator=seeded())
    long = generate(model, PROMPTS, max_new_tokens=30, eos=[2], generator=seeded())
    assert [tokens[:4] for tokens in long] == short


def test_sampling_follows_the_model() -> None:
    model, count = llama(), 3000
    sampling = Sampling(temperature=0.8, top_p=0.9)
    with torch.no_grad():
        law = sampling.probabilities(model(torch.tensor([[1, 2, 3]])).logits[0, -1:])[0].double()
    drawn = generate(
        model, [[1, 2, 3]] * count, max_new_tokens=1, sampling=sampling, generator=seeded(), batch_size=500
    )
    seen = np.bincount([tokens[0] for tokens in drawn], minlength=VOCABULARY)
    possible = law.numpy() > 0
    assert seen[~possible].sum() == 0
    expected = law.numpy()[possible]
    assert chisquare(seen[possible], count * expected / expected.sum()).pvalue > 0.01


def test_a_text_ends_with_its_first_end() -> None:
    for tokens in generate(llama(), PROMPTS * 4, max_new_tokens=40, eos={2, 5}, generator=seeded()):
        ends = [place for place, token in enumerate(tokens) if token in {2, 5}]
        assert ends in ([], [len(tokens) - 1])
        assert ends or len(tokens) == 40


# Distributions


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 3, 1.0), (1.0, 0, 0.6), (2, 5, 0.5)]
)
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(6, 9, generator=seeded(), dtype=torch.float64)
    want = TemperatureLogitsWarper(float(temperature))(None, logits)
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    got = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(logits)
    torch.testing.assert_close(got, want.softmax(-1))
    assert got.dtype == torch.float64


def test_temperature_0_is_certain_and_low_ones_come_near_it() -> None:
    logits = torch.randn(5, 7, generator=seeded()).bfloat16()
    certain = GREEDY.probabilities(logits)
    assert certain.dtype == torch.float32 and (certain.max(-1).values == 1).all()
    assert (certain.argmax(-1) == logits.argmax(-1)).all()
    torch.testing.assert_close(Sampling(temperature=1e-4).probabilities(logits), certain)


PARTS = st.one_of(st.just(0.0), st.floats(1e-9, 1))


@given(st.lists(PARTS, min_size=2, max_size=8), st.floats(0, 1, exclude_max=True))
def test_quantile_never_draws_what_has_no_probability(weights: list[float], uniform: float) -> None:
    weights[-1] = weights[-1] or 1.0
    row = torch.tensor([weights], dtype=torch.float64)
    for number in (uniform, 0.0, 1 - 2**-53):
        token = int(quantile(row, torch.tensor([number], dtype=torch.float64)))
        assert weights[token] > 0
        before, total = sum(weights[:token]), sum(weights)
        assert before <= number * total + 1e-9 and number * total <= before + weights[token] + 1e-9


def test_batches_hold_prompts_of_one_length() -> None:
    assert list(batches(PROMPTS, 2)) == [[1, 5], [3], [0, 2], [4]]
    assert list(batches([], 2)) == []


# The model stays as it was


def test_the_model_answers_in_evaluation_mode_and_gets_its_mode_back() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    seen: list[tuple[bool, bool]] = []
    model.model.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_grad_enabled())))
    generate(model, PROMPTS, max_new_tokens=2, sampling=GREEDY)
    assert set(seen) == {(False, False)}
    assert model.training and model.lm_head.training and not model.model.layers[0].training


def test_the_mode_comes_back_after_an_error() -> None:
    model = llama().train()
    with pytest.raises(RuntimeError), answering(model):
        raise RuntimeError
    assert model.training and torch.is_grad_enabled()


def test_a_reader_can_unread() -> None:
    model, reader = llama(), Reader(llama())
    with torch.no_grad():
        reader.read(torch.tensor([[1, 2, 3, 4, 5]]))
        reader.back_to(2)
        said = reader.read(torch.tensor([[6, 7]]), keep=2)
        torch.testing.assert_close(said, model(torch.tensor([[1, 2, 6, 7]])).logits[:, 2:])
        reader.back_to(4)  # nothing to forget
    assert (reader.length, reader.calls, reader.vocabulary) == (4, 2, VOCABULARY)


def test_the_last_token_need_not_be_read() -> None:
    (told,) = generate(llama(), [[1, 2]], max_new_tokens=63, sampling=GREEDY)
    assert len(told) == 63, "a model that reads 64"


def test_tokens_that_the_tokenizer_lacks_are_not_drawn() -> None:
    told = generate(llama(), PROMPTS * 4, max_new_tokens=20, vocabulary=4, generator=seeded())
    assert {token for text in told for token in text} == {0, 1, 2, 3}


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prompts": [[1], []]}, DataError, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ({"max_new_tokens": 65}, ShapeError, "reads 64"),
        ({"prompts": [[1, VOCABULARY]]}, ShapeError, f"token {VOCABULARY} is not in the vocabulary"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"sampling": Sampling()}, ConfigError, "no generator"),
        ({"keys": [1, 2]}, ConfigError, "2 keys but 1 prompts"),
    ],
)
def test_bad_input_is_named_in_one_line(change: dict, error: type[LimbeckError], match: str) -> None:
    given = {"prompts": [[1]], "max_new_tokens": 2, "sampling": GREEDY} | change
    with pytest.raises(error, match=match) as caught:
        generate(llama(), given.pop("prompts"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_a_sampling_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
        Sampling(**wrong)


def test_nan_logits_stop_it() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN logits"):
        generate(model, [[1]], max_new_tokens=2, sampling=GREEDY)


def test_no_prompt_gives_nothing() -> None:
    assert generate(llama(), [], max_new_tokens=2, sampling=GREEDY) == []
