"""The loss kernels are the plain forms: value and gradient, whatever the chunk, the head and the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.contracts import Unembedding
from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import (
    DIVERGENCES,
    JSD,
    TAID,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    TopTokens,
    token_divergence,
    top_divergence,
)
from limbeck.losses.chunked import CHUNK, Hidden, chunked, chunked_items, release, room

seeds = st.integers(0, 2**31)
WIDTH, WIDTH_T = 5, 6
KINDS: dict[str, Divergence] = {
    **{name: kind() for name, kind in DIVERGENCES.items()},
    "cross_entropy": ForwardKL(cross_entropy=True),
    "jsd_0.1": JSD(0.1),
    "jsd_normalised": JSD(0.3, normalised=True),
    "skew_cross_entropy": SkewForwardKL(0.2, cross_entropy=True),
    "taid": TAID(0.4),
    "taid_kl": TAID(torch.tensor(0.7), cross_entropy=False),
}
every = pytest.mark.parametrize("divergence", KINDS.values(), ids=KINDS)


class Case:
    """Both networks' hidden states and heads, labels and weights of R rows."""

    def __init__(
        self,
        rows: int = 7,
        tokens: int = 23,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float64,
        bias: bool = True,
        **head: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.states, self.weight = draw(rows, WIDTH).requires_grad_(), draw(tokens, WIDTH).requires_grad_()
        self.bias = draw(tokens).requires_grad_() if bias else None
        self.student = Hidden(self.states, Unembedding(self.weight, self.bias, **head))
        head_t = Unembedding(draw(tokens, WIDTH_T), draw(tokens) if bias else None, **head)
        self.teacher = Hidden(draw(rows, WIDTH_T), head_t)
        self.labels = torch.randint(tokens, (rows,), generator=generator)
        self.weights = torch.rand(rows, generator=generator)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.states, self.weight, self.bias) if x is not None]

    def top(self, k: int, temperature: float = 1.0, *, tail: bool = True) -> TopTokens:
        log_probs, ids = (logits(self.teacher).double() / temperature).log_softmax(-1).topk(k)
        return TopTokens(ids, log_probs, tail)

    def grads(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves, retain_graph=True)


def logits(network: Hidden) -> Tensor:
    return network.unembedding.logits(network.states)


