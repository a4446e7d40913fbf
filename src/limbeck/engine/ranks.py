"""Several processes that carry out one run together: all that is asked of ``torch.distributed``.

Every rank is given the whole batch. A ``Distillation`` runs its networks on the rank's own rows of it, and
what they say is put together before objectives and selectors look at it: these see one batch, whoever read
it. Any other module runs on the whole batch on every rank. Terms are therefore equal on all ranks.

Gradients are averaged over the ranks. What hangs on a rank's own rows alone carries a gradient that is as
many times too large as there are ranks, and what all ranks compute alike does not: the mean suits both.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from limbeck.contracts import Batch, Outputs
from limbeck.errors import ConfigError, LimbeckError, RankError

KNOWN = r"`(broadcast_buffers|torch\.distributed\.\w+)` is deprecated|Grad strides do not match"
"""What torch warns of and a user cannot mend: new names, and filters of one channel that are copied."""

BY_SAMPLE = ("inputs", "index", "view", "query", "labelled", "segments")
BY_ROW = ("labels", "weight")  # with the marks; of images these are samples too


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this one is.

    Attributes:
        number: from 0.
        size: how many there are; 1 = it is alone, and nothing here does anything.
        local: its number on its machine, which is also the number of its accelerator.
        store: where the ranks met; None = it is alone.
    """

    number: int = 0
    size: int = 1
    local: int = 0
    store: Store | None = None

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.number == 0

    def device(self, asked: torch.device) -> torch.device:
        """Its own accelerator, where ``asked`` names the kind alone.

        Raises:
            ConfigError: its machine has none for it.
        """
        if self.size == 1 or asked.type != "cuda" or asked.index is not None:
            return asked
        if self.local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {self.number} is number {self.local} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs: start as many processes as there are GPUs"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.highest(0)

    def highest(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def told(self, value: Any) -> Any:
        """What the first rank says instead of ``value``: plain data, sent as JSON."""
        if self.size == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        room = torch.empty(self.highest(len(text) if self.first else 0), dtype=torch.uint8)
        if self.first:
            room.copy_(text)
        dist.broadcast(room, 0)
        return json.loads(bytes(room.numpy()))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Within, the first rank goes before the others, and nobody leaves before all are done."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()
        self.wait()

    def wrapped(self, module: nn.Module) -> Callable[..., dict[str, Tensor]]:
        """``module`` with equal weights on all ranks to begin with, and gradients that are averaged."""
        if self.size == 1:
            return module
        partial = any(getattr(part, "partial", False) for part in module.modules())
        split = {
            name for name, p in module.named_parameters() if isinstance(p, DTensor)
        }  # torch averages these
        if all(name in split for name, p in module.named_parameters() if p.requires_grad):
            return module
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, split)
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=partial)

    def averaged(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over the ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def split(self, batch: Batch) -> Batch:
        """``batch`` with the rows of it that this rank reads: an equal share, in the batch's order."""
        if self.size == 1:
            return batch
        bounds = [len(batch.index) * rank // self.size for rank in range(self.size + 1)]
        read = batch if batch.other is None else batch.other
        return Shared(
            **{f.name: getattr(batch, f.name) for f in fields(batch)},
            own=cut(batch, _inside(bounds, self.number)),
            number=self.number, samples=_sizes(bounds), lengths=_sizes(_row_bounds(batch, bounds)),
            read_lengths=_sizes(_row_bounds(read, bounds)),
        )  # fmt: skip

    def silenced(self, code: int) -> int | None:
        """The exit code of the rank that failed before this one, and says why; None = this one is to say it,
        and to exit with ``code``."""
        if self.store is None:
            return None
        own = f"{self.number}:{code}"
        try:
            known: str = self.store.compare_set("limbeck/failed", "", own).decode()
        except RuntimeError:  # the store died with the rank that held it
            return None
        return None if known == own else int(known.partition(":")[2])


@cache
def here() -> Ranks:
    """This process among those that were started together, by the environment that torchrun sets.

    Raises:
        ConfigError: the environment is not such a one.
        RankError: the others do not come.
    """
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    if given["WORLD_SIZE"] in ("", "1"):
        return Ranks()
    try:
        size, number, local = (int(given[name] or 0) for name in given)
    except ValueError as error:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"{said}: allowed are numbers, as torchrun sets them; unset them to run alone"
        ) from error
    try:
        store, *_ = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise RankError(
            f"rank {number} cannot meet the {size - 1} others ({why}): start all with torchrun"
        ) from error
    return Ranks(number, size, local, store)


def alone(command: str) -> None:
    """Raise ``ConfigError`` where several ranks were started for a ``command`` that one carries out."""
    if (size := here().size) > 1:
        raise ConfigError(f"{command} was started on {size} ranks: start it on one, without torchrun")


@contextmanager
def together() -> Iterator[None]:
    """Within, all ranks stop where one does: the first that fails says why, and the others end in silence.

    Raises:
        LimbeckError: what was raised within; ``RankError`` where another rank is gone.
        SystemExit: another rank has said it.
    """
    ranks = here()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", KNOWN)
            yield
        ranks.wait()
    except LimbeckError as error:
        if (code := ranks.silenced(error.code)) is not None:
            raise SystemExit(code) from error
        raise
    except RuntimeError as error:
        if ranks.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if (code := ranks.silenced(RankError.code)) is not None:
            raise SystemExit(code) from error
        raise RankError(
            f"rank {ranks.number} of {ranks.size} has lost another one, so all stop: see there why, then go "
            "on by limbeck resume and the run's folder"
        ) from error


@dataclass(frozen=True, slots=True)
class Shared(Batch):
    """The batch of all ranks.

    Attributes:
        own: the rows that this rank reads. One that has none reads the first sample, which does not count.
        number: the rank.
        samples: how many samples each rank has.
        lengths: how many rows each has: samples, or of text the tokens that count.
        read_lengths: the same of what a teacher reads, whose tokens may be others.
    """

    own: Batch | None = None
    number: int = 0
    samples: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    read_lengths: tuple[int, ...] = ()


def cut(batch: Batch, part: slice) -> Batch:
    """Some neighbouring samples of ``batch``."""
    first, last = _row_bounds(batch, [part.start, part.stop])
    tensors = {n: getattr(batch, n)[part] for n in BY_SAMPLE if getattr(batch, n) is not None}
    tensors |= {n: getattr(batch, n)[first:last] for n in BY_ROW if getattr(batch, n) is not None}
    if batch.rows is not None:
        tensors["rows"] = batch.rows[first:last] - part.start * batch.inputs.shape[1]
    return Batch(
        **tensors, marks={name: values[first:last] for name, values in batch.marks.items()},
        other=None if batch.other is None else cut(batch.other, part),
        place=(part.start, len(batch.index)),
    )  # fmt: skip


def _row_bounds(batch: Batch, samples: Sequence[int]) -> list[int]:
    """How many rows stand before each of ``samples``."""
    if batch.rows is None:
        return list(samples)
    first_tokens = torch.tensor(samples, device=batch.rows.device) * batch.inputs.shape[1]
    return torch.searchsorted(batch.rows, first_tokens).tolist()


def _sizes(bounds: Sequence[int]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in pairwise(bounds))


def _inside(bounds: Sequence[int], number: int) -> slice:
    """The samples of a rank; the first one, where it has none."""
    start, stop = bounds[number : number + 2]
    return slice(start, stop) if start < stop else slice(0, 1)


def own(batch: Batch) -> Batch:
    """The rows that this rank reads."""
    return batch.own if isinstance(batch, Shared) and batch.own is not None else batch


def own_of(view: Batch, batch: Batch) -> Batch:
    """The rows that this rank reads of ``view``, another view of ``batch``."""
    if not isinstance(batch, Shared):
        return view
    return cut(view, _inside([0, *accumulate(batch.samples)], batch.number))


def own_rows(values: Tensor, batch: Batch) -> Tensor:
    """Those of ``values`` [rows of the whole batch, ...] that are of this rank's rows."""
    if not isinstance(batch, Shared):
        return values
    start = sum(batch.lengths[: batch.number])
    found = values[start : start + batch.lengths[batch.number]]
    return found if len(found) else torch.zeros_like(values[: len(own(batch).labels)])


def whole(outputs: Outputs, batch: Batch, *, teacher: bool = False) -> Outputs:
    """What all ranks' networks said, as if one had read the whole batch; the network's own terms are left.

    Args:
        teacher: the rows are those that a teacher reads.
    """
    if not isinstance(batch, Shared):
        return outputs
    rows = batch.read_lengths if teacher else batch.lengths

    def by_row(values: Tensor) -> Tensor:
        return gathered(values, rows, batch.number)

    def by_sample(values: Tensor) -> Tensor:
        return gathered(values, batch.samples, batch.number)

    def each(found: Mapping[str, Outputs]) -> dict[str, Outputs]:
        return {name: whole(other, batch, teacher=teacher) for name, other in found.items()}

    return replace(
        outputs,
        logits=by_row(outputs.logits),
        soft_logits=None if outputs.soft_logits is None else by_row(outputs.soft_logits),
        features={tap: by_sample(value) for tap, value in outputs.features.items()},
        prompts={block: (by_sample(k), by_sample(v)) for block, (k, v) in outputs.prompts.items()},
        mask=None if outputs.mask is None else by_row(outputs.mask),
        paths=each(outputs.paths),
        subnets=each(outputs.subnets),
        hidden=None if outputs.hidden is None else by_row(outputs.hidden),
        top=None if outputs.top is None else (by_row(outputs.top[0]), by_row(outputs.top[1])),
    )


def mean(terms: Mapping[str, Tensor], batch: Batch, *, of_samples: bool = False) -> dict[str, Tensor]:
    """Terms that are means over this rank's rows, or over its samples, as means over those of all ranks."""
    if not isinstance(batch, Shared):
        return dict(terms)
    sizes = batch.samples if of_samples else batch.lengths
    share = sizes[batch.number] / max(sum(sizes), 1)
    return {name: summed(share * value) for name, value in terms.items()}


def gathered(values: Tensor, sizes: Sequence[int], number: int) -> Tensor:
    """The rows [sum(sizes), ...] of all ranks; what ``values`` holds beyond this rank's does not count."""
    found: Tensor = _Gathered.apply(values, tuple(sizes), number)  # type: ignore[no-untyped-call]
    return found


def summed(values: Tensor) -> Tensor:
    """The sum over the ranks; its gradient is the sum of theirs."""
    found: Tensor = _Summed.apply(values)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    """All ranks go on with the same rows in the same way, so each knows the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: tuple[int, ...], number: int) -> Tensor:
        ctx.start, ctx.count = sum(sizes[:number]), sizes[number]
        ctx.factor, ctx.shape = len(sizes), values.shape
        room = values.new_zeros(max(sizes), *values.shape[1:])
        room[: ctx.count] = values[: ctx.count]
        found = values.new_empty(len(sizes) * len(room), *values.shape[1:])
        dist.all_gather_into_tensor(found, room)
        parts = found.reshape(len(sizes), *room.shape)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = grads[0].new_zeros(ctx.shape)
        back[: ctx.count] = ctx.factor * grads[0][ctx.start : ctx.start + ctx.count]
        return back, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def one_batch(batch: Batch, module: nn.Module) -> AbstractContextManager[object]:
    """Within, batch norms of ``module`` that learn take their statistics over the rows of all ranks."""
    if isinstance(batch, Shared) and any(isinstance(part, _BatchNorm) for part in module.modules()):
        return _WholeNorm(batch)
    return nullcontext()


class _WholeNorm(TorchFunctionMode):
    """Takes the place of ``F.batch_norm``, which every kind of batch norm calls."""

    def __init__(self, batch: Shared) -> None:
        super().__init__()
        self.count = sum(batch.samples)
        self.share = batch.samples[batch.number] / self.count

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        ours = self.norm if func is F.batch_norm else func
        return ours(*args, **(kwargs or {}))

    def norm(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
        momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """``F.batch_norm``; every rank has as many pixels a sample."""
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        wide = x if x.dtype == torch.float64 else x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        var, mean = torch.var_mean(wide, axes, correction=0)
        middle = summed(self.share * mean)
        spread = summed(self.share * (var + (mean - middle).square()))
        if running_mean is not None and running_var is not None:
            count = self.count * x[0, 0].numel()
            with torch.no_grad():
                running_mean.lerp_(middle.to(running_mean), momentum)
                running_var.lerp_((spread * (count / max(count - 1, 1))).to(running_var), momentum)
        found = (wide - middle.view(shape)) * torch.rsqrt(spread + eps).view(shape)
        if weight is not None:
            found = found * weight.view(shape)
        return (found if bias is None else found + bias.view(shape)).to(x.dtype)
