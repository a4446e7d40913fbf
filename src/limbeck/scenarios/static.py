"""One data set, one training: a frozen teacher (or none) and a student."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from limbeck.contracts import Batch, Net, Scenario, Spec
from limbeck.data.batches import Batches
from limbeck.engine.capture import Replayable
from limbeck.engine.fit import Source, Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.scenarios import figures
from limbeck.scenarios.fit_together import check_networks, inputs
from limbeck.scenarios.pair import Pair, build_networks, constants, remembered, with_weights


@dataclass(frozen=True, kw_only=True)
class Static(Scenario):
    """A student trained on one data set, from labels, a frozen teacher, or both.

    Attributes:
        epochs: passes over the data.
        batch_size: samples per step.
        drop_last: leave out an epoch's last batch that is not full.
        eval_batch_size: samples per evaluation step.
        optim: the student's optimiser.
    """

    epochs: int = 20
    batch_size: int = 64
    drop_last: bool = False
    eval_batch_size: int = 256
    optim: Optim = field(default_factory=lambda: Optim(schedule="cosine"))

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")

    def check(self, recipe: Any) -> None:
        """Preflight: the data, and whether both networks fit it and each other."""
        if recipe.teacher.learns:
            raise ConfigError(
                "scenario is static but the teacher learns in phases of its own: use continual, or a trained "
                "teacher (timm, module)"
            )
        check_networks(recipe, classes=len(recipe.data.load().train.classes))

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The student of a finished run, in evaluation mode."""
        form = inputs(recipe)
        spec = Spec(classes=classes, channels=form.channels, size=form.size)
        student, _ = build_networks(recipe, spec, recipe.seed)
        return with_weights(student, state)

    def run(self, recipe: Any, run: Run) -> dict[str, Any]:
        """Train on the recipe's data; returns the figures on its test split."""
        splits, form = recipe.data.load(), inputs(recipe)
        pixels: dict[str, Any] = {
            "size": form.size, "channels": form.channels, "mean": form.mean, "std": form.std
        }  # fmt: skip
        train = Batches(
            splits.train, views=recipe.views, batch_size=self.batch_size, drop_last=self.drop_last,
            seed=run.derive("batches"), **pixels,
        )  # fmt: skip
        test = Batches(splits.test, batch_size=self.eval_batch_size, shuffle=False, **pixels)
        spec = Spec(classes=len(splits.train.classes), channels=form.channels, size=form.size)
        pair = Pair(recipe, run, spec, next(iter(train.in_order(2).epoch(0))))
        self.train(pair, pair.source(train, recipe.selector), capture=train)
        found = self.measure(pair, pair.source(test), list(splits.test.classes))
        return {
            "recipe": recipe.name, "scenario": "static", "seed": run.seed, "data": figures.data_name(splits),
            "protocol": self.protocol(recipe), **found,
        }  # fmt: skip

    def train(self, pair: Pair, source: Source, *, capture: Replayable | None = None) -> None:
        """The stage ``train`` over ``source``; the teacher is captured over ``capture`` where that pays."""
        run, frozen = pair.run, constants(pair.nets())
        ask, captured = None, None
        if pair.teacher is not None:
            pair.teach(False)
            pair.teacher.requires_grad_(False)
            frozen["teacher"] = pair.teacher
            captured = None if capture is None else pair.captured_teacher(capture, self.epochs)
            ask = pair.ask_live if captured is None else remembered(captured)
        run.meter.plan["train"] = source.steps * self.epochs
        turn = Turn("student", pair.distillation(None, ask), self.optim, frozen)
        fit(run, "train", [turn], source, self.epochs)
        pair.student.finish_task()
        if captured is not None:
            captured.delete()

    def measure(self, pair: Pair, test: Source, names: list[str]) -> dict[str, Any]:
        """Accuracy, calibration, fidelity and cost on ``test``."""

        def compute() -> dict[str, Any]:
            logits, labels = pair.answers([test], len(names))
            image = next(iter(test.epoch(0)))
            one = Batch(
                inputs=image.inputs[:1], labels=image.labels[:1], index=image.index[:1], view=image.view[:1]
            )
            return figures.static(logits, labels, names) | {
                "cost": {"teacher": None}
                | figures.cost(pair.nets(), one.to(pair.run.device), pair.trainable())
            }

        found: dict[str, Any] = pair.run.once("evaluation", compute)
        return found

    def protocol(self, recipe: Any) -> dict[str, Any]:
        """What a reader must know to compare the figures with others."""
        return {
            "epochs": self.epochs, "batch": self.batch_size, "drop_last": self.drop_last,
            "views": None if recipe.views is None else figures.changed(recipe.views),
            "optimiser": f"{self.optim.name}, lr {self.optim.lr}",
            "evaluated": "last epoch, on the test split; nothing is chosen on it",
            "interval": "95 %, of the test sample, not of seeds",
        }  # fmt: skip
