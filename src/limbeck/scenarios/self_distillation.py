"""Generations of one network: each is taught by the one before, and by the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Objective, Outputs, Progress, Scenario, Spec
from limbeck.engine.distillation import Distillation, combine
from limbeck.engine.fit import Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.engine.seeds import generator
from limbeck.errors import ConfigError
from limbeck.metrics.kernel_ridge import OptimalAlpha
from limbeck.scenarios import figures
from limbeck.scenarios.fit_together import inputs, named
from limbeck.scenarios.generations import (
    Alpha,
    check_alpha,
    check_recipe,
    chosen,
    of_generation,
    pair_of,
    record,
)
from limbeck.scenarios.pair import Pair, build_student, constants, with_weights
from limbeck.scenarios.static import Desk, Static


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Scenario):
    """A student learns the labels; a fresh one learns from it and the labels; and so on.

    Objectives that listen to a teacher weigh 1 - alpha and the others alpha, on top of their own weights.
    With alpha 1 the teacher is not asked in training, with alpha 0 the labels are not read. The recipe names
    no teacher. ``result.json`` has a line for each generation; student is the last, teacher the one before.

    Attributes:
        generations: networks in a row, the first of which learns from the labels alone.
        alpha: weight of the TRUE targets, in [0, 1]: one for all generations after the first, one for each,
            or ``optimal``: estimated on the validation samples from one more training with alpha 0.
        epochs: passes over the data, for each generation.
        batch_size: samples per step.
        drop_last: leave out an epoch's last batch that is not full.
        eval_batch_size: samples per evaluation step.
        optim: the optimiser, fresh in each generation.
        validation: share of the training samples that is held out, in [0, 1).
        norm_penalty: factor of the sum of the L2 norms of all parameter tensors, as the official code has it;
            the theory's squared norm is ``optim.weight_decay``.

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), section 5 and official code.
    Differs: alpha is clipped to [0, 1]; the validation samples are held out of the training split (the code's
    are its test split).
    """

    generations: int = 4
    alpha: Alpha = 0.5
    epochs: int = 20
    batch_size: int = 64
    drop_last: bool = False
    eval_batch_size: int = 256
    optim: Optim = field(default_factory=lambda: Optim(schedule="cosine"))
    validation: float = 0.0
    norm_penalty: float = 0.0

    def __post_init__(self) -> None:
        self.each()
        check_alpha(self.alpha, self.generations)
        if not self.norm_penalty >= 0:
            raise ConfigError(f"norm_penalty is {self.norm_penalty}: allowed are values of at least 0")

    def each(self) -> Static:
        """The training of one generation."""
        return Static(
            epochs=self.epochs, batch_size=self.batch_size, drop_last=self.drop_last,
            eval_batch_size=self.eval_batch_size, optim=self.optim, validation=self.validation,
        )  # fmt: skip

    def check(self, recipe: Any) -> None:
        """Preflight: no teacher, an objective for the labels and one for the generation before."""
        check_recipe(recipe, self.alpha, self.validation)
        labels = [name for name, o in named(recipe).items() if not listens(o)]
        if not labels:
            raise ConfigError(
                "no objective reads the labels, from which the first generation learns: add labels"
            )
        if self.generations > 1 and self.alpha != 1 and len(labels) == len(recipe.objective):
            raise ConfigError(
                "no objective listens to the generation before: add one such as kd, or set alpha to 1"
            )

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The last generation of a finished run, in evaluation mode."""
        form = inputs(recipe)
        spec = Spec(classes=classes, channels=form.channels, size=form.size)
        return with_weights(build_student(recipe, spec, recipe.seed), state)

    def run(self, recipe: Any, run: Run) -> dict[str, Any]:
        """Train all generations on the recipe's data; returns the figures of the last on its test split."""
        plan = self.each()
        desk = Desk(plan, recipe, run)
        names = list(desk.splits.test.classes)
        lines: list[dict[str, Any]] = []
        pair: Pair | None = None
        first: Tensor | None = None
        for number in range(1, self.generations + 1):
            before = None if pair is None else pair.student
            alpha, found = self._alpha(desk, number, before, first)
            pair = self._train(desk, f"generation-{number}", number, before, alpha)
            if number == 1 and self.alpha == "optimal" and self.generations > 1:
                first = self._validated(desk, pair, "validation-1")
            lines.append(self._line(desk, pair, number, None if before is None else alpha, found))
        assert pair is not None
        found_figures = plan.measure(pair, pair.source(desk.test), names)
        found_figures["student"]["squared_error"] = lines[-1]["squared_error"]
        return {
            "recipe": recipe.name, "scenario": "self_distillation", "seed": run.seed,
            **figures.about(desk.splits),
            "protocol": plan.protocol(recipe) | desk.protocol() | self._protocol(),
            **found_figures, "generations": lines,
        }  # fmt: skip

    def _alpha(
        self, desk: Desk, number: int, before: Net | None, first: Tensor | None
    ) -> tuple[float, OptimalAlpha | None]:
        """The weight of the labels in a generation, and how it was estimated."""
        if before is None:
            return 1.0, None
        fixed = of_generation(self.alpha, number)
        if fixed is not None:
            return fixed, None
        assert first is not None
        alone = self._train(desk, f"generation-{number}-alone", number, before, 0.0)
        taught = self._validated(desk, alone, f"validation-{number}")
        found = chosen(first, taught, desk.splits.train.labels[desk.held_out])
        return found.alpha, found

    def _train(self, desk: Desk, stage: str, number: int, before: Net | None, alpha: float) -> Pair:
        """The stage of that name: a fresh network learns from the labels and the generation before."""
        run, recipe = desk.run, desk.recipe
        net = recipe.student.build(desk.pair.spec, generator(run.seed, "student", number)).to(run.device)
        pair = pair_of(desk, net, before)
        factors = {name: 1 - alpha if listens(o) else alpha for name, o in pair.objectives.items()}
        used = {name: o for name, o in pair.objectives.items() if factors[name] > 0}
        if before is None:
            used = {name: o for name, o in used.items() if not listens(o)}
        asked = any(listens(o) for o in used.values())
        ask, captured = None, pair.captured_teacher(desk.learning, self.epochs) if asked else None
        if asked:
            ask = pair.remembered(captured)
        module = self._step(pair, used, factors, ask)
        frozen = constants(pair.nets()) | ({} if before is None else {"teacher": before})
        source = pair.source(desk.learning)
        pair.start(stage, desk.learning.index, desk.learning.labels)
        run.meter.plan[stage] = source.steps * self.epochs
        fit(run, stage, [Turn("student", module, self.optim, frozen)], source, self.epochs)
        pair.student.finish_task()
        if captured is not None:
            captured.delete()
        return pair

    def _step(
        self, pair: Pair, used: Mapping[str, Objective], factors: Mapping[str, float], ask: Any
    ) -> Distillation:
        """The training step of one generation."""
        net = pair.student
        modules: dict[str, nn.Module] = {
            name: Scaled(pair.adapters.get_submodule(name), factors[name]) for name in used
        }
        if self.norm_penalty > 0:
            modules["norms"] = NormSum(net, self.norm_penalty)
        return Distillation(
            net, modules, combine(used), ask=ask,
            paths={name: objective.path for name, objective in used.items()},
            by_row={name for name, objective in used.items() if objective.by_row},
            query=net.query if net.query_dim is not None else None,
        )  # fmt: skip

    def _validated(self, desk: Desk, pair: Pair, name: str) -> Tensor:
        """A generation's class probabilities [m, C] on the validation samples."""

        def compute() -> list[list[float]]:
            return _shares(pair, desk.validation, desk)[0].tolist()

        return torch.tensor(desk.run.once(name, compute), dtype=torch.float64)

    def _line(
        self, desk: Desk, pair: Pair, number: int, alpha: float | None, found: OptimalAlpha | None
    ) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            return record(number, alpha, found, lambda: _shares(pair, desk.test, desk))

        line: dict[str, Any] = desk.run.once(f"generation-{number}", compute)
        desk.run.log("generation", **line)
        return line

    def _protocol(self) -> dict[str, Any]:
        return {
            "generations": self.generations,
            "alpha": f"{self.alpha}, of the true targets" if self.generations > 1 else "none",
            "norm_penalty": self.norm_penalty,
        }


class Scaled(nn.Module):
    """An objective's module with a factor on its terms."""

    def __init__(self, objective: nn.Module, factor: float) -> None:
        super().__init__()
        self.objective, self.factor = objective, factor

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        terms = self.objective(student, teacher, batch, at)
        return {name: self.factor * term for name, term in terms.items()}


class NormSum(nn.Module):
    """The sum of the L2 norms (not squared) of a network's parameter tensors, times a factor."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self._parameters_of = (net,)  # unregistered: it is the student's

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        (net,) = self._parameters_of
        norms = [p.norm() for p in net.parameters() if p.requires_grad]
        return {"norms": self.factor * torch.stack(norms).sum()}


def listens(objective: Objective) -> bool:
    """Whether an objective matches a teacher."""
    needs = objective.needs()
    return needs.teacher_logits or bool(needs.teacher)


def _shares(pair: Pair, source: Any, desk: Desk) -> tuple[Tensor, Tensor]:
    """Class probabilities [N, C] of the student over ``source``, and the classes [N]."""
    logits, labels = pair.answers([pair.source(source)], len(desk.splits.test.classes))
    return logits["student"].double().softmax(1), labels
