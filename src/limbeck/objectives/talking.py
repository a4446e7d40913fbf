"""Talking Models: the student asks a frozen teacher about its own hidden state and uses the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Net, Objective, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.conversation import Conversation, Round, ending, passage, plain
from limbeck.objectives._shared import at_least, feature

SHARE = 0.1  # of the newest batch in the running average of the messages' variance


@dataclass(frozen=True, kw_only=True)
class Talking(Objective):
    """Messages through the teacher: what it knows is asked for in the student's words (Zhao et al. 2023).

    In each round the student's lower state becomes a message, the message a lower state of the teacher; its
    upper layers read on, and what they make becomes the message back and the student's upper state, from
    which the student answers. Both networks may have other classes, and the teacher need not understand the
    student's inputs. The labels of the student's own answer are the objective ``labels``. When the student
    is used, nobody talks.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        interact: factor of the cross entropy of the answers, >= 0.
        message: factor of the mean squared difference between question and answer, >= 0.
        state: factor of that between the student's upper state as answered and its own, >= 0.
        ground: factor of that between the teacher's state as asked and its own on the same sample, >= 0.
        rounds: how often the student asks; 0 = never.
        width: of the messages.
        hidden: width of the hidden layer of each encoder and decoder; None = each is one linear map.
        student_low: module path of the student's lower state.
        student_high: of its upper state.
        teacher_low: of the teacher's lower state.
        teacher_high: of its upper state.

    Raises:
        ConfigError: a field out of its range, or networks that cannot be run from within.
        ShapeError: ``build`` finds no such state.

    Source: Zhao et al. 2023 (arXiv 2310.03188), from its abstract and reviews.
    Differs: wiring, distances and defaults are a reconstruction; no code and no full text were at hand.
    """

    zero_at_teacher: ClassVar[bool] = False

    interact: float = 1.0
    message: float = 0.1
    state: float = 0.1
    ground: float = 0.0
    rounds: int = 1
    width: int = 32
    hidden: int | None = None
    student_low: str = "blocks.3"
    student_high: str = "blocks.7"
    teacher_low: str = "blocks.3"
    teacher_high: str = "blocks.7"

    def __post_init__(self) -> None:
        for name in ("interact", "message", "state", "ground", "rounds"):
            at_least(name, getattr(self, name), 0)
        at_least("width", self.width, 1)
        if self.hidden is not None:
            at_least("hidden", self.hidden, 1)

    def needs(self) -> Needs:
        """Two taps in each network; no teacher logits."""
        return Needs(
            student=(self.student_low, self.student_high),
            teacher=(self.teacher_low, self.teacher_high),
            teacher_logits=False,
        )

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The encoders and decoders, drawn from torch's global generator."""
        if facts.student is None or facts.teacher is None:
            raise ConfigError("talking runs both networks from within: give build their facts")
        own, other = self.needs().student, self.needs().teacher
        states = [hidden_state("student", student, tap) for tap in own]
        states += [hidden_state("teacher", teacher, tap) for tap in other]
        shapes = [state.shape[1:] for state in states]
        return Talk(self, shapes, facts.student, facts.teacher).to(states[0].device)


class Talk(nn.Module):
    """``Talking`` at work.

    Attributes:
        variance: running average of the variance of questions and answers over a batch; 0 where messages
            have collapsed and say nothing.
    """

    variance: Tensor

    def __init__(self, objective: Talking, shapes: list[torch.Size], student: Net, teacher: Net) -> None:
        super().__init__()
        self.objective = objective
        self.conversation = Conversation(
            *shapes, width=objective.width, rounds=objective.rounds, hidden=objective.hidden
        )
        self._nets = student, teacher  # in a tuple: they are the scenario's
        for net in self._nets:
            plain(net)
        self.register_buffer("variance", torch.zeros(2))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``interact``, ``message`` and ``state`` of each round by its number, and ``ground`` where asked."""
        ask, (own, other) = self.objective, self._nets
        low = hidden_state("student", student, ask.student_low)
        rounds = self.conversation(
            low if ask.rounds == 0 else low.to(self._dtype()),
            passage(other, batch, ask.teacher_low, ask.teacher_high),
            ending(own, batch, ask.student_high),
        )
        self._watch(rounds)
        terms: dict[str, Tensor] = {}
        for number, said in enumerate(rounds, 1):
            terms |= {f"{name}{number}": term for name, term in self._terms(said, student, teacher, batch)}
        return terms

    def _terms(
        self, said: Round, student: Outputs, teacher: Outputs, batch: Batch
    ) -> list[tuple[str, Tensor]]:
        ask, weights = self.objective, batch.weight
        high = hidden_state("student", student, ask.student_high)
        found = [
            ("interact", ask.interact * self.task(said.logits, student, batch)),
            ("message", ask.message * losses.mutual_mse(said.question, said.answer, weights=weights)),
            ("state", ask.state * losses.mutual_mse(said.state, high, weights=weights)),
        ]
        if ask.ground:
            theirs = hidden_state("teacher", teacher, ask.teacher_low)
            found.append(("ground", ask.ground * losses.hint_mse(said.posed, theirs, weights=weights)))
        return found

    def task(self, logits: Tensor, student: Outputs, batch: Batch) -> Tensor:
        """The loss of an answer [B, C]: cross entropy. Another task overrides this alone.

        Raises:
            ShapeError: the student is looked at through a window of its classes.
        """
        if logits.shape != student.logits.shape:
            raise ShapeError(
                f"an answer has {logits.shape[1]} classes but the task {student.logits.shape[1]}: talking "
                "needs scenario static"
            )
        return losses.cross_entropy(logits, batch.labels, mask=batch.labelled, weights=batch.weight)

    def facts(self) -> dict[str, Any]:
        """The messages' variance, for ``result.json``."""
        question, answer = self.variance.tolist()
        return {"message_variance": {"question": question, "answer": answer}}

    @torch.no_grad()
    def _watch(self, rounds: list[Round]) -> None:
        if rounds:
            both = (rounds[-1].question, rounds[-1].answer)
            now = torch.stack([m.float().var(0, unbiased=False).mean() for m in both])
            self.variance.lerp_(now, SHARE)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def hidden_state(who: str, outputs: Outputs, tap: str) -> Tensor:
    """The state tapped at ``tap`` as the network gave it.

    Raises:
        ShapeError: the network gave no such state.
    """
    feature(who, outputs, tap)
    return outputs.features[tap]
