"""The only training loop in the house."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Progress
from limbeck.engine import shards
from limbeck.engine.guards import (
    GRADIENT,
    Before,
    FiniteFlag,
    Frozen,
    check_orphans,
    gradient_norm,
    gradient_shares,
)
from limbeck.engine.optim import Optim, learned, trainable_groups
from limbeck.engine.run import Run
from limbeck.errors import DataError, GuardError, NonFiniteError


class Source(Protocol):
    """Where batches come from: the order of an epoch is a function of its number alone."""

    @property
    def steps(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Turn:
    """One module that takes one optimiser step on every batch.

    Args:
        name: appears in logs where a stage has several turns.
        module: forward ``(batch, at) -> terms``.
        optim: its optimiser, made afresh over all that learns in ``module``.
        frozen: parts that must not change meanwhile, by name.
    """

    def __init__(self, name: str, module: nn.Module, optim: Optim, frozen: Mapping[str, nn.Module]) -> None:
        self.name, self.module, self.optim, self.frozen = name, module, optim, frozen
        shards.settle(module)
        groups = trainable_groups(module)
        if not groups:
            raise GuardError(f"{name}: nothing in it learns: give it parameters that require a gradient")
        self.optimizer = optim.build(groups)
        self.parameters = learned(self.optimizer)
        self.call: Callable[..., dict[str, Tensor]] = module
        self.checked = False
        self.updating = False

    def step(self, batch: Batch, at: Progress, run: Run) -> dict[str, Tensor]:
        """One optimiser step; returns the detached terms.

        Raises:
            NonFiniteError: before anything was updated.
        """
        rate = self.optim.set_rate(self.optimizer, at)
        given = run.ranks.split(batch) if getattr(self.module, "splits", False) else batch
        with autocast(run):
            terms = self.call(given.to(run.device), at)
        flag = FiniteFlag(terms)
        self.optimizer.zero_grad(set_to_none=True)
        if run.diagnoses(at):
            flag.check()
            run.shares(self.name, at, gradient_shares(terms, self.parameters, run.ranks.averaged))
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        flag.check()
        size = gradient_norm(self.parameters)
        FiniteFlag({GRADIENT: size}).check()
        if not self.checked:
            check_orphans(self.module, self.optimizer)
            self.checked = True
        if self.optim.clip is not None:
            shards.clip(self.parameters, self.optim.clip, size)
        self.updating = True
        self.optimizer.step()
        self.optim.average(self.optimizer)
        self.updating = False
        run.rate = rate
        return {name: term.detach() for name, term in terms.items()}


def autocast(run: Run) -> AbstractContextManager[object]:
    """bf16 autocast where the run asks for it."""
    if run.settings.precision == "bf16":
        return torch.autocast(run.device.type, dtype=torch.bfloat16)
    return nullcontext()


def fit(
    run: Run,
    stage: str,
    turns: Sequence[Turn],
    batches: Source,
    epochs: int,
    *,
    task: int = 0,
    tasks: int = 1,
) -> None:
    """Train for ``epochs`` over ``batches``; every batch is seen by each of ``turns`` in order.

    A stage that an earlier attempt at this run finished is passed over; one that was cut off goes on at
    the step where its last checkpoint stands and ends with the same weights, bit for bit.

    Args:
        run: the run's folder, log and checkpoints.
        stage: a name that is unique in the run.
        task: number of the task in a stream, of ``tasks``.

    Raises:
        NonFiniteError: a loss term is NaN or infinite.
        DataError: a batch cannot be read.
        GuardError: a frozen part changed, or a parameter is orphaned.
        ServiceError: a served teacher does not answer.
        Interrupted: the user asked to stop; the run can be resumed.
        Exception: whatever else a network raises. A checkpoint from before the step that failed is written,
            unless the step had begun to change weights, or was the first.
    """
    start = run.enter(stage, turns)
    if start is None:
        return
    frozen = Frozen({name: part for turn in turns for name, part in turn.frozen.items()})
    for turn in turns:
        turn.module.train()
        turn.call = torch.compile(turn.module) if run.settings.compile else run.ranks.wrapped(turn.module)
    before = Before([turn.module for turn in turns], run.device)
    total, step = epochs * batches.steps, start.step
    ahead = run.steps(batches, epochs, start)
    epoch, place = start.epoch, start.batch  # of the batch to come
    while True:
        before.keep()
        terms: dict[str, dict[str, Tensor]] = {}
        batch = None
        try:
            found = next(ahead, None)
            if found is None:
                break
            epoch, place, batch = found
            at = Progress(step=step, steps=total, epoch=epoch, epochs=epochs, task=task, tasks=tasks)
            began = time.perf_counter()
            run.draw_apart(at)
            for turn in turns:
                terms[turn.name] = turn.step(batch, at, run)
        except Exception as error:
            spoilt = isinstance(error, NonFiniteError)
            why = blame(turns, batch, run) if spoilt and batch is not None else ""
            untouched = not terms and not any(turn.updating for turn in turns)
            alike = spoilt or run.settings.shard == "none"  # what is shared out is gathered by all, or not
            if untouched and alike and (step or spoilt):  # else the last checkpoint stands
                before.restore()
                run.save(stage, turns, epoch, place, step)
            if isinstance(error, NonFiniteError | DataError):
                where = f"{stage}, epoch {epoch}, step {step}"
                raise type(error)(f"{where}: {error}{why}") from error
            raise
        step, place = step + 1, place + 1
        run.after_step(stage, turns, at, terms, place, time.perf_counter() - began)
    for turn in turns:
        turn.optim.settle(turn.optimizer)
    frozen.check()
    run.leave(stage, turns)


@torch.no_grad()
def blame(turns: Sequence[Turn], batch: Batch, run: Run) -> str:
    """Where a non-finite loss came from, as far as the values tell; with the samples and the fix."""
    samples = ", ".join(map(str, batch.index.tolist()[:4])) + (", ..." if len(batch.index) > 4 else "")
    suspects: dict[str, Tensor] = {"the input data": batch.inputs}
    for turn in turns:
        suspects |= getattr(turn.module, "suspects", lambda *_: {})(batch.to(run.device), turn.name)
    for what, values in suspects.items():
        bad = ~torch.isfinite(values.float()).flatten(1).all(1)
        if bad.any():
            worst = int(batch.index[bad.cpu()][0])
            return f"; {what} is not finite, first at sample {worst}: mend that sample or that network"
    return f" (samples {samples}); inputs and outputs are finite: lower optim.lr or set optim.clip"
