"""The student's own texts, rewarded by what the teacher holds of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.contracts import Batch, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.losses.chunked import Hidden, chunked, chunked_items
from limbeck.losses.divergences import ReverseKL
from limbeck.losses.on_policy import DRAWN, minillm_advantage, minillm_reward
from limbeck.objectives._shared import above, at_least
from limbeck.objectives._tokens import hidden_of, shared_vocabulary


@dataclass(frozen=True, kw_only=True)
class MiniLLM(Objective):
    """Reverse KL of whole texts, by policy gradient on what the student writes (``scenario.writing``).

    The gradient has two parts. The one through the next token alone is reverse KL at each place, summed over
    the vocabulary exactly. The other rewards a token for what the teacher holds of the tokens behind it, more
    than the student does. Both weigh a token by how much more often the student writes it than it was drawn,
    which lets a teacher take part in the writing (``writing.teacher_mix``), and the texts be some steps old.
    A batch that nobody wrote is learnt from its labels: language modelling beside the rewards, for which
    ``writing.share`` below 1 leaves room.

    Attributes:
        zero_at_teacher: whether all terms of a written batch are 0 where both networks give the same.
        texts: it matches language models alone.
        on_policy: it learns from texts that the student writes.
        weight: factor of both parts, >= 0.
        labels: factor of the language modelling, >= 0.
        gamma: γ in [0, 1] of the rewards of later tokens; 0 leaves out all of them.
        length_normalised: divide the rewards by the number of tokens left: without it short texts are
            preferred.
        clip: ε > 0; a token's weight in the second part counts within 1 - ε .. 1 + ε, as in PPO.
        from_here: let a token's own reward count in the second part too, as the official code does.
        centred: take the mean over the batch from the rewards, which changes no expectation but the noise.

    Raises:
        ConfigError: a field out of its range; ``terms`` with a teacher whose top tokens alone are known.

    Source: Gu et al., ICLR 2024 (arXiv 2306.08543), sections 2.1 and 2.2, algorithm 1.
    Differs: the mean over tokens, not over texts of their sums. Language modelling takes turns with the
    rewards, batch by batch, and is on the same data. Each text is learnt from once.
    """

    zero_at_teacher: ClassVar[bool] = True
    texts: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True

    weight: float = 1.0
    labels: float = 1.0
    gamma: float = 1.0
    length_normalised: bool = True
    clip: float = 0.2
    from_here: bool = False
    centred: bool = False

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("labels", self.labels, 0)
        above("clip", self.clip, 0)
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma is {self.gamma} but must lie in [0, 1]")

    def needs(self) -> Needs:
        """What the teacher says of the next token; no logits."""
        return Needs(logits=False, tokens=None)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"single": ..., "long": ...}`` of a written batch; ``{"labels": ...}`` of another."""
        if teacher.top is not None:
            raise ConfigError(
                "minillm asks the teacher of every token that the student writes, but only its top tokens "
                "are known: set engine.cache_top_k to null, or take a teacher that is not served"
            )
        own, other = hidden_of(student), hidden_of(teacher)
        if DRAWN not in batch.marks:
            found = chunked(own, labels=batch.labels, weights=batch.weight)
            return {"labels": self.labels * found.loss}
        room = shared_vocabulary(student, teacher)
        log_q, log_p = (-chunked_items(net, labels=batch.labels, vocabulary=room)[0] for net in (own, other))
        ratio = (log_q - batch.marks[DRAWN]).exp()
        advantage = self.advantage(log_q, log_p, batch)
        counts = torch.ones_like(ratio) if batch.weight is None else batch.weight
        single = chunked(own, ReverseKL(), other, weights=counts * ratio, vocabulary=room).loss
        slope = counts * advantage * self.unclipped(ratio, advantage)
        return {"single": self.weight * single, "long": self.weight * self.policy(own, batch, slope, room)}

    def advantage(self, log_q: Tensor, log_p: Tensor, batch: Batch) -> Tensor:
        """What the tokens behind each one are worth [R]."""
        assert batch.rows is not None
        shape = batch.inputs.shape
        reward, counts = (log_q.new_zeros(batch.inputs.numel()) for _ in range(2))
        reward[batch.rows], counts[batch.rows] = minillm_reward(log_q, log_p), 1
        whole = minillm_advantage(
            reward.reshape(shape), counts.reshape(shape), gamma=self.gamma,
            length_normalised=self.length_normalised,
        )  # fmt: skip
        if not self.from_here:
            whole = self.gamma * torch.nn.functional.pad(whole[:, 1:], (0, 1))
            whole = whole * torch.nn.functional.pad(counts.reshape(shape)[:, 1:], (0, 1))
        found = whole.flatten()[batch.rows]
        return found - found.mean() if self.centred else found

    def unclipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """PPO's weight [R] of log q in the gradient: the ratio, or 0 where it went far enough already."""
        far = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        return torch.where(far, 0.0, ratio)

    def policy(self, own: Hidden, batch: Batch, slope: Tensor, room: int | None) -> Tensor:
        """-Σ slope · log q / R of the written tokens, in which ``slope`` [R] may be negative."""
        return chunked(own, labels=batch.labels, weights=slope, vocabulary=room).loss
