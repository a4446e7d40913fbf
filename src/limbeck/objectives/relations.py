"""How the tokens of a text relate among themselves in the last attention layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress, Stateless
from limbeck.errors import ConfigError
from limbeck.losses.relation_heads import Form, Projections, relation_loss
from limbeck.objectives._shared import at_least, feature

QUERY = "model.layers.-1.self_attn.q_proj"
KEY = "model.layers.-1.self_attn.k_proj"
VALUE = "model.layers.-1.self_attn.v_proj"


@dataclass(frozen=True, kw_only=True)
class Relations(Objective):
    """Self-attention relations: the student's queries, keys and values relate as the teacher's do.

    Relations have no width, so that nothing is learnt to match networks of any two sizes, and no label is
    read. A token is related to those that it may read: of its own document, itself and those before it.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        betas: weights >= 0 of queries, keys and values.
        heads: relation heads of both networks, at most the width of the narrowest projection; None = the
            teacher's attention heads.
        form: ``softmax`` of the products over the tokens, or the ``raw`` products, as the official code has
            it.
        student_taps: module paths of the student's query, key and value projections.
        teacher_taps: of the teacher's; None = as the student's.

    Raises:
        ConfigError: a field out of its range, or a teacher that does not tell its number of heads.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), eq. 4 to 6.
    Differs: see ``losses.relation_heads.relation_losses``. The paper's teacher is a BERT, whose tokens read
    in both directions.
    """

    zero_at_teacher: ClassVar[bool] = True

    weight: float = 1.0
    betas: tuple[float, float, float] = (1.0, 1.0, 1.0)
    heads: int | None = None
    form: Form = "softmax"
    student_taps: tuple[str, str, str] = (QUERY, KEY, VALUE)
    teacher_taps: tuple[str, str, str] | None = None

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        for beta in self.betas:
            at_least("betas", beta, 0)
        if self.heads is not None and self.heads < 1:
            raise ConfigError(f"heads is {self.heads} but must be at least 1, or null for the teacher's own")

    def needs(self) -> Needs:
        """Three projections of each network; nothing of the next token."""
        return Needs(
            student=self.student_taps, teacher=self.teacher_taps or self.student_taps, teacher_logits=False,
            logits=False,
        )  # fmt: skip

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The objective with its number of heads."""
        heads = self.heads or attention_heads(facts.teacher)
        return Stateless(replace(self, heads=heads))

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"relations": weight * mean over the tokens that count}``."""
        assert self.heads is not None
        loss = relation_loss(
            projections("student", student, self.student_taps),
            projections("teacher", teacher, self.teacher_taps or self.student_taps),
            self.heads, betas=self.betas, mask=readable(batch), causal=batch.rows is not None, form=self.form,
            weights=by_token(batch),
        )  # fmt: skip
        return {"relations": self.weight * loss}


def projections(who: str, outputs: Outputs, taps: tuple[str, str, str]) -> Projections:
    """Queries, keys and values, each [B, T, W]."""
    query, key, value = (feature(who, outputs, tap) for tap in taps)
    return query, key, value


def readable(batch: Batch) -> Tensor | None:
    """Which tokens (asks, is asked for) may be related, [B, T, T]: one that counts, and one of its document.

    None where the batch is no text: all may.
    """
    if batch.rows is None:
        return None
    counts = torch.zeros(batch.inputs.numel(), dtype=torch.bool, device=batch.inputs.device)
    pairs = counts.index_fill(0, batch.rows, True).view_as(batch.inputs).unsqueeze(2)
    if batch.segments is None:
        return pairs.expand(-1, -1, batch.inputs.shape[1])
    return pairs & (batch.segments.unsqueeze(2) == batch.segments.unsqueeze(1))


def by_token(batch: Batch) -> Tensor | None:
    """The weights of a text's tokens that count, at their places [B, T]; those of other batches unchanged."""
    if batch.weight is None or batch.rows is None:
        return batch.weight
    flat = batch.weight.new_zeros(batch.inputs.numel())
    return flat.index_copy(0, batch.rows, batch.weight).view_as(batch.inputs)


def attention_heads(network: nn.Module | None) -> int:
    """How many attention heads a model of transformers has.

    Raises:
        ConfigError: the network does not tell.
    """
    for part in () if network is None else network.modules():
        heads = getattr(getattr(part, "config", None), "num_attention_heads", None)
        if heads is not None:
            return int(heads)
    raise ConfigError(
        "heads is null but the teacher does not tell how many attention heads it has: set objective.heads"
    )
