"""One data set, one training: a teacher (or none) and a student."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Net, Scenario, Selection, Selector, Spec
from limbeck.data.batches import Batches
from limbeck.data.images import ImageSet, Splits, stratified
from limbeck.data.together import Together
from limbeck.engine import shared
from limbeck.engine.capture import Replayable
from limbeck.engine.fit import Source, Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.engine.seeds import derive
from limbeck.engine.state import value_hash
from limbeck.errors import ConfigError
from limbeck.scenarios import figures
from limbeck.scenarios.course import Lessons, facts_of
from limbeck.scenarios.fit_together import check_networks, has_teacher, inputs, load_data
from limbeck.scenarios.pair import Pair, build_student, constants, hashes, with_weights


@dataclass(frozen=True, kw_only=True)
class Static(Scenario):
    """A student trained on one data set, from labels, a teacher, or both.

    A teacher that learns is trained first, on the labels; then it stands still.

    Attributes:
        epochs: passes over the data.
        batch_size: samples per step.
        drop_last: leave out an epoch's last batch that is not full.
        eval_batch_size: samples per evaluation step.
        optim: the student's optimiser.
        teacher_epochs: passes of a teacher that learns; None = as many as the student's.
        teacher_optim: its optimiser; None = the student's.
        validation: share of the training samples that is held out, in [0, 1): selectors and students that
            choose something choose it there. Where the data says which labels can be trusted, these alone.
        equal_steps: where a selector leaves samples out, an epoch still has the steps of all samples, and
            those that are left go round.
        unlabelled_batch: samples without a label that each step has besides ``batch_size`` labelled ones;
            an epoch then goes once over the unlabelled samples. 0 = one batch of both kinds.
    """

    epochs: int = 20
    batch_size: int = 64
    drop_last: bool = False
    eval_batch_size: int = 256
    optim: Optim = field(default_factory=lambda: Optim(schedule="cosine"))
    teacher_epochs: int | None = None
    teacher_optim: Optim | None = None
    validation: float = 0.0
    equal_steps: bool = False
    unlabelled_batch: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")
        if self.teacher_epochs is not None and self.teacher_epochs < 1:
            raise ConfigError(f"teacher_epochs is {self.teacher_epochs}: allowed are values of at least 1")
        if not 0 <= self.validation < 1:
            raise ConfigError(f"validation is {self.validation}: allowed are shares from 0 to below 1")
        if self.unlabelled_batch < 0:
            raise ConfigError(
                f"unlabelled_batch is {self.unlabelled_batch}: allowed are values of at least 0"
            )

    def check(self, recipe: Any) -> None:
        """Preflight: the data, and whether both networks fit it and each other."""
        train = load_data(recipe).train
        check_networks(recipe, classes=len(train.classes))
        known = len(_labelled(train, torch.arange(len(train))))
        if self.unlabelled_batch and known in (0, len(train)):
            raise ConfigError(
                f"scenario.unlabelled_batch is {self.unlabelled_batch} but {'all' if known else 'no'} "
                f"samples of {train.name} have labels: take data whose labels are partly hidden, such as "
                "data: {name: part, labelled: 4}"
            )
        if self.unlabelled_batch and not _plain(recipe.selector):
            raise ConfigError("a selector and scenario.unlabelled_batch do not go together: leave one out")

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The student of a finished run, in evaluation mode."""
        form = inputs(recipe)
        spec = Spec(classes=classes, channels=form.channels, size=form.size)
        return with_weights(build_student(recipe, spec, recipe.seed), state)

    def run(self, recipe: Any, run: Run) -> dict[str, Any]:
        """Train on the recipe's data; returns the figures on its test split."""
        desk = Desk(self, recipe, run)
        pair = desk.pair
        if pair.learns:
            self.teach(pair, desk)
        pair.observe(desk.everything.subset(desk.index))
        lessons = Lessons(pair, desk.everything, desk.learning, desk.held_out, self.optim)
        pair.prepare(lessons)
        selection = recipe.selector.prepare(lessons)
        run.modules.add_module("selector", selection)
        self.train(pair, desk.source(selection), capture=desk.learning, selection=selection)
        tuned = pair.tune(desk.validation, run) if len(desk.held_out) else {}
        found = self.measure(pair, pair.source(desk.test), list(desk.splits.test.classes))
        return {
            "recipe": recipe.name, "scenario": "static", "seed": run.seed,
            **figures.about(desk.splits), "protocol": self.protocol(recipe) | desk.protocol(),
            **found, **facts_of(selection), **pair.facts(), **({"tuned": tuned} if tuned else {}),
        }  # fmt: skip

    def teach(self, pair: Pair, desk: Desk) -> None:
        """The stage ``teacher``: it learns the labels, or is taken from a run that taught it the same way."""
        run, teacher = pair.run, pair.teacher
        assert teacher is not None
        epochs, optim = self.teacher_epochs or self.epochs, self.teacher_optim or self.optim
        key = desk.teacher_key() | {"epochs": epochs, "optim": repr(optim)}
        book = shared.Teachers(pair.root, key)
        reuse = run.settings.reuse_teachers
        pair.teach(True)
        if not (reuse and book.take(run, "teacher", teacher)):
            turn = Turn("teacher", pair.lesson(None), optim, constants(pair.nets()))
            source = pair.source(desk.lessons)
            run.meter.plan["teacher"] = source.steps * epochs
            fit(run, "teacher", [turn], source, epochs)
            if reuse:
                book.keep(run, "teacher", teacher)
        teacher.finish_task()
        pair.teach(False)

    def train(
        self, pair: Pair, source: Source, *, capture: Replayable | None = None,
        selection: Selection | None = None,
    ) -> None:  # fmt: skip
        """The stage ``train`` over ``source``; the teacher is captured over ``capture`` where that pays."""
        run, frozen = pair.run, constants(pair.nets())
        ask, captured = None, None
        if pair.teacher is not None:
            pair.teach(False)
            frozen["teacher"] = pair.teacher
            captured = None if capture is None else pair.captured_teacher(capture, self.epochs)
            ask = pair.remembered(captured)
        if isinstance(capture, Batches):
            pair.start("train", capture.index, capture.labels)
        run.meter.plan["train"] = source.steps * self.epochs
        turns = [Turn("student", pair.distillation(None, ask, selection), self.optim, frozen)]
        lesson = None if selection is None else selection.lesson()
        if lesson is not None:
            turns.insert(0, Turn("selector", *lesson, {}))
        fit(run, "train", turns, source, self.epochs)
        pair.student.finish_task()
        if captured is not None:
            captured.delete()

    def measure(self, pair: Pair, test: Source, names: list[str]) -> dict[str, Any]:
        """Accuracy, calibration, fidelity and cost on ``test``."""

        def compute() -> dict[str, Any]:
            with figures.watched(pair.nets(), pair.classes) as features:
                logits, labels = pair.answers([test], len(names))
            image = next(iter(test.epoch(0)))
            one = Batch(
                inputs=image.inputs[:1], labels=image.labels[:1], index=image.index[:1], view=image.view[:1]
            )
            return figures.static(logits, labels, names, features) | {
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
            "optimiser": f"{self.optim.name}, lr {self.optim.lr}", "ema": self.optim.ema,
            "evaluated": "last epoch, on the test split; nothing is chosen on it",
            "interval": "95 %, of the test sample, not of seeds",
        }  # fmt: skip


