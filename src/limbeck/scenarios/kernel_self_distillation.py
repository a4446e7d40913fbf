"""Self-distillation of kernel ridge regression, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.contracts import Net, Scenario, Spec
from limbeck.data.batches import Batches
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.metrics.kernel_ridge import OptimalAlpha, Spectrum, rbf
from limbeck.objectives.probability_mse import ProbabilityMSE
from limbeck.scenarios import figures
from limbeck.scenarios.fit_together import inputs, load_data
from limbeck.scenarios.generations import (
    Alpha,
    check_alpha,
    check_recipe,
    chosen,
    of_generation,
    pair_of,
    record,
)
from limbeck.scenarios.static import Desk, Static
from limbeck.students.kernel_ridge import KernelMachine, KernelRidgeStudent


@dataclass(frozen=True, kw_only=True)
class KernelSelfDistillation(Scenario):
    """Kernel ridge regression fits the labels, then its own fit mixed with the labels, and so on.

    The kernel is taken apart once; each step is then a product. The student is ``kernel_ridge``. Squared
    error is what it minimises, so the objectives are ``probability_mse``, one for the labels and one for the
    teacher. ``result.json`` has a line for each step; student is the last, teacher the one before it.

    Attributes:
        generations: steps, the first of which is the plain fit.
        alpha: weight of the TRUE targets, in [0, 1]: one for all steps after the first, one for each, or
            ``optimal``: the one that fits the validation samples best.
        validation: share of the training samples that is held out, in [0, 1).

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), sections 3 and 4.
    Differs: alpha is clipped to [0, 1].
    """

    generations: int = 10
    alpha: Alpha = "optimal"
    validation: float = 0.25

    def __post_init__(self) -> None:
        self.each()
        check_alpha(self.alpha, self.generations)

    def each(self) -> Static:
        """How the data is split and measured on."""
        return Static(validation=self.validation)

    def check(self, recipe: Any) -> None:
        """Preflight: a kernel machine, squared error, no teacher."""
        check_recipe(recipe, self.alpha, self.validation)
        if not isinstance(recipe.student, KernelRidgeStudent):
            raise ConfigError(
                f"student is {type(recipe.student).__name__} but this scenario is the closed form of "
                "kernel_ridge: choose that, or scenario self_distillation"
            )
        if any(not isinstance(objective, ProbabilityMSE) for objective in recipe.objective):
            raise ConfigError("kernel_ridge minimises squared error: give objective probability_mse alone")
        if load_data(recipe).train.labelled is not None:
            raise ConfigError(
                "kernel_ridge fits every label but the data hides some: leave data.labelled out"
            )

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The last step of a finished run."""
        form = inputs(recipe)
        spec = Spec(classes=classes, channels=form.channels, size=form.size)
        machine = recipe.student.build(spec, torch.Generator())
        assert isinstance(machine, KernelMachine)
        return machine.hold(state["points"], state["duals"]).eval()

    def run(self, recipe: Any, run: Run) -> dict[str, Any]:
        """All steps on the recipe's data; returns the figures of the last on its test split."""
        plan = self.each()
        desk = Desk(plan, recipe, run)
        steps = Steps(desk, recipe.student)
        machine: KernelMachine | None = None
        lines: list[dict[str, Any]] = []
        for number in range(1, self.generations + 1):
            before = machine
            machine, alpha, found = steps.next(None if before is None else of_generation(self.alpha, number))
            said = partial(record, number, alpha, found, partial(steps.tested, machine))
            lines.append(run.once(f"generation-{number}", said))
            run.log("generation", **lines[-1])
        assert machine is not None
        pair = pair_of(desk, machine, before)
        found_figures = plan.measure(pair, pair.source(desk.test), list(desk.splits.test.classes))
        found_figures["student"]["squared_error"] = lines[-1]["squared_error"]
        return {
            "recipe": recipe.name, "scenario": "kernel_self_distillation", "seed": run.seed,
            **figures.about(desk.splits), "protocol": desk.protocol() | self._protocol(),
            **found_figures, "generations": lines,
        }  # fmt: skip

    def _protocol(self) -> dict[str, Any]:
        return {
            "generations": self.generations, "alpha": f"{self.alpha}, of the true targets",
            "evaluated": "last step, on the test split; nothing is chosen on it",
            "interval": "95 %, of the test sample, not of seeds",
        }  # fmt: skip


class Steps:
    """The steps over the data of one run; each goes on from the fit of the one before."""

    def __init__(self, desk: Desk, student: KernelRidgeStudent) -> None:
        self.desk, self.student = desk, student
        self.classes = len(desk.splits.train.classes)
        self.points, labels = _pixels(desk.everything.subset(desk.index))
        self.target = F.one_hot(labels, self.classes).double()
        self.spectrum = Spectrum.of(rbf(self.points, self.points, student.gamma))
        self.fit: Tensor | None = None

    def next(self, alpha: float | None) -> tuple[KernelMachine, float | None, OptimalAlpha | None]:
        """The machine of the next step, its alpha, and how that was chosen where ``alpha`` is None."""
        found = None
        if self.fit is None:
            target, alpha = self.target, None
        else:
            if alpha is None:
                found = self._chosen(self.fit)
                alpha = found.alpha
            target = alpha * self.target + (1 - alpha) * self.fit
        self.fit = self.spectrum.fit(target, self.student.ridge)
        return self._machine(target), alpha, found

    @torch.no_grad()
    def tested(self, machine: KernelMachine) -> tuple[Tensor, Tensor]:
        """Its class shares [N, C] on the test split, and the classes [N]."""
        pixels, labels = _pixels(self.desk.test)
        return machine.shares(pixels), labels

    def _chosen(self, fit: Tensor) -> OptimalAlpha:
        pixels, labels = _pixels(self.desk.validation)
        return chosen(self._machine(self.target).shares(pixels), self._machine(fit).shares(pixels), labels)

    def _machine(self, target: Tensor) -> KernelMachine:
        """The fit of ``target`` [n, C] as a network."""
        machine = KernelMachine(self.student.gamma, self.points.shape[1], self.classes)
        return machine.hold(self.points, self.spectrum.dual(target, self.student.ridge))


def _pixels(batches: Batches) -> tuple[Tensor, Tensor]:
    """All images as rows [N, d] in the order of the index, and their classes [N]."""
    (batch,) = batches.in_order(batches.count).epoch(0)
    return batch.inputs.flatten(1).double(), batch.labels