def plain(
    case: Case,
    divergence: Divergence,
    teacher: Hidden | TopTokens,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The divergence on whole logits."""
    own = logits(case.student)
    if isinstance(teacher, TopTokens):
        return top_divergence(divergence, own, teacher, temperature, weights=weights)
    return token_divergence(divergence, own, logits(teacher), temperature, weights=weights)


def assert_same(case: Case, found: Tensor, wanted: Tensor, value: float = 1e-9, slope: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, rtol=value, atol=value)
    for mine, its in zip(case.grads(found), case.grads(wanted), strict=True):
        torch.testing.assert_close(mine, its, rtol=slope, atol=slope)


@every
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", [{}, {"scale": 0.3}, {"cap": 2.0}, {"scale": 1.7, "cap": 3.0}], ids=str)
def test_divergence_and_labels_in_one_pass_are_both_plain_forms(
    divergence: Divergence, temperature: float, head: dict[str, float]
) -> None:
    case = Case(**head)
    for teacher in (case.teacher, case.top(4, temperature), case.top(4, temperature, tail=False)):
        settings: dict[str, Any] = {"temperature": temperature, "weights": case.weights, "rows": 3}
        soft = plain(case, divergence, teacher, temperature, case.weights)
        assert_same(case, chunked(case.student, divergence, teacher, **settings).loss, soft)
        items = F.cross_entropy(logits(case.student), case.labels, reduction="none")
        hard = (case.weights * items).mean()
        both = chunked(
            case.student,
            divergence,
            teacher,
            labels=case.labels,
            label_weight=0.6,
            divergence_weight=0.8,
            **settings,
        )
        assert_same(case, both.loss, 0.6 * hard + 0.8 * soft)
        torch.testing.assert_close(both.labels, 0.6 * hard.detach())
        torch.testing.assert_close(both.divergence, 0.8 * soft.detach())
        assert not both.labels.requires_grad
        assert not both.divergence.requires_grad


@every
def test_float32(divergence: Divergence) -> None:
    case = Case(rows=9, tokens=300, dtype=torch.float32)
    for teacher in (case.teacher, case.top(16)):
        found, wanted = chunked(case.student, divergence, teacher, rows=4), plain(case, divergence, teacher)
        assert found.loss.dtype == torch.float32
        assert_same(case, found.loss, wanted, 1e-5, 1e-4)


@given(seeds, st.integers(0, 12), st.integers(1, 40), st.integers(1, 13))
def test_any_shape_and_any_chunk(seed: int, rows: int, tokens: int, chunk: int) -> None:
    case = Case(rows, tokens, seed, bias=bool(seed % 2))
    hard = F.cross_entropy(logits(case.student), case.labels) if rows else 0.0
    for divergence in (JSD(0.3), ForwardKL()):
        for teacher in (case.teacher, case.top(min(3, tokens))):
            found = chunked(case.student, divergence, teacher, labels=case.labels, rows=chunk).loss
            assert_same(case, found, plain(case, divergence, teacher) + hard)


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()])
def test_chunks_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, divergence: Divergence) -> None:
    case = Case(rows=11)
    for teacher in (case.teacher, case.top(5)):
        whole = chunked(case.student, divergence, teacher).loss
        for chunk, block in ((46, 23), (70, 50), (1, 1)):
            with monkeypatch.context() as patch:
                patch.setattr("limbeck.losses.chunked.CHUNK", chunk)
                patch.setattr("limbeck.losses.chunked.BLOCK", block)
                patch.setattr("limbeck.losses.chunked.TOP_BLOCK", block)
                assert_same(case, chunked(case.student, divergence, teacher).loss, whole)


def test_what_is_kept_for_the_next_call_changes_nothing() -> None:
    small, large = Case(rows=3), Case(rows=9, tokens=40)
    release()
    fresh = [case.grads(chunked(case.student, JSD(0.4), case.teacher).loss) for case in (small, large)]
    assert (
        room("student", small.states.detach(), 9 * 40).data_ptr()
        == room("student", small.states.detach(), 1).data_ptr()
    )
    for case, wanted in zip((small, large), fresh, strict=True):
        found = case.grads(chunked(case.student, JSD(0.4), case.teacher).loss)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(room("other", small.states.detach(), CHUNK + 1)) == CHUNK + 1
    assert len(room("other", small.states.detach()[:0, 0], 0)) == 0


def test_a_call_in_inference_mode_leaves_nothing_behind() -> None:
    case = Case()
    release()
    with torch.inference_mode():
        chunked_items(case.student, ForwardKL(), case.teacher)
    assert_same(
        case, chunked(case.student, ForwardKL(), case.teacher).loss, plain(case, ForwardKL(), case.teacher)
    )


def test_a_tail_of_next_to_nothing_has_a_finite_gradient() -> None:
    states = torch.eye(2).requires_grad_()
    student = Hidden(states, Unembedding(torch.tensor([[0.0, 0.0], [-90.0, -90.0], [-120.0, -120.0]])))
    top = TopTokens(torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), 0.3).log())
    loss = chunked(student, ForwardKL(), top, divergence_weight=20.0).loss
    (found,) = torch.autograd.grad(loss, states)
    assert found.isfinite().all() and found.abs().max() > 1


@every
def test_where_every_known_token_is_banned_there_is_nothing(divergence: Divergence) -> None:
    case = Case()
    assert case.bias is not None
    top = replace(case.top(2), tail=False)
    with torch.no_grad():
        case.bias[top.ids[4]] = -torch.inf
    _, soft = chunked_items(case.student, divergence, top)
    assert soft[4] == 0 and soft.isfinite().all()
    found = case.grads(chunked(case.student, divergence, top).loss)
    assert all(g.isfinite().all() for g in found)
    assert not found[0][4].any()


def test_no_row_gives_zero_with_a_gradient() -> None:
    case = Case(rows=0)
    found = chunked(case.student, ForwardKL(), case.teacher, labels=case.labels)
    assert found.loss == 0
    assert [list(g.shape) for g in case.grads(found.loss)] == [[0, WIDTH], [23, WIDTH], [23]]
    assert not any(g.any() for g in case.grads(found.loss))


def test_labels_alone_are_cross_entropy() -> None:
    case = Case()
    found = chunked(case.student, labels=case.labels, label_weight=0.5, rows=2)
    assert_same(case, found.loss, 0.5 * F.cross_entropy(logits(case.student), case.labels))
    assert found.divergence == 0


def test_the_divisor_comes_from_outside() -> None:
    case = Case()
    whole = plain(case, ForwardKL(), case.teacher)
    for divisor in (14.0, torch.tensor(14)):
        found = chunked(case.student, ForwardKL(), case.teacher, divisor=divisor).loss
        assert_same(case, found, whole / 2)
    parts = []
    for part in (slice(0, 3), slice(3, 7)):
        own, other = (replace(x, states=x.states[part]) for x in (case.student, case.teacher))
        parts.append(chunked(own, ForwardKL(), other, divisor=7).loss)
    assert_same(case, parts[0] + parts[1], whole)


def test_items_carry_no_gradient_and_are_what_is_summed() -> None:
    case = Case()
    for teacher in (case.teacher, case.top(3)):
        hard, soft = chunked_items(case.student, ReverseKL(), teacher, labels=case.labels, rows=2)
        assert not hard.requires_grad
        assert not soft.requires_grad
        torch.testing.assert_close(
            hard, F.cross_entropy(logits(case.student), case.labels, reduction="none").detach()
        )
        weighted = chunked(case.student, ReverseKL(), teacher, weights=case.weights, divisor=1.0).loss
        torch.testing.assert_close((case.weights * soft).sum(), weighted.detach())
    assert not chunked_items(case.student, labels=case.labels)[1].any()


def test_only_what_asks_gets_a_gradient() -> None:
    case = Case()
    for asked in ((True, False), (False, True)):
        for leaf, ask in zip((case.states, case.weight), asked, strict=True):
            leaf.requires_grad_(ask)
            leaf.grad = None
        chunked(case.student, ForwardKL(), case.teacher).loss.backward()
        assert [leaf.grad is not None for leaf in (case.states, case.weight)] == list(asked)
    with torch.no_grad():
        assert not chunked(case.student, ForwardKL(), case.teacher).loss.requires_grad


def test_the_teacher_gets_no_gradient() -> None:
    case = Case()
    own = (case.teacher.states, case.teacher.unembedding.weight, case.teacher.unembedding.bias)
    for leaf in own:
        assert leaf is not None
        leaf.requires_grad_()
    chunked(case.student, ForwardKL(), case.teacher).loss.backward()
    assert all(leaf is not None and leaf.grad is None for leaf in own)
    known = case.top(3)
    known = replace(known, log_probs=known.log_probs.detach().requires_grad_())
    chunked(case.student, ForwardKL(), known).loss.backward()
    assert known.log_probs.grad is None


def test_backward_twice_and_scaled() -> None:
    case = Case()
    loss = chunked(case.student, ForwardKL(), case.teacher).loss
    once, scaled = case.grads(loss), case.grads(3 * loss)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, 3 * one)
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()
    for leaf, one in zip(case.leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * one)


def test_a_tied_head_adds_both_gradients() -> None:
    table = nn.Embedding(23, WIDTH).double()
    case, ids = Case(), torch.arange(7)

    def loss(kernel: bool) -> Tensor:
        student = Hidden(table(ids).tanh(), Unembedding(table.weight))
        if kernel:
            return chunked(student, ForwardKL(), case.teacher, rows=2).loss
        return token_divergence(ForwardKL(), logits(student), logits(case.teacher))

    (found,), (wanted,) = (torch.autograd.grad(loss(kernel), table.weight) for kernel in (True, False))
    torch.testing.assert_close(found, wanted)


def test_only_the_ids_that_both_know_count() -> None:
    case, longer = Case(), Case(tokens=29, seed=1)
    own, other = logits(case.student), logits(longer.teacher)[:, :23]
    found = chunked(case.student, JSD(), longer.teacher, labels=case.labels, vocabulary=23).loss
    wanted = token_divergence(JSD(), own, other) + F.cross_entropy(own, case.labels)
    assert_same(case, found, wanted)
    found = chunked(longer.student, JSD(), case.teacher, vocabulary=23).loss
    wanted = token_divergence(JSD(), logits(longer.student)[:, :23], logits(case.teacher))
    assert_same(longer, found, wanted)
    assert not longer.grads(found)[1][23:].any()
    with pytest.raises(ShapeError, match=r"29 tokens but 23 .* vocabulary"):
        chunked(case.student, JSD(), longer.teacher)
    with pytest.raises(ShapeError, match="23 tokens but 29"):
        chunked(longer.student, JSD(), case.teacher, vocabulary=29)


@every
def test_banned_tokens(divergence: Divergence) -> None:
    case = Case()
    with torch.no_grad():
        assert case.bias is not None
        assert case.teacher.unembedding.bias is not None
        case.bias[3], case.bias[5] = -torch.inf, torch.inf
        case.teacher.unembedding.bias[4:6] = -torch.inf
    found = chunked(case.student, divergence, case.teacher, rows=2).loss
    assert torch.isfinite(found)
    assert_same(case, found, plain(case, divergence, case.teacher))


def test_bf16_is_summed_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.losses.chunked.PART", 4 * WIDTH)  # weights are brought up in parts
    case = Case(rows=9, dtype=torch.bfloat16)
    full = Case(rows=9, dtype=torch.bfloat16)
    for name in ("states", "weight", "bias"):
        setattr(full, name, getattr(case, name).detach().float().requires_grad_())
    full.student = Hidden(full.states, Unembedding(full.weight, full.bias))
    head = case.teacher.unembedding
    assert head.bias is not None
    full.teacher = Hidden(case.teacher.states.float(), Unembedding(head.weight.float(), head.bias.float()))
    found = chunked(case.student, JSD(), case.teacher, labels=case.labels, rows=4).loss
    wanted = plain(full, JSD(), full.teacher) + F.cross_entropy(logits(full.student), case.labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    for mine, its in zip(case.grads(found), full.grads(wanted), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, its.bfloat16(), rtol=2**-7, atol=1e-6)


def test_autocast_takes_no_precision_away() -> None:
    case = Case(dtype=torch.float32)
    plainly = chunked(case.student, ForwardKL(), case.teacher).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert chunked(case.student, ForwardKL(), case.teacher).loss == plainly


def test_a_nan_is_seen() -> None:
    case = Case()
    with torch.no_grad():
        case.teacher.states[2, 0] = torch.nan
    assert chunked(case.student, ForwardKL(), case.teacher).loss.isnan()
    soft = chunked_items(case.student, ForwardKL(), case.teacher)[1]
    assert soft.isnan().tolist() == [row == 2 for row in range(7)]


def test_it_learns_what_the_plain_form_learns() -> None:
    seen = []
    for kernel in (True, False):
        case = Case(rows=16, seed=3)
        optimiser = torch.optim.Adam(case.leaves, lr=0.05)
        first = plain(case, ForwardKL(), case.teacher).item()
        for _ in range(30):
            optimiser.zero_grad()
            loss = (
                chunked(case.student, ForwardKL(), case.teacher, rows=5).loss
                if kernel
                else plain(case, ForwardKL(), case.teacher)
            )
            loss.backward()
            optimiser.step()
        seen.append(loss.item())
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
    assert seen[0] < 0.5 * first


def test_wrong_arguments_are_named() -> None:
    case = Case()

    def refused(error: type[Exception], match: str, *args: Any, **settings: Any) -> None:
        with pytest.raises(error, match=match):
            chunked(case.student, *args, **settings)

    refused(ConfigError, "teacher is None", ForwardKL())
    refused(ConfigError, "divergence is None", None, case.teacher)
    refused(ConfigError, "nothing to compute")
    refused(ShapeError, "labels", labels=case.labels[:3])
    refused(ShapeError, "weights", labels=case.labels, weights=case.weights[:3])
    refused(
        ShapeError, "teacher's states", ForwardKL(), replace(case.teacher, states=case.teacher.states[:3])
    )
    refused(ShapeError, "top tokens", ForwardKL(), case.top(3)[:3])
    with pytest.raises(ShapeError, match="student's states"):
        chunked(Hidden(case.states[None], case.student.unembedding), labels=case.labels)