class Desk:
    """The data of one static run, and the pair that works on it."""

    def __init__(self, plan: Static, recipe: Any, run: Run) -> None:
        self.plan, self.recipe, self.run, self.form = plan, recipe, run, inputs(recipe)
        self.splits: Splits = load_data(recipe)
        train = self.splits.train
        self.index, self.held_out = _held_out(train, plan.validation, run.derive("validation"))
        self.everything = self._batches(train, shuffle=False)
        self.learning = self._batches(train, self.index, views=recipe.views)
        self.test = self._batches(self.splits.test, shuffle=False)
        spec = Spec(classes=len(train.classes), channels=self.form.channels, size=self.form.size)
        own = recipe.teacher.lessons() if has_teacher(recipe) else None
        self.teacher_data = None if own is None else own.seeded(recipe.seed).load().train
        self.pair = Pair(
            recipe, run, spec, next(iter(self.learning.in_order(2).epoch(0))), samples=len(train),
            teacher_classes=None if self.teacher_data is None else len(self.teacher_data.classes),
        )  # fmt: skip
        self.pair.agree(train=train.fingerprint, test=self.splits.test.fingerprint)
        if self.teacher_data is not None and self.pair.judged and self.teacher_data.classes != train.classes:
            run.warn(
                f"the teacher learns the classes {', '.join(self.teacher_data.classes[:3])}, ... of "
                f"{self.teacher_data.name} but the student has {', '.join(train.classes[:3])}, ...: logits "
                "are matched by number alone"
            )

    @property
    def validation(self) -> Batches:
        """The held-out samples without augmentation."""
        return self.everything.subset(self.held_out)

    @cached_property
    def lessons(self) -> Batches:
        """What a teacher that learns is trained on: its own data, or all labelled training samples."""
        if self.teacher_data is not None:
            return self._batches(self.teacher_data, views=self.recipe.views)
        return self._batches(self.splits.train, _labelled(self.splits.train, self.index), self.recipe.views)

    def source(self, selection: Selection) -> Source:
        """The batches of the student's training."""
        if self.plan.unlabelled_batch:
            train = self.splits.train
            known = _labelled(train, self.index)
            rest = self.index[~torch.isin(self.index, known)]
            one = self._batches(train, known, self.recipe.views)
            other = self._batches(train, rest, self.recipe.views, size=self.plan.unlabelled_batch)
            return self.pair.with_queries(Together(one, other), self.learning)
        if _plain(self.recipe.selector):
            return self.pair.source(self.learning)
        return self.pair.source(self.learning, selection, equal_steps=self.plan.equal_steps)

    def teacher_key(self) -> dict[str, Any]:
        """All that the teacher's weights depend on, besides epochs and optimiser."""
        settings, teacher = self.run.settings, self.pair.teacher
        return {
            "teacher": repr(self.recipe.teacher), "data": self.lessons.describe(), "seed": self.run.seed,
            "index": value_hash(self.lessons.index.tolist()),
            "labels": value_hash(self.lessons.labels.tolist()),
            "batch": [self.plan.batch_size, self.plan.drop_last],
            "constants": hashes({"teacher": teacher} if teacher is not None else {}),
            "precision": settings.precision, "compile": settings.compile, "device": self.run.device.type,
        }  # fmt: skip

    def protocol(self) -> dict[str, Any]:
        """What the run's data was."""
        plan, known = self.plan, self.splits.train.labelled
        found: dict[str, Any] = {
            "training_samples": len(self.index), "validation_samples": len(self.held_out),
            "labelled_samples": len(self.index) if known is None else int(known[self.index].sum()),
            "equal_steps": plan.equal_steps,
        }  # fmt: skip
        if self.pair.learns:
            found["teacher"] = {
                "epochs": plan.teacher_epochs or plan.epochs, "data": self.lessons.images.name,
                "samples": len(self.lessons.index),
            }  # fmt: skip
        return found

    def _batches(
        self, images: ImageSet, index: Tensor | None = None, views: Any = None, *, shuffle: bool = True,
        size: int | None = None,
    ) -> Batches:  # fmt: skip
        plan, form = self.plan, self.form
        size = size or (plan.batch_size if shuffle else plan.eval_batch_size)
        return Batches(
            images, index, views=views, batch_size=size,
            drop_last=plan.drop_last and shuffle, seed=derive(self.run.seed, "batches"), shuffle=shuffle,
            size=form.size, channels=form.channels, mean=form.mean, std=form.std,
        )  # fmt: skip


