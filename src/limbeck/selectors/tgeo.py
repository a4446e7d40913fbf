"""TGeo-KD: for every sample, how far to trust the teacher and how far the label, learnt by validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import Batch, Course, Outputs, Progress, Selection, Selector
from limbeck.engine.curvature import at_rest, call, parameters_of, unrolled_step
from limbeck.engine.optim import Optim
from limbeck.engine.shards import is_shared
from limbeck.errors import ConfigError, NonFiniteError, unknown
from limbeck.nets.backbones import seeded

Rule = Literal["learned", "released", "constant", "ada", "wls", "anneal", "rw"]
Option = Literal[2, 3, 6, 7]

WIDTHS = {2: 3, 3: 9, 6: 9, 7: 2}  # columns of each option's state, in units of C
LAST = Progress(step=1, steps=1)


def class_mean_teacher(teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean prediction of the teacher over the samples of each class: [C, C], rows are distributions.

    Args:
        teacher: probabilities [N, C] on the whole training set.
        labels: class ids [N].
        classes: C.

    Raises:
        NonFiniteError: a row of ``teacher`` is not finite: it would spoil the mean of its class.

    Source: TGeo-KD (arXiv 2312.15112), T-bar. Differs: a class without samples gets the uniform row, of which
    the paper says nothing.
    """
    sound = torch.isfinite(teacher).all(1)
    if not sound.all():
        spoilt = (~sound).nonzero().flatten()
        raise NonFiniteError(
            f"the teacher's answer is not finite in row {int(spoilt[0])} of {len(teacher)} ({len(spoilt)} "
            "such): mend those samples or that teacher"
        )
    members = F.one_hot(labels, classes).to(teacher)
    count = members.sum(0)[:, None]
    return torch.where(count > 0, members.T @ teacher / count.clamp(min=1), 1 / classes)


def geometry_state(
    student: Tensor, teacher: Tensor, labels: Tensor, class_mean: Tensor, option: Option = 3
) -> Tensor:
    """What the MLP knows of each sample: vertices, edges and products of its two triangles, detached.

    With S and T the predictions at temperature 1, G the one-hot label and M the class's mean prediction:
    option 2 is the squared edges M-S, G-S, T-S [B, 3C]; 3 is S, T, G, M and the squared edges M-S, G-S, T-S,
    T-G, M-G [B, 9C]; 6 is the vertices, the edges of 2 and the products (M-S)(G-S), (T-S)(G-S) [B, 9C]; 7 is
    those products alone [B, 2C]. Everything is element by element.

    Args:
        student: logits [B, C].
        teacher: logits [B, C].
        labels: class ids [B].
        class_mean: M of all classes [C, C].
        option: which of the four.

    Source: official code of TGeo-KD, ``state_design``; option 3 is the one that it uses.
    """
    s, t = (losses.full_precision(x.detach()).softmax(-1) for x in (student, teacher))
    g, m = F.one_hot(labels, s.shape[1]).to(s), class_mean.to(s)[labels]
    vertices, products = [s, t, g, m], [(m - s) * (g - s), (t - s) * (g - s)]
    edges = [side.square() for side in (m - s, g - s, t - s, t - g, m - g)]
    parts = {
        2: edges[:3],
        3: [*vertices, *edges],
        6: [*vertices, *edges[:3], *products],
        7: products,
    }
    return torch.cat(parts[option], dim=1)


