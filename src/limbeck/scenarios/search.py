"""A search among the sub-networks of a super network for the best student that a budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from limbeck.contracts import Batch, Objective, Outputs, Progress, Selection
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.metrics import cost as costs
from limbeck.nets.search_space import search
from limbeck.objectives.labels import Labels
from limbeck.scenarios.fit_together import named
from limbeck.scenarios.judging import all_logits
from limbeck.scenarios.language import Desk, Language, evenly
from limbeck.scenarios.pair import Pair
from limbeck.students.supernet import Place, SupernetLM, SupernetStudent


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the network that was found is trained on, with weights of its own.

    Attributes:
        objective: what it learns by.
        epochs: passes over the rows of tokens, or rounds of ``epoch_steps``.
        epoch_steps: steps of an epoch, the rows going round; None = once over the rows.
        optim: its optimiser; None = the scenario's.
    """

    objective: tuple[Objective, ...] = (Labels(),)
    epochs: int = 1
    epoch_steps: int | None = None
    optim: Optim | None = None

    def __post_init__(self) -> None:
        if not self.objective:
            raise ConfigError(
                "objective is an empty list: name at least one objective, or set tuning to null"
            )
        for name in ("epochs", "epoch_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: allowed are values of at least 1")

    def plan(self, search: Search) -> Search:
        """The scenario of this training, behind that of ``search``."""
        return replace(
            search, epochs=self.epochs, epoch_steps=self.epoch_steps, optim=self.optim or search.optim,
            writing=None,
        )  # fmt: skip

    def protocol(self) -> dict[str, Any]:
        """The same as plain data."""
        names = [type(objective).__module__.rpartition(".")[2] for objective in self.objective]
        optim = None if self.optim is None else f"{self.optim.name}, lr {self.optim.lr}"
        return {
            "objective": names, "epochs": self.epochs, "epoch_steps": self.epoch_steps, "optimiser": optim
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Search(Language):
    """All sub-networks of a super network learn; the best that costs less than a limit is the student.

    How good a sub-network is, the recipe's objectives say, on validation texts. The best is cut out, and
    trained on where ``tuning`` says so. Costs are of one row of tokens, with embeddings and logits.

    Attributes:
        epochs: passes over the rows of tokens, or rounds of ``epoch_steps``.
        epoch_steps: steps of an epoch, the rows going round; None = once over the rows.
        batch_size: rows per step.
        eval_batch_size: rows per evaluation step.
        eval_rows: rows of the test part that figures are taken on, evenly spread over it; None = all.
        optim: the student's optimiser.
        teacher_epochs: epochs of a teacher that learns; None = as many as the student's.
        teacher_optim: its optimiser; None = the student's.
        start_epochs: epochs of the student from the labels alone, before it has a teacher; None = 0.
        writing: what part of the training texts a network writes itself; None = none.
        answers: prompts of the test part that are answered, at most; see ``Language``.
        answer_tokens: tokens of an answer, at most.
        limit: what the student must cost less than: up to 1 a part of the teacher's cost, above 1 a number.
        cost: ``multiply_adds``, or ``parameters``, shared ones once.
        search_rows: rows of the validation part that are searched on, evenly spread over it; None = all.
        pick: ``best``, or ``chance``, any below the limit: the control for the search.
        tuning: how the found network is trained on; None = it is the student as it is.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), section 3.3.
    """

    scenario: ClassVar[str] = "search"

    limit: float = 0.5
    cost: Literal["multiply_adds", "parameters"] = "multiply_adds"
    search_rows: int | None = None
    pick: Literal["best", "chance"] = "best"
    tuning: Tuning | None = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit > 0:
            raise ConfigError(
                f"limit is {self.limit}: allowed are parts of the teacher's cost, or numbers above 1"
            )
        if self.search_rows is not None and self.search_rows < 1:
            raise ConfigError(f"search_rows is {self.search_rows}: allowed are values of at least 1")

    def check(self, recipe: Any) -> None:
        """Preflight: as ``language``, with a student to search in."""
        if not isinstance(recipe.student, SupernetStudent):
            raise ConfigError(
                f"the student is {type(recipe.student).__name__}, which holds nothing to search in: take "
                "supernet, or scenario language"
            )
        super().check(recipe)

    def train(self, pair: Pair, desk: Desk, selection: Selection) -> dict[str, Any]:
        """The stage ``train`` of all sub-networks, the search, and the stage ``tune`` of the found one."""
        student = pair.student
        assert isinstance(student, SupernetLM)
        prices = pair.run.once("prices", lambda: self.prices(pair, desk, student))
        limit = self.limit * prices["teacher"] if self.limit <= 1 else self.limit
        search([0.0] * len(prices["candidates"]), prices["candidates"], limit)  # nothing below it: stop now
        kept = self.distil(pair, desk, selection, "train") | pair.facts()
        losses = pair.run.once("search", lambda: self.losses(pair, desk, student))
        chosen = self.chosen(pair.run, losses, prices["candidates"], limit)
        tuning = self.tuning or Tuning()
        found = student.cut_out(student.candidates()[chosen])
        pair.succeed(found, named(replace(desk.recipe, objective=tuning.objective)))
        if self.tuning is not None:
            kept |= tuning.plan(self).distil(pair, desk, None, "tune")
        told = report(student.candidates(), losses, prices["candidates"], chosen)
        about = {"cost": self.cost, "limit": limit, "teacher": prices["teacher"], "pick": self.pick}
        return kept | {"search": about | told}

    def prices(self, pair: Pair, desk: Desk, student: SupernetLM) -> dict[str, Any]:
        """What the teacher and each candidate cost."""
        assert pair.teacher is not None
        if self.cost == "parameters":
            own = [student.parameters_of(place) for place in student.candidates()]
            return {"teacher": costs.parameters(pair.teacher), "candidates": own}
        batch = next(iter(desk.test.in_order(1).epoch(0))).to(pair.run.device)
        student.eval()
        own = []
        for place in student.candidates():
            student.chosen = place
            own.append(costs.multiply_adds(lambda: all_logits(student, batch)))
        teacher = pair.teacher.eval()
        return {
            "teacher": costs.multiply_adds(lambda: all_logits(teacher, pair.told(batch))), "candidates": own
        }  # fmt: skip

    @torch.no_grad()
    def losses(self, pair: Pair, desk: Desk, student: SupernetLM) -> list[float]:
        """What the objectives say of each candidate on validation texts, the mean over tokens that count."""
        rows = desk.held_out[evenly(self.search_rows, len(desk.held_out))]
        candidates = student.candidates()
        sums, count = [0.0] * len(candidates), 0
        for batch in desk.everything.subset(rows).epoch(0):
            moved = batch.to(pair.run.device)
            taught = pair.ask_live(moved)
            step = pair.distillation(None, partial(_said, taught)).eval()
            for number, place in enumerate(candidates):
                student.chosen = place
                terms = step(moved, Progress())
                sums[number] += len(moved.labels) * float(torch.stack(list(terms.values())).sum())
            count += len(moved.labels)
        return [total / count for total in sums]

    def chosen(self, run: Run, losses: Sequence[float], prices: Sequence[float], limit: float) -> int:
        """Number of the candidate that is the student."""
        best = search(losses, prices, limit)
        if self.pick == "best":
            return best
        fitting = [number for number, price in enumerate(prices) if price < limit]
        return fitting[int(torch.randint(len(fitting), (), generator=run.generator("pick")))]

    def protocol(self) -> dict[str, Any]:
        """What a reader must know to compare the figures with others."""
        return super().protocol() | {
            "limit": self.limit, "cost": self.cost, "search_rows": self.search_rows, "pick": self.pick,
            "tuning": None if self.tuning is None else self.tuning.protocol(),
        }  # fmt: skip


def report(
    places: Sequence[Place], losses: Sequence[float], prices: Sequence[float], chosen: int
) -> dict[str, Any]:
    """What ``result.json`` says of a search: the candidates, the chosen one, and each sub-space's mean."""
    candidates = [
        {**place.sizes(), "cost": price, "loss": loss}
        for place, price, loss in zip(places, prices, losses, strict=True)
    ]
    spaces = {}
    for number in sorted({place.space for place in places}):
        own = [c["loss"] for c in candidates if c["space"] == number]
        spaces[f"space{number}"] = {"candidates": len(own), "mean": sum(own) / len(own), "best": min(own)}
    return {"chosen": candidates[chosen], "spaces": spaces, "candidates": candidates}


def _said(outputs: Outputs, batch: Batch) -> Outputs:
    """What a teacher said before to the same batch."""
    return outputs
