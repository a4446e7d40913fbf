"""Several teachers that teach as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import Batch, Net, Outputs, Spec, Teacher
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.wrapped import stands_still


@dataclass(frozen=True, kw_only=True)
class Ensemble(Teacher):
    """Several teachers whose probabilities are mixed, or of whom the surest answers.

    ``logits`` are log-probabilities; each member's own answer is the path of its number, ``"0"`` etc.
    A tap is a member's number and its path there: ``0.hidden.-1``. Members that learn are trained together,
    each on the labels by itself.

    Attributes:
        members: the teachers.
        weights: of the members' probabilities, or of their sureness where one is picked, > 0; None = equal.
        route: ``average`` mixes the probabilities; ``confident`` takes for each sample the answer of the
            member whose largest probability, times its weight, is the largest.

    Raises:
        ConfigError: fewer than two members, or weights that are not theirs; from ``input_spec`` and
            ``lessons`` that members read other images, or learn from other data.

    Source: mixed probabilities: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 3.
    """

    members: tuple[Teacher, ...]
    weights: tuple[float, ...] | None = None
    route: Literal["average", "confident"] = "average"

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ConfigError(f"members has {len(self.members)} teacher: an ensemble needs at least 2")
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ConfigError(
                f"weights has {len(self.weights)} numbers but there are {len(self.members)} members: "
                "give one for each"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights or ()):
            raise ConfigError(f"weights is {list(self.weights or ())}: allowed are finite values above 0")

    @property
    def learns(self) -> bool:  # type: ignore[override]  # that of the members
        """Whether any member is trained on labels before it teaches."""
        return any(member.learns for member in self.members)

    def lessons(self) -> Any:
        """See ``Teacher.lessons``; members that learn nothing have no say."""
        first, *others = [member.lessons() for member in self.members if member.learns] or [None]
        if any(other != first for other in others):
            raise ConfigError("members learn from different data but are trained together: give all the same")
        return first

    def input_spec(self) -> Any:
        """See ``Network.input_spec``."""
        first, *others = (member.input_spec() for member in self.members)
        for number, other in enumerate(others, 1):
            if other != first:
                raise ConfigError(
                    f"member 0 reads {first} and member {number} reads {other}: take members for one kind of "
                    "image"
                )
        return first

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        return Committee(self, [member.build(spec, generator) for member in self.members])


class Committee(Net):
    """The built members."""

    shares: Tensor

    def __init__(self, choice: Ensemble, members: list[Net]) -> None:
        super().__init__()
        self.route = choice.route
        for net in members:
            stands_still(net)
        self.members = nn.ModuleList(members)
        self.query_dim = next((net.query_dim for net in members if net.query_dim is not None), None)
        weights = torch.tensor(choice.weights or (1.0,) * len(members))
        self.register_buffer("shares", (weights / weights.sum()).log(), persistent=False)

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """The common answer, and each member's as a path.

        Raises:
            ShapeError: a tap of no member.
        """
        own = {number: self._taps(number, taps) for number in range(len(self.members))}
        said: list[Outputs] = [net(batch, own[n], teacher) for n, net in enumerate(self.members)]
        if stray := [tap for tap in taps if not any(tap.startswith(f"{n}.") for n in own)]:
            raise ShapeError(
                f"tap {stray[0]!r} is of no member: begin it with a member's number, 0 to {len(own) - 1}"
            )
        answers = torch.stack([F.log_softmax(losses.full_precision(out.logits), dim=1) for out in said])
        features = {f"{n}.{tap}": x for n, out in enumerate(said) for tap, x in out.features.items()}
        paths = {str(n): Outputs(answer) for n, answer in enumerate(answers)}
        mixed = self._mixed(answers)
        if not self.training:
            return Outputs(mixed, features=features, paths=paths)
        own_terms = dict(self._lessons(said, batch))
        return Outputs(mixed.detach(), features=features, losses=own_terms, paths=paths)

    def _taps(self, number: int, taps: tuple[str, ...]) -> tuple[str, ...]:
        start = f"{number}."
        return tuple(tap.removeprefix(start) for tap in taps if tap.startswith(start))

    def _mixed(self, answers: Tensor) -> Tensor:
        """Log-probabilities [B, C] of the members' [M, B, C]."""
        if self.route == "average":
            return (answers + self.shares[:, None, None]).logsumexp(0)
        surest = (answers.amax(2) + self.shares[:, None]).argmax(0)
        return answers.gather(0, surest[None, :, None].expand(1, -1, answers.shape[2]))[0]

    def _lessons(self, said: list[Outputs], batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """The labels for each member that learns, and its own terms."""
        for number, (net, out) in enumerate(zip(self.members, said, strict=True)):
            if any(p.requires_grad for p in net.parameters()):
                yield f"member{number}", losses.cross_entropy(out.logits, batch.labels, mask=batch.labelled)
                yield from ((f"member{number}.{name}", term) for name, term in out.losses.items())

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """See ``Net.start_task``."""
        for net in self._nets():
            net.start_task(task, generator)

    def finish_task(self) -> None:
        """See ``Net.finish_task``."""
        for net in self._nets():
            net.finish_task()

    def _nets(self) -> Iterator[Net]:
        for net in self.members:
            assert isinstance(net, Net)
            yield net