class Controller(nn.Sequential):
    """From the state [B, width] to the teacher's share alpha [B] in (0, 1): an MLP of 32 and 16 units."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 32), nn.LeakyReLU(0.01), nn.Linear(32, 16), nn.LeakyReLU(0.01), nn.Linear(16, 1)
        )

    def forward(self, state: Tensor) -> Tensor:
        """See the class."""
        alpha: Tensor = super().forward(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return alpha.sigmoid().squeeze(-1)


def ada_share(teacher: Tensor, labels: Tensor) -> Tensor:
    """ADA-KD's alpha [B] in [0, 1]: max(0, T of the label - mean of the other T), from logits [B, C].

    Source: official code of TGeo-KD.
    """
    right = losses.full_precision(teacher).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return (right - (1 - right) / (teacher.shape[1] - 1)).clamp(min=0)


def wls_share(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """WLS-KD's alpha [B] in [0, 1]: 1 - exp(-CE of the student / CE of the teacher), from logits [B, C].

    Source: official code of TGeo-KD.
    """
    own, other = (losses.cross_entropy(x, labels, reduction="none") for x in (student, teacher))
    return 1 - torch.exp(-own / other.clamp(min=1e-12))


@dataclass(frozen=True, kw_only=True)
class TGeo(Selector):
    """The teacher's share alpha of each sample's loss, 1 - alpha for its label (TGeo-KD, Hu et al. 2024).

    The objective ``kd`` is weighed by alpha and the objective ``labels`` by 1 - alpha; both should have the
    weight 1. A small MLP gives alpha from the triangle of student, teacher and label. It learns so that a
    student that takes one gradient step with these alphas does better on held-out samples.

    Attributes:
        rule: ``learned``; ``released``, the MLP at its random start, as the official script leaves it;
            ``constant``; and the rules of the paper's tables: ``ada`` and ``wls`` from the networks' answers,
            ``anneal`` from 1 to 0 over the training, ``rw`` one free number a sample, learnt on the training
            loss.
        alpha: the share of the rule ``constant``, in [0, 1].
        option: what the MLP reads (``geometry_state``).
        labels: name of the objective that matches the labels.
        kd: name of the objective that matches the teacher.
        inner_lr: size of the student's unrolled gradient step, >= 0.
        validation_batch: held-out samples of each outer step, at least 1.
        optim: optimiser of the MLP, or of the free numbers.

    Raises:
        ConfigError: a field out of its range; ``prepare`` finds no teacher, no held-out samples, no such
            objective, or labels that are hidden.
        NonFiniteError: an answer of the teacher on the training set is not finite.

    Source: TGeo-KD (arXiv 2312.15112, ICLR 2024); state, MLP and rules of the official code.

    Differs: the released script never trains its MLP: it computes alpha without a gradient and takes the
    validation loss of the plain student. Here the step is unrolled, in evaluation mode (no dropout, the
    running statistics of batch norm), since it must not write into what it looks at. The optimiser is Adam
    with 1e-2 and no decay, where the script has 0.1 and 0.05 for one full batch. Labels are not oversampled,
    cross entropy reads logits (the script's reads probabilities), and no training stops early.
    """

    rule: Rule = "learned"
    alpha: float = 0.5
    option: Option = 3
    labels: str = "labels"
    kd: str = "kd"
    inner_lr: float = 0.1
    validation_batch: int = 256
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-2, schedule="constant"))

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise unknown("rule", self.rule, get_args(Rule))
        if self.option not in WIDTHS:
            raise ConfigError(f"option is {self.option}: allowed are {', '.join(map(str, WIDTHS))}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}: allowed are shares from 0 to 1")
        if not 0 <= self.inner_lr < math.inf:
            raise ConfigError(f"inner_lr is {self.inner_lr}: allowed are finite values of at least 0")
        if self.validation_batch < 1:
            raise ConfigError(
                f"validation_batch is {self.validation_batch}: allowed are values of at least 1"
            )

    def prepare(self, course: Course) -> Selection:
        """See ``Selector.prepare``: what the teacher says of the training set, and what learns."""
        if course.teacher is None:
            raise ConfigError(
                "selector tgeo weighs a teacher against the labels but teacher is none: name one"
            )
        for name in (self.labels, self.kd):
            if name not in course.objectives:
                raise unknown("objective", name, course.objectives, where="selector")
        if self.rule == "learned" and len(course.held_out) == 0:
            raise ConfigError(
                "selector tgeo learns from held-out samples but scenario.validation is 0: set it to 0.1, say"
            )
        if self.rule in ("learned", "rw") and is_shared(course.student):
            raise ConfigError(
                "engine.shard shares the student out, whose weights selector tgeo replaces: leave it whole"
            )
        if next(iter(course.batches(course.index[:1]))).labelled is not None:
            raise ConfigError("selector tgeo reads every label but data.labelled hides some: leave it out")
        return Trilateral(self, course)


class Trilateral(Selection):
    """``TGeo`` at work.

    Attributes:
        controller: the MLP, under the rules ``learned`` and ``released``.
        class_mean: mean prediction of the teacher by class [C, C], under the same rules.
        free: under the rule ``rw`` a number for each sample of the data [N], whose sigmoid is alpha.
    """

    class_mean: Tensor

    def __init__(self, plan: TGeo, course: Course) -> None:
        super().__init__(plan)
        self.plan, self.course = plan, course
        device = next(course.student.parameters()).device
        if plan.rule in ("learned", "released"):
            mean = course.once("class-mean-teacher", self._class_mean)
            self.register_buffer("class_mean", torch.tensor(mean, device=device))
            with seeded(course.generator("controller")):
                self.controller = Controller(WIDTHS[plan.option] * course.classes).to(device)
        if plan.rule == "rw":
            self.free = nn.Parameter(torch.zeros(len(course.labels), device=device))

    def _class_mean(self) -> list[list[float]]:
        course = self.course
        said = [(course.ask(batch).logits, batch.labels) for batch in course.batches(course.index)]
        teacher, labels = (torch.cat(parts) for parts in zip(*said, strict=True))
        probabilities = losses.full_precision(teacher).softmax(-1)
        found: list[list[float]] = class_mean_teacher(probabilities, labels, course.classes).tolist()
        return found

    def alpha(self, batch: Batch, student: Tensor, teacher: Tensor, at: Progress) -> Tensor:
        """The teacher's share [B] by the rule, from logits [B, C]; its graph leads to what learns alone."""
        plan = self.plan
        match plan.rule:
            case "learned" | "released":
                found: Tensor = self.controller(
                    geometry_state(student, teacher, batch.labels, self.class_mean, plan.option)
                )
                return found
            case "ada":
                return ada_share(teacher.detach(), batch.labels)
            case "wls":
                return wls_share(student.detach(), teacher.detach(), batch.labels)
            case "rw":
                return self.free[batch.index].sigmoid()
            case _:
                share = plan.alpha if plan.rule == "constant" else 1 - at.step / at.steps
                return torch.full(batch.labels.shape, share, device=batch.labels.device)

    def shares(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> dict[str, Tensor]:
        """The weights of both objectives, with their graph."""
        assert teacher is not None
        alpha = self.alpha(batch, student.logits, teacher.logits, at)
        return {self.plan.labels: 1 - alpha, self.plan.kd: alpha}

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Mapping[str, Tensor]:
        """``{labels: 1 - alpha, kd: alpha}``, each [B], without a graph."""
        with torch.no_grad():
            return self.shares(batch, student, teacher, at)

    def lesson(self) -> tuple[nn.Module, Optim] | None:
        """The outer step of the rule ``learned``, the training loss of ``rw``; nothing else learns."""
        kinds = {"learned": Outer, "rw": Inner}
        kind = kinds.get(self.plan.rule)
        return None if kind is None else (kind(self), self.plan.optim)

    @torch.no_grad()
    def facts(self) -> dict[str, Any]:
        """Alpha at the end over the training samples: mean, smallest, largest, and means of groups.

        Where the data says which labels are wrong, the groups are ``wrong_label``, ``wrong_teacher`` (the
        label is right and the teacher says another class) and ``clean``; else whether the teacher says the
        label.
        """
        course, alphas, rights = self.course, [], []
        with at_rest(course.student):
            for batch in course.batches(course.index):
                told = course.ask(batch)
                said = course.student(batch, teacher=told)
                alphas.append(self.alpha(batch, said.logits, told.logits, LAST).cpu())
                rights.append((told.logits.argmax(1) == batch.labels).cpu())
        alpha, right = torch.cat(alphas), torch.cat(rights)
        if course.noisy is None:
            groups = {"teacher_says_label": right, "teacher_says_other": ~right}
        else:
            noisy = course.noisy[course.index]
            groups = {"wrong_label": noisy, "wrong_teacher": ~noisy & ~right, "clean": ~noisy & right}
        return {
            "alpha": {"mean": float(alpha.mean()), "min": float(alpha.min()), "max": float(alpha.max())},
            "groups": {
                name: {"samples": int(group.sum()), "alpha": float(alpha[group].mean())}
                for name, group in groups.items()
                if group.any()
            },
        }


class Open(Selection):
    """The same weights, of which a graph leads to what learns."""

    def __init__(self, selection: Trilateral) -> None:
        super().__init__(selection.plan)
        self._selection = (selection,)  # unregistered

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Mapping[str, Tensor]:
        """``Trilateral.shares``."""
        return self._selection[0].shares(batch, student, teacher, at)


class Inner(nn.Module):
    """The student's loss as a function of what weighs its samples: that learns, the student stands still."""

    def __init__(self, selection: Trilateral) -> None:
        super().__init__()
        self.learns = nn.ParameterList(p for p in selection.parameters() if p.requires_grad)
        self.plan, self.course = selection.plan, selection.course
        self._step = (self.course.step(Open(selection)),)  # unregistered: it is the student's

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled graphs cannot be derived twice
    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """The student's own terms."""
        (step,) = self._step
        with at_rest(step):
            terms: dict[str, Tensor] = call(step, {}, batch, at)
        return terms


class Outer(Inner):
    """The held-out loss of a student that takes one gradient step with these weights.

    Its gradient with respect to alpha of sample i is -(inner_lr / B) <v, g_i>, with v the gradient of the
    held-out loss after the step and g_i that of sample i's teacher term minus its label term: alpha rises
    where the teacher leads nearer to the held-out samples than the label does.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled graphs cannot be derived twice
    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"validation": cross entropy}`` on held-out samples that ``at.step`` draws."""
        (step,), student = self._step, self.course.student
        params = parameters_of(student)
        with at_rest(step):
            terms = call(step, params, batch, at, under="student")
            after = unrolled_step(torch.stack(list(terms.values())).sum(), params, self.plan.inner_lr)
            held = self.held_out(at)
            said = student.predict(call(student, after, held))
        return {"validation": losses.cross_entropy(said, held.labels)}

    def held_out(self, at: Progress) -> Batch:
        """The held-out samples of a step."""
        course = self.course
        order = torch.randperm(len(course.held_out), generator=course.generator("held-out", at.step))
        chosen = course.held_out[order[: self.plan.validation_batch]]
        return next(iter(course.batches(chosen, size=len(chosen))))