def _plain(selector: Selector) -> bool:
    """Whether the selector takes every sample as it comes."""
    kind = type(selector)
    return (kind.indices, kind.prepare) == (Selector.indices, Selector.prepare)


def _held_out(images: ImageSet, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to learn from and positions held out, with equal class shares; trusted ones where known."""
    if share == 0:
        return torch.arange(len(images)), torch.arange(0)
    if images.labelled is not None and not images.labelled.any():
        raise ConfigError(
            f"validation is {share} but no label of {images.name} may be read, so held-out samples tell "
            "nothing: set it to 0"
        )
    seed, trusted = seed % 2**32, images.trusted
    if trusted is None:
        return stratified(images.labels, share, seed)
    count, among = math.ceil(share * len(images)), trusted.nonzero().flatten()
    if count > len(among):
        raise ConfigError(
            f"validation is {share}, {count} samples, but only {len(among)} are trusted: hold out fewer"
        )
    held = among
    if count < len(among):
        held = among[stratified(images.labels[among], count / len(among), seed)[1]]
    every = torch.arange(len(images))
    return every[~torch.isin(every, held)], held


def _labelled(images: ImageSet, index: Tensor) -> Tensor:
    """Those of ``index`` whose label may be read."""
    return index if images.labelled is None else index[images.labelled[index]]
