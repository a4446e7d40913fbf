"""What a continual run holds between its phases: the stream, the pair, the current task, the figures."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.contracts import Batch, Selection
from limbeck.data.batches import Batches
from limbeck.engine import shared
from limbeck.engine.distillation import Ask
from limbeck.engine.fit import Source, Turn, fit
from limbeck.engine.run import Run
from limbeck.scenarios import figures
from limbeck.scenarios.fit_together import inputs, load_data
from limbeck.scenarios.pair import Pair, constants, hashes


class Session:
    """The moving parts of ``scenarios.continual``.

    Args:
        recipe: the recipe; its scenario is a ``Continual``.
        run: the run to work in.
    """

    def __init__(self, recipe: Any, run: Run) -> None:
        self.recipe, self.run, self.plan = recipe, run, recipe.scenario
        self.splits = load_data(recipe)
        self.stream = self.plan.stream(self.splits, run.seed)
        self.form = inputs(recipe)
        spec = self.plan.spec(recipe, len(self.stream.classes))
        self.pair = Pair(
            recipe, run, spec, self._example(2), shared_query=self.plan.query == "student",
            samples=len(self.splits.train),
        )  # fmt: skip
        self.pair.agree(train=self.splits.train.fingerprint, test=self.splits.test.fingerprint)
        self.selection = Selection(recipe.selector)
        self.student, self.teacher = self.pair.student, self.pair.teacher
        if not self.pair.learns:
            self.pair.order = torch.tensor(self.stream.class_order)
            if self.pair.adapting is not None:
                self.pair.adapting.order = self.pair.order
        self.tests: list[Source] = []
        self.seen: list[dict[str, Any]] = []
        self._announce()

    def start_task(self, number: int) -> None:
        """Both networks get ready for task ``number``; its batches are planned."""
        self.task = self.stream.task(number)
        self.window = (self.task.start, self.task.stop)
        for name, net in self.pair.nets().items():
            net.start_task(number, self.run.generator(name, "task", number))
        self.batches = Batches(
            self.splits.train,
            self.task.train_index,
            self.stream.train_labels,
            self.recipe.views,
            batch_size=self.plan.batch_size,
            drop_last=self.plan.drop_last,
            seed=self.run.derive("batches", number),
            **self._format(),
        )
        self.source = self.pair.source(self.batches)
        self.selected = self.pair.source(self.batches, self.selection)
        self.pair.start(f"task{number}", self.batches.index, self.batches.labels)
        test = Batches(
            self.splits.test,
            self.task.test_index,
            self.stream.test_labels,
            batch_size=self.plan.eval_batch_size,
            shuffle=False,
            **self._format(),
        )
        self.tests.append(self.pair.source(test))

    def teacher_phase(self) -> None:
        """The teacher learns the task's labels; one that learnt them before in the same way is taken over."""
        assert self.teacher is not None
        if not self.pair.learns:  # it was trained before, on all classes
            return
        stage, (epochs, optim) = f"task{self.task.number}/teacher", self.plan.teacher_side()
        reuse = self.run.settings.reuse_teachers
        self.pair.teach(True)
        book = shared.Teachers(self.pair.root, self._teacher_key())
        if not (reuse and book.take(self.run, stage, self.teacher)):
            turn = Turn("teacher", self.pair.lesson(self.window), optim, constants(self.pair.nets()))
            self._fit(stage, [turn], epochs)
            if reuse:
                book.keep(self.run, stage, self.teacher)
        self.teacher.finish_task()
        self.pair.teach(False)

    def student_phase(self) -> None:
        """The student learns from the labels, and from the teacher that stands still."""
        frozen = constants({"student": self.student})
        ask: Ask | None = None
        captured = self.pair.captured_teacher(self.batches, self.plan.epochs)
        if self.teacher is not None:
            frozen["teacher"] = self.teacher
            ask = self.pair.remembered(captured)
        module = self.pair.distillation(self.window, ask, self.selection)
        turn = Turn("student", module, self.plan.optim, frozen)
        self._fit(f"task{self.task.number}/student", [turn], self.plan.epochs, self.selected)
        self.student.finish_task()
        if captured is not None:
            captured.delete()

    def joint_phase(self) -> None:
        """On every batch the teacher takes a step, then the student, against what the teacher said before."""
        assert self.teacher is not None
        self.pair.teach(True)
        lesson = self.pair.lesson(self.window, keep=True)
        first = Turn("teacher", lesson, self.plan.teacher_side()[1], constants(self.pair.nets()))
        second = Turn(
            "student", self.pair.distillation(self.window, lesson.said, self.selection), self.plan.optim, {}
        )
        self._fit(f"task{self.task.number}/joint", [first, second], self.plan.epochs)
        self.teacher.finish_task()
        self.student.finish_task()
        self.pair.teach(False)

    def evaluate(self) -> None:
        """Measure both networks on the test data of every task seen."""
        number = self.task.number
        known = self.run.once(f"task{number}/evaluation", self._measure)
        for who in self.pair.nets():
            self.run.log("evaluation", task=number, who=who, accuracy=known[who]["accuracy"])
        self.seen.append(known)

    def result(self) -> dict[str, Any]:
        """The figures of the whole run."""
        image = self._example(1).to(self.run.device)
        cost = self.run.once("cost", lambda: figures.cost(self.pair.nets(), image, self.pair.trainable()))
        found = figures.continual(self.recipe, self.run, self.stream, self.seen, cost)
        if self.student.query_dim is None:
            found["protocol"]["query"] = None
        return found

    def _fit(self, stage: str, turns: list[Turn], epochs: int, source: Source | None = None) -> None:
        fit(
            self.run,
            stage,
            turns,
            source or self.source,
            epochs,
            task=self.task.number,
            tasks=self.plan.tasks,
        )

    def _teacher_key(self) -> dict[str, Any]:
        """All that the teacher's weights after this task depend on."""
        settings = self.run.settings
        return {
            "teacher": repr(self.recipe.teacher), "query": self.pair.query_hash, "seed": self.run.seed,
            "data": self.splits.train.fingerprint, "views": repr(self.recipe.views), "form": repr(self.form),
            "order": self.stream.class_order, "sizes": self.stream.sizes, "task": self.task.number,
            "batch": [self.plan.batch_size, self.plan.drop_last], "side": repr(self.plan.teacher_side()),
            "constants": hashes({"teacher": self.teacher} if self.teacher is not None else {}),
            "precision": settings.precision, "compile": settings.compile, "device": self.run.device.type,
            "cache": settings.cache,
        }  # fmt: skip

    def _format(self) -> dict[str, Any]:
        form = self.form
        return {"size": form.size, "channels": form.channels, "mean": form.mean, "std": form.std}

    def _example(self, count: int) -> Batch:
        form = self.form
        zeros = torch.zeros(count, dtype=torch.int64)
        pixels = (count, form.channels, form.size, form.size)
        inputs = torch.rand(pixels, generator=self.run.generator("example"))
        return Batch(inputs=inputs, labels=zeros, index=zeros, view=zeros)

    def _measure(self) -> dict[str, Any]:
        with figures.watched(self.pair.nets(), self.pair.classes) as features:
            logits, labels = self.pair.answers(self.tests, self.task.stop)
        last = self.task.number + 1 == self.plan.tasks
        found = figures.measure(logits, labels, self.stream, self.task.number, full=last)
        if last:
            if "fidelity" in found:
                found["fidelity"] |= figures.cka(features, len(labels))
            for who in self.pair.nets():
                found[who]["key_accuracy"] = self.pair.key_accuracy(who, self.tests)
        return found

    def _announce(self) -> None:
        """Tell the meter how many steps the run will take."""
        size, epochs = self.plan.batch_size, self.plan.epochs
        for task in self.stream:
            count = len(task.train_index)
            steps = count // size if self.plan.drop_last else -(-count // size)
            stages = {"student": epochs}
            if self.teacher is not None and self.plan.schedule == "joint":
                stages = {"joint": epochs}
            elif self.teacher is not None:
                stages = {"teacher": self.plan.teacher_side()[0], "student": epochs}
            for kind, times in stages.items():
                self.run.meter.plan[f"task{task.number}/{kind}"] = steps * times
