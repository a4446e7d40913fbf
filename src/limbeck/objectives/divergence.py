"""Any divergence of the next token from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from limbeck.contracts import Batch, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError, unknown
from limbeck.losses.chunked import chunked
from limbeck.losses.divergences import DIVERGENCES, Divergence
from limbeck.losses.top_tokens import TopTokens
from limbeck.objectives._shared import above, at_least
from limbeck.objectives._tokens import hidden_of, shared_vocabulary, taught


@dataclass(frozen=True, kw_only=True)
class TokenDivergence(Objective):
    """The student's next token as the teacher's, by any divergence, without ever holding the vocabulary.

    Reads hidden states and last layer of both language models, or the teacher's most probable tokens.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        texts: it matches language models alone.
        weight: factor of the term, >= 0.
        kind: a key of ``losses.divergences.DIVERGENCES``: forward_kl, reverse_kl, jsd, ...
        constants: the divergence's own, such as ``{beta: 0.1}`` of jsd; empty = its defaults.
        temperature: T > 0; divides the logits of both. 1 for a teacher of whom only ``top`` tokens are known.
        scale_by_t2: multiply the term by T², as Hinton's loss has it and those of language models do not.
        tail: where only the teacher's top tokens are known, the others are one more outcome; else both are
            normalised over the top ones, which holds back nothing else.

    Raises:
        ConfigError: a field out of its range, or no such divergence or constant.

    Source: each divergence's own: see ``losses.divergences``.
    """

    zero_at_teacher: ClassVar[bool] = True
    texts: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    kind: str = "forward_kl"
    constants: Mapping[str, float] = field(default_factory=dict, hash=False)
    temperature: float = 1.0
    scale_by_t2: bool = False
    tail: bool = True

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("temperature", self.temperature, 0)
        self.divergence()

    def divergence(self) -> Divergence:
        """What ``kind`` and ``constants`` name."""
        if self.kind not in DIVERGENCES:
            raise unknown("divergence", self.kind, DIVERGENCES)
        known = DIVERGENCES[self.kind].__dataclass_fields__
        for name in self.constants:
            if name not in known:
                raise unknown(f"constant of {self.kind}", name, known)
        return DIVERGENCES[self.kind](**self.constants)

    def needs(self) -> Needs:
        """What the teacher says of the next token; no logits."""
        return Needs(logits=False)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"divergence": weight * mean over the tokens that count}``."""
        other = taught(teacher)
        if isinstance(other, TopTokens):
            if self.temperature != 1:
                raise ConfigError(
                    f"temperature is {self.temperature}, but the teacher's top tokens are known at 1 alone: "
                    "set it to 1, or engine.cache_top_k to null"
                )
            other = TopTokens(other.ids, other.log_probs, tail=self.tail)
        factor = self.weight * (self.temperature**2 if self.scale_by_t2 else 1.0)
        found = chunked(
            hidden_of(student), self.divergence(), other, divergence_weight=factor, weights=batch.weight,
            temperature=self.temperature, vocabulary=shared_vocabulary(student, teacher),
        )  # fmt: skip
        return {"divergence": found.loss}
