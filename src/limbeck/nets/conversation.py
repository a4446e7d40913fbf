"""Two networks that talk: a student asks by its hidden state, a teacher reads on and answers.

B batch, M message width. A hidden state of any shape [B, ...] is read and written as one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.contracts import Batch, Net
from limbeck.errors import ConfigError
from limbeck.nets.edited import edited
from limbeck.nets.taps import capture

Shape = Sequence[int]
Passage = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Round:
    """One question and its answer.

    Attributes:
        question: the student's message [B, M].
        posed: the teacher's lower state that the question became.
        answer: the teacher's message [B, M].
        state: the student's upper state that the answer became.
        logits: [B, C] that the student makes of it.
    """

    question: Tensor
    posed: Tensor
    answer: Tensor
    state: Tensor
    logits: Tensor


class Conversation(nn.Module):
    """The encoders and decoders between two networks.

    Args:
        low: shape of the student's lower state, without the batch.
        high: of its upper state.
        teacher_low: of the teacher's lower state.
        teacher_high: of its upper state.
        width: M.
        rounds: how often the student asks.
        hidden: width of the hidden layer of each coder; None = each is one linear map.

    Source: Talking Models (arXiv 2310.03188), section 3, from its abstract and reviews.
    """

    def __init__(
        self, low: Shape, high: Shape, teacher_low: Shape, teacher_high: Shape, *, width: int, rounds: int,
        hidden: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rounds, self.high, self.teacher_low = rounds, tuple(high), tuple(teacher_low)
        if rounds == 0:
            return
        self.encode = coder(prod(low), width, hidden)
        self.encode_again = coder(prod(high), width, hidden) if rounds > 1 else None
        self.teacher_decode = coder(width, prod(teacher_low), hidden)
        self.teacher_encode = coder(prod(teacher_high), width, hidden)
        self.decode = coder(width, prod(high), hidden)

    def forward(self, low: Tensor, middle: Passage, top: Passage) -> list[Round]:
        """The rounds, in order.

        Args:
            low: the student's lower state [B, ...].
            middle: from the teacher's lower state to its upper one.
            top: from the student's upper state to its logits.
        """
        found: list[Round] = []
        for number in range(self.rounds):
            asks = self.encode if self.encode_again is None or number == 0 else self.encode_again
            question = asks((found[-1].state if found else low).flatten(1))
            posed = self.teacher_decode(question).reshape(-1, *self.teacher_low)
            answer = self.teacher_encode(middle(posed).flatten(1))
            state = self.decode(answer).reshape(-1, *self.high)
            found.append(Round(question, posed, answer, state, top(state)))
        return found


def coder(width: int, to: int, hidden: int | None) -> nn.Module:
    """A linear map, or a perceptron with one hidden layer."""
    if hidden is None:
        return nn.Linear(width, to)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, to))


def plain(net: nn.Module) -> nn.Module:
    """The plain module inside ``net``, whose paths taps name.

    Raises:
        ConfigError: it holds none.
    """
    at = net
    while isinstance(at, Net):
        inner = getattr(at, "network", None) or getattr(at, "inner", None)
        if inner is None:
            raise ConfigError(
                f"{type(at).__name__} does not run block by block as it is: messages need a network such as "
                "mlp, cnn, cifar_resnet, timm or module"
            )
        at = inner
    return at


def passage(net: nn.Module, batch: Batch, start: str, stop: str) -> Passage:
    """What ``net`` makes at ``stop`` of a state put at ``start``, in evaluation mode.

    The part before ``start`` runs on ``batch`` and is not heard. Gradients pass through; no parameter is
    asked to stand still here.
    """
    body = plain(net).eval()

    def middle(state: Tensor) -> Tensor:
        with edited(body, {start: lambda _: state}), capture(body, (stop,)) as features:
            body(batch.inputs)
        return features[stop]

    return middle


def ending(net: Net, batch: Batch, start: str) -> Passage:
    """The logits that ``net`` gives for a state put at ``start``; its batch norms keep their averages."""
    body = plain(net)

    def top(state: Tensor) -> Tensor:
        with still(body), edited(body, {start: lambda _: state}):
            logits: Tensor = net(batch).logits
        return logits

    return top


@contextmanager
def still(network: nn.Module) -> Iterator[None]:
    """Within the context, batch norms normalise as they do and take nothing into their averages."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
