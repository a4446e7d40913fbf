"""Token losses that never hold the vocabulary: hidden states and unembedding in, loss and gradients out.

The R counted tokens go chunk by chunk through both unembeddings, once each. Within a chunk a few rows at a
time, so that they stay in the processor's cache, become the gradient of the logits in closed form
(``Divergence.slope``), which takes the logits' place. Gradients are summed up in the forward pass and scaled
in the backward pass: the memory is that of a chunk, of what learns, and of a few numbers per row.

The plain forms on whole logits are the oracle: ``token_divergence``, ``top_divergence``, ``cross_entropy``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses.divergences import Divergence, ForwardKL, Pair, centred, seen
from limbeck.losses.in_place import forward_kl, top_values
from limbeck.losses.reduction import exactly, full_precision
from limbeck.losses.top_tokens import TopTokens, same_positions

if TYPE_CHECKING:
    from limbeck.contracts import Unembedding

CHUNK = 2**24  # logits of one network in a chunk: enough rows that the products take most of the time
BLOCK = 2**17  # logits of one network in a block: a few such tensors fit a core's own cache
TOP_BLOCK = 2**20  # the same of a teacher of top tokens alone, which many rows together make worth a call
PART = 2**22  # numbers of a weight that are brought to full precision at a time


class _Kept(threading.local):
    """What ``room`` keeps."""

    def __init__(self) -> None:
        self.rooms: dict[tuple[str, torch.dtype], Tensor] = {}


_KEPT = _Kept()


@dataclass(frozen=True, eq=False)
class Hidden:
    """What a network's last layer reads, and that layer.

    Attributes:
        states: hidden states [R, D].
        unembedding: with weight [V, D].
    """

    states: Tensor
    unembedding: Unembedding


class Terms(NamedTuple):
    """The parts of a token loss, weighted.

    Attributes:
        loss: the sum of both, a scalar that carries the gradient of both.
        labels: the cross entropy of the labels, without gradient.
        divergence: the divergence from the teacher, without gradient.
    """

    loss: Tensor
    labels: Tensor
    divergence: Tensor


def chunked(
    student: Hidden,
    divergence: Divergence | None = None,
    teacher: Hidden | TopTokens | None = None,
    *,
    labels: Tensor | None = None,
    label_weight: float = 1.0,
    divergence_weight: float = 1.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    divisor: Tensor | float | None = None,
    vocabulary: int | None = None,
    rows: int | None = None,
) -> Terms:
    """Σ_r w_r (a · cross entropy of the label + b · divergence from the teacher) / divisor, with gradients.

    Gradient reaches the student's states, weight and bias, where they ask for it, and never the teacher. NaN
    stays NaN. An infinite bias bans its token, with what ``token_divergence`` says of infinite logits.

    Args:
        student: R rows, of width D_s.
        divergence: b's part; with it goes a teacher.
        teacher: the same rows, of a width of their own, or its top tokens (see ``top_divergence``).
        labels: the next tokens [R] int64, for a's part; None = no such part. Their range is not checked.
        label_weight: a.
        divergence_weight: b.
        temperature: T > 0 of the divergence, on both sides; the labels' is 1. Nothing is multiplied by T².
        weights: w >= 0, [R]; None = 1.
        divisor: None = R.
        vocabulary: how many ids, counted from 0, the networks and labels agree on, where a network has more:
            the others are left out of every softmax. None = both have V.
        rows: of a chunk; None = as many as memory is meant for.

    Returns:
        The terms; for R = 0 they are 0, with a gradient of zeros.

    Raises:
        ShapeError: rows, widths or vocabularies that do not fit.
        ConfigError: a divergence without a teacher, or the reverse; or nothing to compute.
    """
    factors = (label_weight, divergence_weight)
    job = _Job(student, divergence, teacher, labels, temperature, vocabulary, rows, factors)
    states, head = student.states, student.unembedding
    scale = torch.ones(len(states), device=states.device) if weights is None else weights.detach()
    if scale.shape != states.shape[:1]:
        raise ShapeError(
            f"weights are {list(scale.shape)} but there are {len(states)} rows: give one for each"
        )
    scale = scale.to(job.dtype) / (max(len(states), 1) if divisor is None else divisor)
    return Terms(*_Chunked.apply(states, head.weight, head.bias, scale, job))  # type: ignore[no-untyped-call]


@torch.no_grad()
def chunked_items(
    student: Hidden,
    divergence: Divergence | None = None,
    teacher: Hidden | TopTokens | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``chunked`` sums up, for those that weigh or choose tokens: without weights and without gradient.

    Args:
        student, divergence, teacher, labels, temperature, vocabulary, rows: see ``chunked``.

    Returns:
        (cross entropy of the labels, divergence from the teacher), each [R]; zeros where not asked for.

    Raises:
        ShapeError, ConfigError: see ``chunked``.
    """
    return _Job(student, divergence, teacher, labels, temperature, vocabulary, rows).run()


