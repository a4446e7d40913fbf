"""A teacher with tokens of its own: matched by its sorted probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.objectives._shared import above, at_least
from limbeck.objectives._tokens import hidden_of


@dataclass(frozen=True, kw_only=True)
class ULD(Objective):
    """Universal logit distillation: the n-th token of either answer, its probabilities sorted downwards.

    No token's identity is seen, so that teacher and student may read different tokens: what is learnt is how
    sure the teacher is. Both tokenizers should cut the texts into pieces of about one length: else the n-th
    tokens are soon of different words. Holds the logits of both networks for all tokens of a batch.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        texts: it matches language models alone.
        aligns: teacher and student may have tokenizers of their own.
        weight: factor of the term, >= 0; 1.5 beside the labels in the official configuration.
        temperature: T > 0 of the student.
        teacher_temperature: T > 0 of the teacher.

    Raises:
        ConfigError: a field out of its range; ``terms`` with a teacher of whom only top tokens are kept.

    Source: Boizard et al., TMLR 2025 (arXiv 2402.12030); official configuration (Nicolas-BZRD/llm-recipes).
    Differs: see ``losses.uld``. Texts that are longer than a row are cut at a white space.
    """

    zero_at_teacher: ClassVar[bool] = True
    texts: ClassVar[bool] = True
    aligns: ClassVar[bool] = True

    weight: float = 1.5
    temperature: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("temperature", self.temperature, 0)
        above("teacher_temperature", self.teacher_temperature, 0)

    def needs(self) -> Needs:
        """What the teacher says of the next token; its logits are made of hidden states here."""
        return Needs(logits=False, tokens=None)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"uld": weight * mean over the texts of the mean over their tokens}``."""
        if teacher.top is not None:
            raise ConfigError(
                "objective uld sorts all of the teacher's probabilities, but only its top tokens are kept: "
                "set engine.cache_top_k to null"
            )
        read = batch if batch.other is None else batch.other
        loss = losses.uld(
            spread(logits_of(student), batch), spread(logits_of(teacher), read), answered(batch),
            answered(read), self.temperature, self.teacher_temperature,
            weights=None if batch.weight is None else spread(batch.weight, batch),
        )  # fmt: skip
        return {"uld": self.weight * loss}


def logits_of(outputs: Outputs) -> Tensor:
    """Logits [R, V] of a language model."""
    network = hidden_of(outputs)
    return network.unembedding.logits(network.states)


def spread(values: Tensor, batch: Batch) -> Tensor:
    """The rows [R, ...] at their places in [B, T, ...], 0 elsewhere."""
    assert batch.rows is not None
    flat = values.new_zeros(batch.inputs.numel(), *values.shape[1:])
    return flat.index_copy(0, batch.rows, values).reshape(*batch.inputs.shape, *values.shape[1:])


def answered(batch: Batch) -> Tensor:
    """True [B, T] where a token counts."""
    return spread(torch.ones_like(batch.labels, dtype=torch.bool), batch)
