"""Class-incremental streams without replay: in every task the teacher learns first, then the student.

Source: continual distillation learning, Zhang, Guo, Xiang, arXiv 2407.13911; without a teacher it is the
protocol of L2P, DualPrompt and CODA-Prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from limbeck.contracts import Net, Scenario, Selector, Spec
from limbeck.data.images import Splits
from limbeck.data.stream import Stream
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.scenarios.fit_together import check_networks, has_teacher, inputs, load_data
from limbeck.scenarios.pair import build_student, with_weights
from limbeck.scenarios.session import Session


@dataclass(frozen=True, kw_only=True)
class Continual(Scenario):
    """A stream of tasks, each with its own classes; the data of earlier tasks is never read again.

    Attributes:
        tasks: number of tasks.
        class_order: the classes in order of arrival: ``shuffled`` by the run's seed, ``natural``, or a list
            with each class id once.
        sizes: classes per task; None = equal shares.
        schedule: ``teacher_then_student``: in each task the teacher learns for all its epochs, then the
            student (versions 2 to 4 of the paper); ``joint``: on every mini-batch first one teacher
            step, then one student step against what the teacher said before it (version 1).
        epochs: per task, of the student.
        teacher_epochs: per task, of the teacher; None = as many. Under ``joint`` it is not allowed.
        batch_size: samples per step.
        drop_last: leave out an epoch's last batch that is not full.
        eval_batch_size: samples per evaluation step.
        optim: the student's optimiser, made afresh in every task.
        teacher_optim: the teacher's; None = the same.
        query: whose frozen features select the teacher's prompts: the ``student``'s, as the official code
            does, or the teacher's ``own``.
    """

    tasks: int = 10
    class_order: Literal["shuffled", "natural"] | tuple[int, ...] = "shuffled"
    sizes: tuple[int, ...] | None = None
    schedule: Literal["teacher_then_student", "joint"] = "teacher_then_student"
    epochs: int = 20
    teacher_epochs: int | None = None
    batch_size: int = 64
    drop_last: bool = True
    eval_batch_size: int = 256
    optim: Optim = field(default_factory=Optim)
    teacher_optim: Optim | None = None
    query: Literal["student", "own"] = "student"

    def __post_init__(self) -> None:
        for name in ("tasks", "epochs", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")
        if self.teacher_epochs is not None and self.teacher_epochs < 1:
            raise ConfigError(f"teacher_epochs is {self.teacher_epochs}: allowed are values of at least 1")
        if self.teacher_epochs is not None and self.schedule == "joint":
            raise ConfigError("teacher_epochs is set but schedule is joint, where both take the same steps")

    def check(self, recipe: Any) -> None:
        """Preflight: the data, the stream, and whether both networks fit it and each other."""
        splits = load_data(recipe)
        stream = self.stream(splits, recipe.seed)
        check_networks(recipe, classes=len(stream.classes))
        kind = type(recipe.selector)
        if kind.prepare is not Selector.prepare:
            raise ConfigError(
                f"selector {kind.__name__} looks at its data before the training: use scenario static"
            )
        if self.schedule == "joint" and kind.indices is not Selector.indices:
            raise ConfigError(
                f"selector {kind.__name__} leaves samples out, but under joint the "
                "teacher needs them all: use teacher_then_student"
            )
        if recipe.teacher.lessons() is not None:
            raise ConfigError(
                "the teacher has data of its own, but in a stream it learns the tasks: leave it out"
            )
        if recipe.teacher.observes:
            raise ConfigError(
                f"teacher {type(recipe.teacher).__name__} looks at all data before it teaches, and a stream "
                "never has it: use scenario static"
            )
        if self.schedule == "joint" and not has_teacher(recipe):
            raise ConfigError("scenario.schedule is joint but there is no teacher: name one, or change it")
        if self.schedule == "joint" and not recipe.teacher.learns:
            raise ConfigError(
                "scenario.schedule is joint but the teacher was trained before and learns nothing: "
                "use teacher_then_student"
            )
        for task in stream:
            if self.drop_last and len(task.train_index) < self.batch_size:
                raise ConfigError(
                    f"scenario.batch_size is {self.batch_size} but task {task.number} has only "
                    f"{len(task.train_index)} samples: use a smaller one, or drop_last=false"
                )

    def stream(self, splits: Splits, seed: int) -> Stream:
        """The stream of tasks that the run's seed gives."""
        order = None if self.class_order == "shuffled" else self.class_order
        return Stream(splits, self.tasks, order, self.sizes, seed)

    def spec(self, recipe: Any, classes: int) -> Spec:
        """What the networks are built for."""
        form = inputs(recipe)
        return Spec(classes=classes, tasks=self.tasks, channels=form.channels, size=form.size)

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The student of a finished run, in evaluation mode."""
        shared = self.query == "student"
        student = build_student(recipe, self.spec(recipe, classes), recipe.seed, shared_query=shared)
        return with_weights(student, state)

    def teacher_side(self) -> tuple[int, Optim]:
        """Epochs and optimiser of the teacher."""
        return self.teacher_epochs or self.epochs, self.teacher_optim or self.optim

    def run(self, recipe: Any, run: Run) -> dict[str, Any]:
        """Learn the stream; returns the accuracy matrices and what follows from them."""
        session = Session(recipe, run)
        for number in range(self.tasks):
            session.start_task(number)
            if session.teacher is not None and self.schedule == "joint":
                session.joint_phase()
            else:
                if session.teacher is not None:
                    session.teacher_phase()
                session.student_phase()
            session.evaluate()
        return session.result()