class _Chunked(torch.autograd.Function):
    """The loss and its two parts, with gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (states, weight, bias)
        sums = [
            torch.zeros_like(x, dtype=job.dtype) if x is not None and asked else None
            for x, asked in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        items = job.run(scale, sums)
        labels, divergence = (f * (scale * i).sum() for f, i in zip(job.factors, items, strict=True))
        ctx.mark_non_differentiable(labels, divergence)
        ctx.save_for_backward(
            *(None if g is None or x is None else g.to(x.dtype) for g, x in zip(sums, inputs, strict=True))
        )
        return labels + divergence, labels, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        # Mostly backward() is called on the loss itself, and nothing needs a scaled copy. A CPU can be asked
        # that for nothing; any other device would have to be waited for.
        if upstream.device.type != "cpu" or upstream.item() != 1:
            found = tuple(None if g is None else g * upstream.to(g.dtype) for g in found)
        return (*found, None, None)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is computed; see ``chunked``. ``factors`` are those of labels and divergence."""

    student: Hidden
    divergence: Divergence | None
    teacher: Hidden | TopTokens | None
    labels: Tensor | None
    temperature: float
    vocabulary: int | None
    rows: int | None
    factors: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        _check_parts(self.divergence, self.teacher, self.labels)
        _check_shapes(self.student, self.teacher, self.labels, self.vocabulary)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 where the student's states are."""
        return full_precision(self.student.states[:0]).dtype

    def run(self, scale: Tensor | None = None, sums: Sequence[Tensor | None] = ()) -> tuple[Tensor, Tensor]:
        """Both values, each [R]. Gradients, each row's times its ``scale`` [R], are added to ``sums``."""
        if all(x is None for x in sums):
            scale = None
        states, columns = self.student.states, max(_columns(self.student, self.vocabulary), 1)
        rows = max(min(self.rows or CHUNK // columns, len(states)), 1)
        block = max((TOP_BLOCK if isinstance(self.teacher, TopTokens) else BLOCK) // columns, 1)
        block = block if states.device.type == "cpu" else rows
        own, other = _Layer("student", self.student, columns, rows, self.dtype), None
        if isinstance(self.teacher, Hidden):
            other = _Layer("teacher", self.teacher, columns, rows, self.dtype)
        lost = _either(own.banned, None if other is None else other.banned)
        found = torch.zeros(2, len(states), dtype=self.dtype, device=states.device)
        with exactly(states):
            for chunk in _slices(len(states), rows):
                logits, labels = own.logits(chunk), None if self.labels is None else self.labels[chunk]
                taught = self._taught(chunk) if other is None else other.logits(chunk)
                for at in _slices(len(logits), block):
                    found[:, chunk][:, at] = self._block(
                        own,
                        logits[at],
                        None if taught is None else taught[at],
                        None if labels is None else labels[at],
                        lost,
                        None if scale is None else own.scale * scale[chunk][at, None],
                    )
                if scale is not None:
                    own.add(chunk, logits, sums)
        return found[0], found[1]

    def _taught(self, chunk: slice) -> TopTokens | None:
        return self.teacher[chunk] if isinstance(self.teacher, TopTokens) else None

    def _block(
        self,
        own: _Layer,
        logits: Tensor,
        taught: Tensor | TopTokens | None,
        labels: Tensor | None,
        lost: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        """Both values [2, r]. The gradient [r, V] of their weighted sum in the products of states and weight,
        times ``scale`` [r, 1], takes the place of ``logits``."""
        if own.cap is None and (self.temperature == 1 or labels is None) and lost is None:
            at = self.temperature
            if self.divergence == ForwardKL() and isinstance(taught, Tensor):
                return forward_kl(logits, taught, at, scale=scale, labels=labels, factors=self.factors)
            if self.divergence is not None and isinstance(taught, TopTokens):
                return top_values(
                    self.divergence, logits, taught, at, scale=scale, labels=labels, factors=self.factors
                )
        found, slope = self._apart(logits, taught, labels, lost, sloped=scale is not None)
        if scale is not None and slope is not None:
            own.replace(logits, slope, scale)
        return found

    def _apart(
        self,
        logits: Tensor,
        taught: Tensor | TopTokens | None,
        labels: Tensor | None,
        lost: Tensor | None,
        *,
        sloped: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Both values [2, r] and the gradient [r, V] of the weighted sum in the student's logits."""
        found, slope = logits.new_zeros(2, len(logits)), None
        tempered = None
        if self.divergence is not None and isinstance(taught, TopTokens):
            copy = logits.clone()
            ones = logits.new_ones(len(logits), 1) if sloped else None
            found[1] = top_values(self.divergence, copy, taught, self.temperature, scale=ones)[1]
            slope = copy.mul_(self.factors[1]) if sloped else None
        elif self.divergence is not None and isinstance(taught, Tensor):
            tempered = _log_softmax(logits, self.temperature)
            found[1], slope = _divergence(
                self.divergence, tempered, taught, self.temperature, lost, sloped=sloped
            )
            if slope is not None and self.factors[1] != self.temperature:
                slope.mul_(self.factors[1] / self.temperature)
        if labels is not None:
            log_q = tempered if tempered is not None and self.temperature == 1 else logits.log_softmax(-1)
            found[0] = -log_q.gather(-1, labels[:, None])[:, 0]
            if sloped:
                hard = log_q.exp_().scatter_add_(-1, labels[:, None], log_q.new_full((len(labels), 1), -1.0))
                hard.mul_(self.factors[0])
                slope = hard if slope is None else slope.add_(hard)
        return found, slope


class _Layer:
    """One network's way from hidden states to logits and back, in full precision."""

    def __init__(self, name: str, network: Hidden, columns: int, rows: int, dtype: torch.dtype) -> None:
        head = network.unembedding
        self.states, self.weight = network.states.detach(), head.weight.detach()[:columns]
        self.bias = None if head.bias is None else head.bias.detach()[:columns].to(dtype)
        if self.bias is not None:
            self.bias = self.bias.masked_fill(self.bias.isinf(), -torch.inf)
        self.scale, self.cap, self.dtype = head.scale, head.cap, dtype
        self.buffer = room(name, self.states.new_empty(0, dtype=dtype), rows * columns).view(rows, columns)

    @property
    def banned(self) -> Tensor | None:
        """The tokens [V] whose logits are infinite; None = there are none."""
        banned = None if self.bias is None or self.cap is not None else self.bias.isinf()
        return banned if banned is not None and banned.any() else None

    def logits(self, chunk: slice) -> Tensor:
        """Logits [n, V] of the rows of a chunk, in a place that the next chunk takes again."""
        states = self.states[chunk].to(self.dtype)
        found = self.buffer[: len(states)]
        for columns, weight in self._weights():
            torch.mm(states, weight.mT, out=found[:, columns])
        if self.bias is not None:
            found.add_(self.bias)
        if self.scale != 1:
            found.mul_(self.scale)
        return found if self.cap is None else found.div_(self.cap).tanh_().mul_(self.cap)

    def replace(self, logits: Tensor, slope: Tensor, scale: Tensor) -> None:
        """Put into the place of ``logits`` [r, V] the products' gradient, times ``scale`` [r, 1]."""
        if self.cap is not None:
            slope.addcmul_(slope, (logits / self.cap).square_(), value=-1)
        torch.mul(slope, scale, out=logits)

    def add(self, chunk: slice, slope: Tensor, sums: Sequence[Tensor | None]) -> None:
        """Add to the gradients of states, weight and bias what comes from a chunk's ``slope`` [n, V]."""
        states, weight, bias = sums
        if states is not None:
            for columns, part in self._weights():
                states[chunk].addmm_(slope[:, columns], part)
        if weight is not None:
            weight[: slope.shape[1]].addmm_(slope.mT, self.states[chunk].to(self.dtype))
        if bias is not None:
            bias[: slope.shape[1]].add_(slope.sum(0))

    def _weights(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight, whole, or else in parts that are brought to full precision one at a time."""
        count, width = self.weight.shape
        for part in _slices(count, count if self.weight.dtype == self.dtype else max(PART // width, 1)):
            yield part, self.weight[part].to(self.dtype)


def room(name: str, like: Tensor, count: int) -> Tensor:
    """``count`` numbers for ``name`` to write into, of the type and on the device of ``like``.

    On a CPU this thread keeps it for the next call, up to the size of a chunk: of memory that is fresh from
    the system, every page costs as much as some hundred logits. ``release`` gives it back.
    """
    if type(like) is not Tensor or like.device.type != "cpu" or count > CHUNK:
        return like.new_empty(count)
    key = (name, like.dtype)
    kept = _KEPT.rooms.get(key)
    if kept is None or len(kept) < count:
        with torch.inference_mode(False):  # what is made in that mode could not be written into outside
            kept = _KEPT.rooms[key] = like.new_empty(count)
    return kept[:count]


def release() -> None:
    """Give back the memory that this thread keeps from call to call: that of a chunk of each network, in each
    type that was computed in."""
    _KEPT.rooms.clear()


def _divergence(
    divergence: Divergence,
    log_q: Tensor,
    taught: Tensor,
    temperature: float,
    lost: Tensor | None,
    *,
    sloped: bool,
) -> tuple[Tensor, Tensor | None]:
    """A divergence's values [r] and, where it is asked for, its gradient [r, V] in logits / T."""
    q, log_p = log_q.exp(), _log_softmax(taught, temperature)
    pair = Pair(q, log_q, log_p.exp(), log_p) if lost is None else seen(log_q, log_p, lost.expand_as(log_q))
    if not sloped:
        return divergence.items(pair), None
    items, slope = divergence.both(pair)
    return items, centred(slope, q)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, max(size, 1)))


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one | other


def _columns(student: Hidden, vocabulary: int | None) -> int:
    return len(student.unembedding.weight) if vocabulary is None else vocabulary


def _check_parts(divergence: Divergence | None, teacher: Any, labels: Tensor | None) -> None:
    if (divergence is None) != (teacher is None):
        there, missing = ("divergence", "teacher") if teacher is None else ("teacher", "divergence")
        raise ConfigError(f"a {there} is given but {missing} is None: give both or neither")
    if divergence is None and labels is None:
        raise ConfigError("labels and divergence are None: give one of them, there is nothing to compute")


def _check_shapes(
    student: Hidden, teacher: Hidden | TopTokens | None, labels: Tensor | None, vocabulary: int | None
) -> None:
    columns = _columns(student, vocabulary)
    for whose, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, Hidden):
            continue
        states, weight = network.states.shape, network.unembedding.weight.shape
        if len(states) != 2 or states[1] != weight[1] or states[0] != len(student.states):
            raise ShapeError(
                f"the {whose}'s states are {list(states)} and its unembedding {list(weight)}: give [R, D] "
                f"and [V, D], with R = {len(student.states)} as the student has"
            )
        if weight[0] < columns or (vocabulary is None and weight[0] != columns):
            raise ShapeError(
                f"the {whose} has {weight[0]} tokens but {columns} are to be compared: say with vocabulary "
                "how many ids, counted from 0, mean the same to both"
            )
    if isinstance(teacher, TopTokens):
        same_positions(student.states, teacher)
    if labels is not None and labels.shape != student.states.shape[:1]:
        raise ShapeError(
            f"labels are {list(labels.shape)} but there are {len(student.states)} rows: give one for each"
        )
