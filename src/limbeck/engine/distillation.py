"""The choices put together: one module whose forward is the training step's loss terms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Needs, Objective, Outputs, Progress, Selector

Ask = Callable[[Batch], Outputs]


class Distillation(nn.Module):
    """A student that learns from labels, a teacher, or both.

    Args:
        student: forward ``(batch, taps, teacher) -> Outputs``.
        objectives: built objectives by name.
        needs: what they read.
        ask: gives the teacher's outputs for a batch, live or cached; None = no teacher.
        selector: weighs the samples; None = all alike.
        window: the classes ``(start, stop)`` that objectives see; None = all.
        query: gives the query features of images for batches that carry none; None = not needed.
        keep: hold on to the student's last outputs for ``said``.
    """

    def __init__(
        self,
        student: nn.Module,
        objectives: Mapping[str, nn.Module],
        needs: Needs,
        *,
        ask: Ask | None = None,
        selector: Selector | None = None,
        window: tuple[int, int] | None = None,
        query: Callable[[Tensor], Tensor] | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict(dict(objectives))
        self.needs, self.ask, self.selector, self.window, self.query = needs, ask, selector, window, query
        self.keep = keep
        self.last: Outputs | None = None
        self.teacher_seconds = 0.0

    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Named scalar terms, already weighted: the objectives' and the student's own."""
        batch = self.with_query(batch)
        taught = self.taught(batch)
        student = self.student(batch, taps=self.needs.student, teacher=taught)
        if self.keep:
            self.last = student.detach()
        start, stop = self.window or (0, student.logits.shape[1])
        seen, local = student.columns(start, stop), replace(batch, labels=batch.labels - start)
        if taught is not None:
            taught = taught.columns(start, stop)
        if self.selector is not None:
            local = replace(local, weight=self.selector.weights(local, seen, taught, at))
        terms: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            for part, value in objective(seen, taught, local, at).items():
                terms[name if part == name else f"{name}.{part}"] = value
        return terms | dict(student.losses)

    def said(self, batch: Batch) -> Outputs:
        """The student's outputs of its last step, for another that learns from them in its turn."""
        assert self.last is not None
        return self.last

    def with_query(self, batch: Batch) -> Batch:
        """The batch with query features, computed where it carries none; without, where none are needed."""
        if self.query is None:
            return batch if batch.query is None else replace(batch, query=None)
        return replace(batch, query=self.query(batch.inputs)) if batch.query is None else batch

    def taught(self, batch: Batch) -> Outputs | None:
        """What the teacher says, without a graph."""
        if self.ask is None:
            return None
        if torch.compiler.is_compiling():
            return self.ask(batch)
        began = time.perf_counter()
        with torch.no_grad():
            outputs = self.ask(batch)
        self.teacher_seconds += time.perf_counter() - began
        return outputs

    def suspects(self, batch: Batch, learner: str) -> dict[str, Tensor]:
        """What may have spoilt a loss of ``learner``, by name, first causes first."""
        batch = self.with_query(batch)
        found: dict[str, Tensor] = {}
        taught = self.taught(batch)
        if taught is not None:
            found["the teacher's output"] = taught.logits
        return found | {f"the {learner}'s output": self.student(batch, taps=(), teacher=taught).logits}


def combine(objectives: Mapping[str, Objective]) -> Needs:
    """What several objectives read together, each tap once."""
    needs = [objective.needs() for objective in objectives.values()]
    return Needs(
        student=tuple(dict.fromkeys(tap for need in needs for tap in need.student)),
        teacher=tuple(dict.fromkeys(tap for need in needs for tap in need.teacher)),
        teacher_logits=any(need.teacher_logits for need in needs),
    )
