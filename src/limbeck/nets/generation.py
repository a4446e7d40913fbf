"""Sampling from a causal language model with a key/value cache, reproducible prompt by prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from limbeck.errors import ConfigError, DataError, NonFiniteError, ShapeError
from limbeck.losses import full_precision
from limbeck.metrics.speculative import quantile


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from logits: scaled by the temperature, cut to the K most probable tokens,
    then to the nucleus.

    Attributes:
        temperature: >= 0; 0 takes the most probable token (greedy), whatever the cuts.
        top_k: how many of the most probable tokens stay; 0 = all.
        top_p: in (0, 1]; the smallest set of most probable tokens whose probabilities reach it stays; 1 =
            all.

    Source: Holtzman et al., ICLR 2020 (arXiv 1904.09751), section 3.1 for the nucleus, 5.3 and 5.4 for the
    others.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(
                f"temperature is {self.temperature} but must be >= 0 (0 = greedy): give such a one"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k} but must be >= 0 (0 = all tokens): give such a one")
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p is {self.top_p} but must lie in (0, 1] (1 = all tokens): give such a one"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distributions [N, V] that tokens are drawn from, in at least float32.

        Args:
            logits: [N, V]; -inf bans a token.
        """
        scores = full_precision(logits)
        if self.greedy:
            return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        scores = scores / self.temperature
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return scores.softmax(-1)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token [N] from each row of logits [N, V], by numbers [N] in [0, 1) that greedy ignores."""
        return self.scored(logits, uniform)[0]

    def scored(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """What ``draw`` draws, and the probability [N] that each token had of it: 1 where greedy."""
        if self.greedy:
            best = logits.argmax(-1)
            return best, torch.ones(best.shape, device=best.device)
        law = self.probabilities(logits)
        tokens = quantile(law, uniform)
        return tokens, law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


class Reader:
    """Sequences of one length that a causal language model reads piece by piece, and can unread.

    Attributes:
        length: how many tokens of each sequence the cache holds.
        calls: how often the model was called.
        vocabulary: how many token ids it knows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache()  # keeps every position, also of layers with a window, so it can go back
        self.length = 0
        self.calls = 0
        self.vocabulary = vocabulary(model)

    def read(self, tokens: Tensor, keep: int = 1) -> Tensor:
        """The logits [B, keep, V] behind the last ``keep`` of more tokens [B, t].

        Raises:
            NonFiniteError: a logit is NaN.
            ShapeError: a token is not in the model's vocabulary.
        """
        if tokens.max() >= self.vocabulary:
            raise ShapeError(
                f"token {int(tokens.max())} is not in the vocabulary of {type(self.model).__name__}, which "
                f"has {self.vocabulary}: use its own tokenizer"
            )
        tokens = tokens.to(self.model.device)
        said: Tensor = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=keep
        ).logits
        self.length += tokens.shape[1]
        self.calls += 1
        if said.isnan().any():
            raise NonFiniteError(
                f"{type(self.model).__name__} gave NaN logits at token {self.length}: check its weights and "
                "its dtype"
            )
        return said

    def back_to(self, length: int) -> None:
        """Forget what was read behind the first ``length`` tokens."""
        if length < self.length:
            self.cache.crop(length - self.length)
            self.length = length

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))


