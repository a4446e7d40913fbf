"""Speculative decoding: a draft proposes, the target verifies in one pass, the law stays the target's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.errors import ConfigError
from limbeck.metrics.speculative import acceptance_rate, greedy_verify, quantile, speculative_verify
from limbeck.nets.generation import Reader, Sampling, answering, check, streams


@dataclass(frozen=True, slots=True)
class Speculated:
    """One continuation, and what it took.

    Attributes:
        tokens: the continuation, up to and including its first end of text.
        proposed: how many tokens the draft proposed, by block.
        accepted: how many of them the target took, by block.
        draft_calls: forward passes of the draft; the target makes one per block.
    """

    tokens: list[int]
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    draft_calls: int

    @property
    def target_calls(self) -> int:
        """Forward passes of the target."""
        return len(self.proposed)

    @property
    def rejected(self) -> int:
        """Blocks that ended with a token that the target did not take."""
        return sum(took < gave for took, gave in zip(self.accepted, self.proposed, strict=True))


def speculate(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    gamma: int,
    max_new_tokens: int,
    eos: Collection[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    generator: torch.Generator | None = None,
    keys: Sequence[int] | None = None,
) -> list[Speculated]:
    """Continuations of ``prompts`` distributed as the target's own, at fewer passes of it.

    Block by block the draft proposes up to γ tokens and the target reads them in one pass; it keeps those
    before the first that it rejects and adds one of its own. Both distributions are scaled and cut by
    ``sampling`` before they are compared. Greedy decoding gives the target's own greedy tokens whatever the
    draft is, as far as rounding leaves its choice the same in passes of one and of several tokens.

    A block stops early at a proposed end of text, and where no more than one token is left to give; so no
    proposal is counted that could not have been used. Prompts are read one by one.

    Args:
        draft: a causal language model with the target's token ids. Where their vocabularies are padded to
            different sizes, ids that the target lacks are never proposed.
        target: a causal language model.
        prompts: token ids, at least one each.
        gamma: γ >= 1, tokens proposed per block.
        max_new_tokens: >= 1.
        eos: ids that end a text.
        sampling: how tokens are drawn, from both.
        generator: see ``generate``.
        keys: see ``generate``.

    Raises:
        ConfigError, DataError, ShapeError, NonFiniteError: as ``generate``; γ below 1.

    Source: Leviathan, Kalman, Matias, ICML 2023 (arXiv 2211.17192), algorithm 1; its use to measure a draft:
    Hu et al., "AdaSPEC" (arXiv 2510.19779).
    """
    if gamma < 1:
        raise ConfigError(f"gamma is {gamma} but must be >= 1: give such a one")
    for model in (draft, target):
        check(model, prompts, max_new_tokens)
    chance = streams(len(prompts), sampling, generator, keys)
    with answering(draft, target):
        return [
            _continue(draft, target, prompt, gamma, max_new_tokens, eos, sampling, stream)
            for prompt, stream in zip(prompts, chance, strict=True)
        ]


def summary(results: Sequence[Speculated]) -> dict[str, float]:
    """What the draft was worth, over all blocks.

    Returns:
        ``acceptance``: α, the accepted tokens over the accepted and the rejected ones, in 0 .. 1; a block has
        one rejected token where the target did not take all proposals: those behind it were never judged.
        ``tokens_per_target_call``: >= 1; plain decoding has 1. ``tokens``, ``target_calls``, ``draft_calls``,
        ``proposed``, ``accepted``, ``rejected``: counts.

    Raises:
        DataError: no token was proposed.

    Source: Hu et al. (arXiv 2510.19779), equation 3.
    """
    proposed = torch.tensor([gave for one in results for gave in one.proposed])
    accepted = torch.tensor([took for one in results for took in one.accepted])
    rate = acceptance_rate(accepted, proposed)
    tokens = sum(len(one.tokens) for one in results)
    return {
        "acceptance": rate.alpha, "tokens_per_target_call": tokens / len(proposed), "tokens": tokens,
        "target_calls": len(proposed), "draft_calls": sum(one.draft_calls for one in results),
        "proposed": int(proposed.sum()), "accepted": rate.accepted, "rejected": rate.rejected,
    }  # fmt: skip


def _continue(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    prompt: Sequence[int],
    gamma: int,
    limit: int,
    eos: Collection[int],
    sampling: Sampling,
    stream: np.random.Generator,
) -> Speculated:
    small, large = Reader(draft), Reader(target)
    ids, proposed, accepted = list(prompt), [], []
    ended = False
    while not ended and (left := len(prompt) + limit - len(ids)):
        guess, q = _propose(small, large.vocabulary, ids, min(gamma, left - 1), eos, sampling, stream)
        took, token = _verify(large, ids, guess, q, sampling, stream)
        stands = len(ids) + took
        whole = took > 0 and guess[took - 1] in eos  # nothing comes behind an end of text
        ids += guess[:took] if whole else [*guess[:took], token]
        ended = ids[-1] in eos
        small.back_to(stands)
        large.back_to(stands)
        proposed.append(len(guess))
        accepted.append(took)
    return Speculated(ids[len(prompt) :], tuple(proposed), tuple(accepted), small.calls)


def _propose(
    reader: Reader,
    vocabulary: int,
    ids: list[int],
    count: int,
    eos: Collection[int],
    sampling: Sampling,
    stream: np.random.Generator,
) -> tuple[list[int], Tensor]:
    """Up to ``count`` tokens, and the distributions [n, vocabulary] that they were drawn from; greedy has
    none."""
    guess: list[int] = []
    drawn_from = [torch.empty(0, vocabulary, device=reader.model.device)]
    while len(guess) < count and not (guess and guess[-1] in eos):
        logits = reader.read(torch.tensor([[*ids, *guess][reader.length :]]))[:, -1, :vocabulary]
        if sampling.greedy:
            guess.append(int(logits.argmax()))
            continue
        probabilities = sampling.probabilities(logits)
        guess.append(int(quantile(probabilities, torch.tensor([stream.random()], dtype=torch.float64))))
        drawn_from.append(F.pad(probabilities, (0, vocabulary - logits.shape[-1])))
    return guess, torch.cat(drawn_from)


def _verify(
    reader: Reader,
    ids: list[int],
    guess: list[int],
    q: Tensor,
    sampling: Sampling,
    stream: np.random.Generator,
) -> tuple[int, int]:
    """How many proposals stand, and the token that comes behind them."""
    logits = reader.read(torch.tensor([ids[reader.length :] + guess]), keep=len(guess) + 1)[0]
    proposed = torch.tensor(guess, dtype=torch.int64, device=logits.device)
    if sampling.greedy:
        took, token = greedy_verify(proposed, logits)
    else:
        uniform = torch.as_tensor(stream.random(len(guess) + 1), device=logits.device)
        took, token, _ = speculative_verify(
            q, sampling.probabilities(logits), proposed, uniform[:-1], uniform[-1]
        )
    return int(took), int(token)
