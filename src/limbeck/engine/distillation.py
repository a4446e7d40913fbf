"""The choices put together: one module whose forward is the training step's loss terms."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.contracts import Adapting, Batch, Needs, Net, Objective, Outputs, Progress, Selection
from limbeck.engine import ranks
from limbeck.errors import unknown

Ask = Callable[[Batch], Outputs]


class Distillation(nn.Module):
    """A student that learns from labels, a teacher, or both.

    Where several ranks share a batch, both networks read this rank's rows alone.

    Args:
        student: forward ``(batch, taps, teacher) -> Outputs``.
        objectives: built objectives by name.
        needs: what they read.
        ask: gives the teacher's outputs for a batch, live or cached; None = no teacher.
        adapting: the teacher's second path, which learns in the same step from terms of its own.
        paths: which of the teacher's answers each objective is matched with, by the objective's name; the
            main one where it is not named.
        by_row: names of the objectives whose terms are means over rows (``Objective.by_row``).
        selector: weighs the samples; None = all alike.
        window: the classes ``(start, stop)`` that objectives see; None = all.
        query: gives the query features of images for batches that carry none; None = not needed.
        keep: hold on to the student's last outputs for ``said``.
        own_query: the teacher selects by a query of its own, not by the batch's.
    """

    splits = True  # knows what to do with a batch that ranks share

    def __init__(
        self,
        student: nn.Module,
        objectives: Mapping[str, nn.Module],
        needs: Needs,
        *,
        ask: Ask | None = None,
        adapting: Adapting | None = None,
        paths: Mapping[str, str] | None = None,
        by_row: Collection[str] = (),
        selector: Selection | None = None,
        window: tuple[int, int] | None = None,
        query: Callable[[Tensor], Tensor] | None = None,
        keep: bool = False,
        own_query: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict(dict(objectives))
        self.adapting = adapting
        self.needs, self.ask, self.window, self.query = needs, ask, window, query
        self.keep, self.paths, self.own_query = keep, dict(paths or {}), own_query
        self.by_row = frozenset(by_row)
        self._selector = (selector,)  # unregistered: what of it learns takes steps of its own
        self.last: Outputs | None = None
        self.teacher_seconds = 0.0

    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Named scalar terms, already weighted: the objectives', the student's own, the second path's.

        Those of a sub-network within the student have its name before them.
        """
        read = self.with_query(ranks.own(batch))
        with ranks.one_batch(batch, self):
            taught = self.taught(read)
            if isinstance(self.student, Net):
                self.student.start_step(at)
            student = self.student(read, taps=self.needs.student, teacher=taught)
            if self.keep:
                self.last = student.detach()
            student = self.with_views(student, batch, at, taught)
            if taught is not None and self.adapting is not None:
                asked = replace(read, query=None) if self.own_query else read
                taught = self.adapting(asked, taught, self.needs.teacher)
        start, stop = self.window or (0, student.logits.shape[1])
        taught = None if taught is None else taught.columns(start, stop)
        terms = self.terms(student.columns(start, stop), taught, batch, start, at)
        return terms | ranks.mean(student.losses, batch, of_samples=True)

    def terms(
        self, student: Outputs, taught: Outputs | None, batch: Batch, start: int, at: Progress
    ) -> dict[str, Tensor]:
        """The terms of what was said to this rank's rows of ``batch``, of classes from ``start`` on."""
        local, read = (replace(b, labels=b.labels - start) for b in (batch, ranks.own(batch)))
        by_row = self.means(student, batch)
        seen, told = student, taught
        if self.adapting is not None or self.weighs or by_row < set(self.objectives):
            seen = ranks.whole(student, batch)
            told = None if taught is None else ranks.whole(taught, batch, teacher=True)
        terms: dict[str, Tensor] = {}
        if told is not None and taught is not None and self.adapting is not None:
            terms = _named("teacher", self.adapting.terms(told, seen.detach(), local, at))
            told, taught = told.detach(), taught.detach()
        weights = self.weights(local, seen, told, at)
        for who in ("", *student.subnets):
            for name, objective in self.objectives.items():
                weight = weights.get(name)
                if name in by_row:
                    own, other, given = student, taught, read
                    weight = None if weight is None else ranks.own_rows(weight, batch)
                else:
                    own, other, given = seen, told, local
                other = None if other is None else other.along(self.paths.get(name, ""))
                found = objective(own.subnets[who] if who else own, other, replace(given, weight=weight), at)
                found = _named(name, ranks.mean(found, batch) if name in by_row else found)
                terms |= {f"{who}.{key}" if who else key: value for key, value in found.items()}
        return terms

    def means(self, student: Outputs, batch: Batch) -> frozenset[str]:
        """The objectives that this rank asks about its own rows alone."""
        counts_all = student.mask is None and batch.labelled is None
        return self.by_row if counts_all and ranks.own(batch) is not batch else frozenset()

    @property
    def weighs(self) -> bool:
        """Whether samples may be weighed."""
        (selector,) = self._selector
        return selector is not None and selector.weighs

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Mapping[str, Tensor]:
        """The weights [B] of the samples by objective, where the selector gives any.

        Raises:
            ConfigError: it names an objective that is not there.
        """
        (selector,) = self._selector
        found = (
            selector.weights(batch, student, teacher, at) if selector is not None and self.weighs else None
        )
        if found is None:
            return {}
        if isinstance(found, Tensor):
            return dict.fromkeys(self.objectives, found)
        for name in found:
            if name not in self.objectives:
                raise unknown("objective", name, self.objectives, where="the selector's weights")
        return found

    def with_views(self, student: Outputs, batch: Batch, at: Progress, taught: Outputs | None) -> Outputs:
        """What the student said, with what it says to the objectives' own views of the whole batch."""
        views = {
            name: ranks.own_of(objective.view(batch, at), batch)  # type: ignore[operator]
            for name, objective in self.objectives.items()
            if hasattr(objective, "view")
        }
        if not views:
            return student
        said = {
            name: self.student(self.with_query(replace(view, query=None)), self.needs.student, taught)
            for name, view in views.items()
        }
        return replace(student, paths={**student.paths, **said})

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
            found["the teacher's output"] = main_of(taught)
        return found | {f"the {learner}'s output": main_of(self.student(batch, taps=(), teacher=taught))}


def main_of(outputs: Outputs) -> Tensor:
    """What an answer consists of in the first place."""
    if outputs.hidden is not None:
        return outputs.hidden
    return outputs.logits if outputs.top is None else outputs.top[1]


def _named(name: str, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name if part == name else f"{name}.{part}": value for part, value in terms.items()}


def combine(objectives: Mapping[str, Objective]) -> Needs:
    """What several objectives read together, each tap once."""
    needs = [objective.needs() for objective in objectives.values()]
    asked = [need.tokens for need in needs]
    return Needs(
        student=tuple(dict.fromkeys(tap for need in needs for tap in need.student)),
        teacher=tuple(dict.fromkeys(tap for need in needs for tap in need.teacher)),
        teacher_logits=any(need.teacher_logits for need in needs),
        logits=any(need.logits for need in needs),
        tokens=None if None in asked else max((count or 0 for count in asked), default=0),
    )