class Mixture:
    """Two models that read the same and say one law: a share of the second one's and the rest of the first's.

    It answers as a ``Reader`` does, with log-probabilities for logits, over the tokens that both know.

    Args:
        model: the first.
        other: the second.
        share: of the second, in (0, 1).

    Source: teacher-mixed sampling: Gu et al., ICLR 2024 (arXiv 2306.08543), section 2.2.
    """

    def __init__(self, model: PreTrainedModel, other: PreTrainedModel, share: float) -> None:
        self.readers = (Reader(model), Reader(other))
        self.parts = torch.tensor([1 - share, share]).log().tolist()
        self.vocabulary = min(reader.vocabulary for reader in self.readers)

    def read(self, tokens: Tensor, keep: int = 1) -> Tensor:
        """As ``Reader.read``."""
        own, other = (
            full_precision(reader.read(tokens, keep))[..., : self.vocabulary].log_softmax(-1) + part
            for reader, part in zip(self.readers, self.parts, strict=True)
        )
        return torch.logaddexp(own, other.to(own.device))

    def keep(self, rows: Sequence[int]) -> None:
        """As ``Reader.keep``."""
        for reader in self.readers:
            reader.keep(rows)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    keys: Sequence[int] | None = None,
    batch_size: int = 16,
    vocabulary: int | None = None,
) -> list[list[int]]:
    """Continuations of ``prompts``, each up to and including its first end of text.

    Prompts of one length are read together, so nothing is padded; a sequence that has ended leaves the batch.
    The model answers in evaluation mode, without gradient, and is left as it was.

    Every prompt draws from a stream of its own (``streams``): what else is asked, in which order and in which
    batches changes none of its draws, and a larger limit only goes on where a smaller one stopped. What is
    left is the rounding of logits, which may depend on the size of a batch.

    ``PreTrainedModel.generate`` gives the same greedy tokens, but draws for a whole batch from the global
    state of the process, so that a prompt's tokens hang on its neighbours, and goes on computing sequences
    that have ended.

    Args:
        model: a causal language model with a key/value cache.
        prompts: token ids, at least one each.
        max_new_tokens: >= 1.
        eos: ids that end a text.
        sampling: how tokens are drawn.
        generator: gives one number, the root of all streams; greedy needs none.
        keys: a number >= 0 per prompt, that tells its stream from others; None = its place in ``prompts``.
        batch_size: how many prompts are read together at most.
        vocabulary: the tokens that may be drawn, counted from 0: a model may have room for more than its
            tokenizer has. None = all.

    Raises:
        ConfigError: no generator to draw with, or a limit or batch size below 1.
        DataError: an empty prompt.
        ShapeError: a prompt and its continuation are longer than the model reads.
        NonFiniteError: the model gives NaN.
    """
    told = drawn(
        model, prompts, max_new_tokens=max_new_tokens, eos=eos, sampling=sampling, generator=generator,
        keys=keys, batch_size=batch_size, vocabulary=vocabulary,
    )  # fmt: skip
    return [[token for token, _ in text] for text in told]


def drawn(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    keys: Sequence[int] | None = None,
    batch_size: int = 16,
    vocabulary: int | None = None,
    other: tuple[PreTrainedModel, float] | None = None,
) -> list[list[tuple[int, float]]]:
    """What ``generate`` gives, each token with the probability that it had of being drawn.

    Arguments and errors as ``generate``, and ``other``: a second model and its share of the law that tokens
    are drawn from (``Mixture``); temperature and cuts are of the mixture.
    """
    models = (model,) if other is None else (model, other[0])
    for each in models:
        check(each, prompts, max_new_tokens)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size} but must be >= 1: give such a one")
    chance = streams(len(prompts), sampling, generator, keys)
    continued: list[list[tuple[int, float]]] = [[] for _ in prompts]
    with answering(*models):
        for rows in batches(prompts, batch_size):
            reader: Reader | Mixture = Reader(model) if other is None else Mixture(model, *other)
            alive = rows
            logits = reader.read(torch.tensor([list(prompts[i]) for i in rows]))
            for left in reversed(range(max_new_tokens)):
                uniform = torch.tensor([chance[i].random() for i in alive], dtype=torch.float64)
                found, likely = sampling.scored(logits[:, -1, :vocabulary], uniform)
                tokens = found.tolist()
                for i, token, probability in zip(alive, tokens, likely.tolist(), strict=True):
                    continued[i].append((token, probability))
                going = [row for row, token in enumerate(tokens) if token not in eos]
                if not going or not left:
                    break
                if len(going) < len(alive):
                    reader.keep(going)
                alive = [alive[row] for row in going]
                logits = reader.read(torch.tensor([[tokens[row]] for row in going]))
    return continued


def batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The places of prompts of one length, at most ``size`` at a time, short prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def streams(
    count: int, sampling: Sampling, generator: torch.Generator | None, keys: Sequence[int] | None = None
) -> list[np.random.Generator]:
    """One stream of uniform numbers per prompt: a function of ``generator``'s next number and of its key.

    Raises:
        ConfigError: something is left to chance but there is no generator, or not one key per prompt.
    """
    if keys is not None and len(keys) != count:
        raise ConfigError(f"there are {len(keys)} keys but {count} prompts: give one key per prompt")
    if generator is None:
        if not sampling.greedy:
            raise ConfigError(
                f"temperature is {sampling.temperature} but there is no generator: give one, or temperature 0"
            )
        root = 0
    else:
        root = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return [np.random.default_rng((root, key)) for key in (range(count) if keys is None else keys)]


@contextmanager
def answering(*models: nn.Module) -> Iterator[None]:
    """Within the context the models are in evaluation mode and no gradient is kept; then all is as before."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids ``model`` knows."""
    table: Any = model.get_input_embeddings()
    return len(table.weight)


def check(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise unless ``model`` can read every prompt with its continuation."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} but must be >= 1: give such a one")
    limit = getattr(model.config, "max_position_embeddings", None)
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {place} is empty: begin it with the tokenizer's first token (BOS)")
        if limit is not None and len(prompt) + max_new_tokens - 1 > limit:  # the last one is not read
            raise ShapeError(
                f"prompt {place} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, but the "
                f"model reads {limit}: shorten one of them"
            )
