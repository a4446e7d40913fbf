"""What must be true of MiniLLM: its gradient is that of reverse KL between whole texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.contracts import Batch, Outputs, Progress, Unembedding
from limbeck.errors import ConfigError
from limbeck.losses.on_policy import DRAWN
from limbeck.objectives.minillm import MiniLLM

V, T = 3, 3
AT = Progress()


def chain(seed: int, *, grad: bool = False) -> Tensor:
    """Logits [V + 1, V] of the next token behind each token, and behind none: a model of small texts."""
    found = torch.randn(V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.requires_grad_(grad)


def texts() -> Tensor:
    """All texts [V^T, T]."""
    return torch.cartesian_prod(*(torch.arange(V) for _ in range(T)))


def log_prob(table: Tensor, text: Tensor) -> Tensor:
    """Log-probability [N, T] of each token of texts [N, T]."""
    before = torch.cat([torch.full_like(text[:, :1], V), text[:, :-1]], 1)
    return table.log_softmax(-1)[before].gather(-1, text[..., None]).squeeze(-1)


def batch(text: Tensor, drawn: Tensor) -> Batch:
    before = torch.cat([torch.full_like(text[:, :1], V), text[:, :-1]], 1)
    index = torch.arange(len(text))
    return Batch(
        inputs=before, labels=text.flatten(), index=index, view=0 * index, rows=torch.arange(text.numel()),
        marks={DRAWN: drawn.flatten()},
    )  # fmt: skip


def said(table: Tensor, given: Batch) -> Outputs:
    """A language model whose last layer is the identity."""
    return Outputs(
        torch.empty(given.inputs.numel(), 0), hidden=table[given.inputs.flatten()],
        unembedding=Unembedding(torch.eye(V, dtype=torch.float64)),
    )  # fmt: skip


def expected(objective: MiniLLM, own: Tensor, other: Tensor, law: Tensor) -> Tensor:
    """The objective's gradient in ``own`` in expectation over texts drawn from the model ``law``, exactly."""
    total = torch.zeros_like(own)
    for text in texts():
        drawn = log_prob(law, text[None]).detach()
        given = batch(text[None], drawn)
        loss = sum(objective.terms(said(own, given), said(other, given), given, AT).values(), torch.zeros(()))
        total += drawn.sum().exp() * torch.autograd.grad(loss, own)[0]
    return total


def sequence_kl(own: Tensor, other: Tensor) -> Tensor:
    """KL(student ‖ teacher) between the laws of whole texts, exactly."""
    q, p = (log_prob(table, texts()).sum(1) for table in (own, other))
    return (q.exp() * (q - p)).sum()


WIDE = MiniLLM(length_normalised=False, clip=1e9)


def test_its_gradient_is_that_of_reverse_kl_of_texts() -> None:
    own, other = chain(0, grad=True), chain(1)
    wanted = torch.autograd.grad(sequence_kl(own, other), own)[0] / T
    torch.testing.assert_close(expected(WIDE, own, other, own), wanted)


def test_the_mean_taken_off_and_the_own_reward_keep_the_expectation_apart_from_the_second_count() -> None:
    own, other = chain(2, grad=True), chain(3)
    given = batch(texts(), log_prob(own, texts()).detach())
    plain, whole = (
        replace(WIDE, from_here=here).advantage(
            log_prob(own, texts()).detach().flatten(), log_prob(other, texts()).flatten(), given
        ).reshape(-1, T)
        for here in (False, True)
    )  # fmt: skip
    reward = (log_prob(other, texts()) - log_prob(own, texts())).detach()
    torch.testing.assert_close(whole - plain, reward)
    assert (plain[:, -1] == 0).all(), "no token stands behind the last one"
    mean = replace(WIDE, centred=True).advantage(
        log_prob(own, texts()).detach().flatten(), log_prob(other, texts()).flatten(), given
    )
    assert float(mean.mean()) == pytest.approx(0, abs=1e-12)


def test_texts_that_the_teacher_took_part_in_are_weighed_token_by_token() -> None:
    """The part of the next token alone: its weight makes up for the law that each token was drawn from."""
    own, other = chain(4, grad=True), chain(5)
    mixed = torch.logaddexp(
        own.log_softmax(-1) + torch.tensor(0.8).log(), other.log_softmax(-1) + torch.tensor(0.2).log()
    )
    given = batch(texts(), log_prob(mixed, texts()).detach())
    terms = WIDE.terms(said(own, given), said(other, given), given, AT)
    ratio = (log_prob(own, texts()) - log_prob(mixed, texts())).exp().detach()
    before = torch.cat([torch.full_like(texts()[:, :1], V), texts()[:, :-1]], 1)
    q, p = (table.log_softmax(-1)[before] for table in (own, other))
    items = (q.exp() * (q - p)).sum(-1)
    torch.testing.assert_close(terms["single"], (ratio * items).mean())


def test_rewards_are_divided_by_what_is_left_and_stop_at_the_end() -> None:
    own, other = chain(6), chain(7)
    text = torch.tensor([[0, 1, 2], [2, 0, 0]])
    given = batch(text, log_prob(own, text))
    short = replace(  # the second text ends behind its second token
        given, rows=torch.arange(5), labels=given.labels[:5], marks={DRAWN: given.marks[DRAWN][:5]}
    )
    log_q, log_p = (log_prob(table, text).flatten()[:5] for table in (own, other))
    r = log_p - log_q
    found = MiniLLM().advantage(log_q, log_p, short)
    torch.testing.assert_close(
        found, torch.stack([(r[1] + r[2]) / 2, r[2], 0 * r[0], r[4], 0 * r[0]]), rtol=1e-4, atol=1e-4
    )
    assert (MiniLLM(gamma=0).advantage(log_q, log_p, short) == 0).all()


def test_what_went_far_enough_has_no_more_gradient() -> None:
    ratio, advantage = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    assert MiniLLM(clip=0.2).unclipped(ratio, advantage).tolist() == [0, 0.5, 1.5, 0, 1]


def test_at_the_teacher_nothing_pulls() -> None:
    own = chain(8, grad=True)
    gradient = expected(MiniLLM(), own, own.detach(), own)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_a_batch_that_nobody_wrote_is_learnt_from_its_labels() -> None:
    own, other = chain(9), chain(10)
    given = batch(texts(), torch.zeros(len(texts()), T))
    plain = replace(given, marks={})
    terms = MiniLLM(labels=2.0).terms(said(own, plain), said(other, plain), plain, AT)
    assert list(terms) == ["labels"]
    torch.testing.assert_close(terms["labels"], -2 * log_prob(own, texts()).mean())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="gamma is 2 but must lie in"):
        MiniLLM(gamma=2)
    with pytest.raises(ConfigError, match="clip is 0"):
        MiniLLM(clip=0)
    given = batch(texts(), torch.zeros(len(texts()), T))
    known = replace(said(chain(1), given), top=(given.labels[:, None], torch.zeros(len(given.labels), 1)))
    with pytest.raises(ConfigError, match=r"set engine\.cache_top_k to null"):
        MiniLLM().terms(said(chain(0), given), known, given, AT)
