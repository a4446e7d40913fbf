"""The contracts that every wing keeps: what flows through a step, and the five choices.

Shapes: B batch, C classes, T tokens, D width, V vocabulary, R counted tokens of a batch. A choice is a
frozen, keyword-only dataclass whose fields are its whole configuration; what is learnable is built later,
from the shapes of a dry run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError, unknown


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: all that a schedule may depend on.

    ``epoch`` counts from 0 within the stage; ``step`` counts optimiser steps from 0 within the stage.
    """

    step: int = 0
    steps: int = 1
    epoch: int = 0
    epochs: int = 1
    task: int = 0
    tasks: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step sees.

    In a batch of text each token that counts is a row: labels, weights and logits have R rows, in the order
    of the texts. ``labels`` are what these tokens are followed by, so nothing is shifted any more.

    Attributes:
        inputs: what the networks read; for images [B, channels, H, W] float in the model's range; for text
            the token ids [B, T] int64.
        labels: class ids [B] int64 in the data set's numbering; of text the next tokens [R].
        index: position [B] of each sample in its data set: the key of every cache.
        view: number [B] of the augmented view of each sample: the other half of that key.
        query: frozen features [B, D] that select prompts; None where nothing asks for them.
        weight: weights [B] >= 0 that the selector gave; losses divide by B, whatever they sum to. None = all
            samples count alike.
        labelled: True [B] where the label may be read; None = everywhere.
        rows: of text, the places [R] int64 in the flat [B * T] of the tokens that count; None = no text.
        segments: of text, the number [B, T] int64 of the document within its row that each token is of; a
            token reads tokens of its own document alone. None = one document a row.
        marks: of text, numbers [R] that the data gives to the tokens that count, by name.
        other: the same samples as a teacher with a vocabulary of its own reads them.
        place: where these samples are a part of a batch, the number of the first one and how many that has:
            what is drawn for each place is drawn for all of them. None = they are the whole batch.
    """

    inputs: Tensor
    labels: Tensor
    index: Tensor
    view: Tensor
    query: Tensor | None = None
    weight: Tensor | None = None
    labelled: Tensor | None = None
    rows: Tensor | None = None
    segments: Tensor | None = None
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    other: Batch | None = None
    place: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        there: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v.to(device)
            for k, v in moved.items()
            if isinstance(v, Tensor | Batch)
        }
        marks = {k: v.to(device, non_blocking=True) for k, v in self.marks.items()}
        return replace(self, **there, marks=marks)

    def counted(self, values: Tensor) -> Tensor:
        """The rows [R, ...] of ``values`` [B, T, ...] that stand for the tokens that count."""
        assert self.rows is not None
        return values.flatten(0, 1).index_select(0, self.rows)


@dataclass(frozen=True, eq=False)
class Unembedding:
    """logits = cap · tanh(scale · (W h + b) / cap), or without the tanh where there is no cap.

    Attributes:
        weight: W [V, D]; where the head is tied, the token embedding itself.
        bias: b [V]; -inf bans a token. None = no bias.
        scale: factor of the logits, as Cohere's and Granite's models have one.
        cap: soft cap > 0 of the logits, as Gemma's models have one; None = no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the precision of both."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = self.scale * logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def first(self, count: int) -> Self:
        """The same layer for the first ``count`` tokens."""
        return replace(
            self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count]
        )

    def detach(self) -> Self:
        """The same layer without a graph."""
        return replace(
            self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach()
        )


@dataclass(frozen=True)
class Outputs:
    """What a network gave; one type for teacher and student, live or cached.

    A language model's rows are the R tokens of the batch that count. It gives ``hidden`` and ``unembedding``,
    from which the loss kernels take what they need without holding R x V numbers; ``logits`` [R, V] are there
    where an objective reads them, and else have no columns. A teacher that was asked before, or that is
    served, gives ``top`` alone.

    Attributes:
        logits: [B, C] of the class head: what labels are matched with.
        soft_logits: [B, C] of a second head that learns from the teacher; None where there is one head. A
            head may split each class into S parts: [B, C * S], the parts of a class side by side.
        features: tapped tensors by module path.
        losses: the network's own scalar terms (prompt key matching, orthogonality), already weighted.
        prompts: the prefix prompts (key, value), each [B, L, D], by block, where a network has them.
        mask: which positions count, True = counts; None = all.
        paths: other answers of the same network by name: of a second path through it, of the members of an
            ensemble, to another view of the batch.
        subnets: answers of sub-networks within a student that learn in the same step, by name: each is
            matched by all objectives as the student's own answer is.
        hidden: what the last layer of a language model reads, [R, D].
        unembedding: that last layer.
        top: token ids [R, K] int64 and their log-probabilities [R, K] under the softmax of the whole
            vocabulary at temperature 1, the most probable first.
    """

    logits: Tensor
    soft_logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mask: Tensor | None = None
    paths: Mapping[str, Outputs] = field(default_factory=dict)
    subnets: Mapping[str, Outputs] = field(default_factory=dict)
    hidden: Tensor | None = None
    unembedding: Unembedding | None = None
    top: tuple[Tensor, Tensor] | None = None

    @property
    def soft(self) -> Tensor:
        """The logits [B, C] that distillation matches: the second head's, or else the class head's."""
        return self.logits if self.soft_logits is None else self.soft_logits

    def columns(self, start: int, stop: int) -> Self:
        """The same outputs with logits cut to the classes ``start`` .. ``stop - 1``, with all their parts."""
        soft = self.soft_logits
        if soft is not None:
            parts = soft.shape[1] // self.logits.shape[1]
            soft = soft[:, parts * start : parts * stop]
        paths = {name: other.columns(start, stop) for name, other in self.paths.items()}
        subnets = {name: other.columns(start, stop) for name, other in self.subnets.items()}
        logits = self.logits[:, start:stop]
        return replace(self, logits=logits, soft_logits=soft, paths=paths, subnets=subnets)

    def along(self, path: str) -> Outputs:
        """The answer of that path; ``""`` is the main one.

        Raises:
            ConfigError: there is no such path.
        """
        if path and not self.paths:
            raise ConfigError(
                f"path is {path!r} but this teacher gives one answer alone: leave path out, or take a "
                "teacher with other paths, such as dfpt"
            )
        if path and path not in self.paths:
            raise unknown("path", path, self.paths)
        return self.paths[path] if path else self

    def detach(self) -> Self:
        """The same outputs without a graph."""
        return replace(
            self,
            logits=self.logits.detach(),
            soft_logits=None if self.soft_logits is None else self.soft_logits.detach(),
            features={k: v.detach() for k, v in self.features.items()},
            losses={},
            prompts={k: (a.detach(), b.detach()) for k, (a, b) in self.prompts.items()},
            paths={k: v.detach() for k, v in self.paths.items()},
            subnets={k: v.detach() for k, v in self.subnets.items()},
            hidden=None if self.hidden is None else self.hidden.detach(),
            unembedding=None if self.unembedding is None else self.unembedding.detach(),
            top=None if self.top is None else (self.top[0], self.top[1].detach()),
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective reads. Taps are module paths; ``blocks.-1`` counts from the end.

    Attributes:
        student: taps of the student.
        teacher: taps of the teacher.
        teacher_logits: whether it reads what the teacher says of the classes or of the next token.
        logits: whether it reads logits; one that is content with a language model's ``hidden`` and
            ``unembedding`` or ``top`` says False.
        tokens: how many of a language model's most probable tokens it must be told of, at least; None = all.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    teacher_logits: bool = True
    logits: bool = True
    tokens: int | None = 0


@dataclass(frozen=True, slots=True)
class Spec:
    """What the data asks of a network: all that ``build`` may depend on besides the fields.

    ``query_dim`` is the width of the query that selects prompts; None = the network's own width. For text
    ``classes`` is the size of the vocabulary, ``size`` the length of a row, and ``special`` the ids of the
    tokens that begin, end and pad a text (``bos``, ``eos``, ``pad``), where there are such.
    """

    classes: int
    tasks: int = 1
    channels: int = 3
    size: int = 224
    query_dim: int | None = None
    special: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """What an objective's module may depend on besides the shapes of a dry run.

    Attributes:
        samples: how many samples the data has: every ``batch.index`` lies below it.
        seed: root of draws of the module's own; each is a function of it and of ``Progress`` alone.
        student: the network that learns, for objectives that send something through a part of it; it stays
            the scenario's, so a module must not register it.
        teacher: the network that teaches, likewise.
    """

    samples: int = 0
    seed: int = 0
    student: Net | None = None
    teacher: Net | None = None


NO_FACTS = Facts()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is matched. Stateless objectives implement ``terms``; those that learn override ``build``.

    The module that ``build`` gives may also have

    - ``prepare(course)``: called once before the student's training, when the teacher stands still, with
      what a selector may look at too;
    - ``start(index, labels, generator)``: called before a stage with the samples [n] that it goes over, and
      the labels [N] of the whole data;
    - ``view(batch, at) -> Batch``: another batch that the student reads in the same step; what it says
      stands in ``student.paths`` under the objective's name;
    - ``facts() -> dict``: plain data about the training, for ``result.json``.

    Attributes:
        by_row: whether each term is the mean over all rows of a batch of what is said of that row alone:
            where several ranks share a batch, each then looks at its own rows.
        texts: whether it matches language models alone.
        path: which of the teacher's answers is matched (``Outputs.along``); ``""`` is its main one.
    """

    by_row: ClassVar[bool] = False
    texts: ClassVar[bool] = False

    path: str = ""

    def needs(self) -> Needs:
        """The taps and logits that ``terms`` will read."""
        return Needs()

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The module whose forward is ``(student, teacher, batch, at) -> terms``.

        Args:
            student: outputs of a dry run: shapes only count.
            teacher: the same of the teacher, along ``path``.
            facts: what else it may depend on.

        Raises:
            ShapeError: the two cannot be matched.
        """
        return Stateless(self)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Named scalar terms, already weighted. ``batch.labels`` count from 0 in the logits' columns."""
        raise TypeError(f"{type(self).__name__} defines neither terms() nor build()")


class Stateless(nn.Module):
    """The module of an objective that has nothing to learn."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return self.objective.terms(student, teacher, batch, at)


class Net(nn.Module):
    """A built teacher or student. A plain network overrides ``forward`` alone.

    A part that never changes and is made again from the recipe sets ``constant = True``: checkpoints
    leave it out, and the engine checks that it did not move.

    Attributes:
        query_dim: width D of the frozen features that select its prompts; None = it asks for none.
        reads_prompts: whether its forward reads the teacher's prompts, which no cache holds.
        keeps_teacher: whether what ``attach_teacher`` keeps is built from the teacher, so that a finished
            student cannot be built without one.
        projects: of a language model, whether its forward gives logits.
        partial: whether a step reaches some of its parameters alone, so that one without a gradient is no
            mistake.
    """

    query_dim: int | None = None
    reads_prompts: bool = False
    keeps_teacher: bool = False
    projects: bool = True
    partial: bool = False

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """Outputs for ``batch`` with the features at ``taps``; ``teacher`` is what the teacher said."""
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def query(self, images: Tensor) -> Tensor:
        """Frozen features [B, query_dim] that select prompts, without gradient."""
        raise TypeError(f"{type(self).__name__} has no query")

    def predict(self, outputs: Outputs) -> Tensor:
        """The logits [B, C] that the network answers with."""
        return outputs.logits

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """Get ready for task number ``task``: grow or copy what the method grows or copies."""

    def finish_task(self) -> None:
        """Settle what was learnt in the task that ends."""

    def prepare(self, course: Course) -> None:
        """Look at the teacher and the samples before the training, as a student that takes its teacher's
        weights over does.

        A resumed run comes by here too, before the weights of either network are back: what is found goes
        through ``course.once``.
        """

    def start_step(self, at: Progress) -> None:
        """Get ready for the training step ``at``: draw what that step is about, as a function of ``at`` and
        of a seed from ``Network.build``, so that a resumed run draws the same."""

    def deployed(self) -> Net:
        """The network that it is used as when it has learnt: itself, or one that is cut out of it."""
        return self

    def nested(self) -> Mapping[str, Nested]:
        """The networks within it that are used by themselves when it has learnt, by name."""
        return {}

    def sharable(self) -> nn.Module | None:
        """The part whose lists and sequences hold the blocks that ranks can share out among them; None = it
        has none, or is copied or runs parts of their weights."""
        return self

    def key_accuracy(self, query: Tensor, task: int) -> Tensor | None:
        """Share of ``query`` [N, query_dim], all of ``task``, that find that task's prompts, in [0, 1].

        None where no key stands for a task.
        """
        return None

    def save(self, folder: Path) -> bool:
        """Write the network to ``folder`` in the form of its own library; False = it has none, and the
        house's form is written."""
        return False

    def attach_teacher(self, teacher: Net) -> None:
        """Keep what this network needs of its teacher when it is used without one."""

    def tune(self, outputs: Sequence[Outputs], labels: Tensor) -> dict[str, float]:
        """What ``predict`` shall use, chosen from ``outputs`` on validation samples with ``labels`` [N]."""
        return {}

    def tuned(self, chosen: Mapping[str, float]) -> None:
        """Take over what ``tune`` chose."""

    def observe(self, batches: Iterable[Batch]) -> None:
        """Find out what a teacher needs to know of the samples to teach on, when it has been trained itself.

        What is found is kept in buffers, so that a checkpoint has it. ``batches`` go once over the student's
        training samples, without augmentation.
        """

    def adapting(self) -> Adapting | None:
        """The second path of a teacher that learns beside the student; None where it has none."""
        return None


@dataclass(frozen=True, eq=False)
class Nested:
    """A smaller network that was cut out of one that holds several.

    Attributes:
        net: the network, with weights of its own.
        about: plain data for ``result.json``, such as its sizes.
    """

    net: Net
    about: Mapping[str, Any] = field(default_factory=dict)


class Adapting(nn.Module):
    """What of a teacher learns in the student's phase, while the teacher itself stands still.

    It belongs to a ``Net``, which holds it without registering it: it is trained, saved and put into training
    mode apart from the network that stays fixed.

    Attributes:
        order: where a teacher was trained before on the data set's own class numbers: that number of each of
            the student's classes, in which its paths must answer; None = both number alike.
    """

    order: Tensor | None = None

    def forward(self, batch: Batch, said: Outputs, taps: tuple[str, ...] = ()) -> Outputs:
        """``said``, what the fixed teacher answered, with more ``paths``; these carry a graph."""
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def terms(self, said: Outputs, student: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Named scalar terms, already weighted, that it learns from; ``student`` carries no graph."""
        raise TypeError(f"{type(self).__name__} defines no terms()")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A teacher or a student: how to build one."""

    def input_spec(self) -> Any:
        """What images the network expects (``nets.backbones.InputSpec``), without reading weights."""
        raise TypeError(f"{type(self).__name__} defines no input_spec()")

    def reads_text(self) -> bool:
        """Whether it builds a causal language model, whose rows are the tokens that count."""
        return False

    def tokenizer(self) -> Any:
        """The tokenizer (of transformers) that the network was trained with; None = it brings none."""
        return None

    def check(self, spec: Spec) -> None:
        """Preflight: raise, before any weight is read, where ``build`` is known to fail."""

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """The network, initialised from ``generator`` alone.

        Raises:
            LimbeckError: weights that cannot be had, or that do not fit ``spec``.
        """
        raise TypeError(f"{type(self).__name__} defines no build()")


@dataclass(frozen=True, kw_only=True)
class Teacher(Network):
    """Who teaches.

    Attributes:
        learns: whether it is trained on labels in a phase of its own before it teaches.
        observes: whether it looks at the student's data before it teaches (``Net.observe``), which only a
            scenario with all data at hand can offer.
    """

    learns: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    def lessons(self) -> Any:
        """The data set that it is trained on in its own phase; None = the student's."""
        return None

    def tells(self) -> int | None:
        """Of how many of its most probable tokens a language model tells that others serve (``Outputs.top``);
        None = of all."""
        return None


@dataclass(frozen=True, kw_only=True)
class Student(Network):
    """Who learns.

    Attributes:
        needs_teacher: whether it is made of its teacher's weights, so that it needs one and reads its tokens.
    """

    needs_teacher: ClassVar[bool] = False


class Course(Protocol):
    """A training that is about to begin, as a selector may look at it.

    Attributes:
        labels: labels [N] of the whole data.
        index: the samples [n] to learn from.
        held_out: the samples [m] that are kept for validation; none of them is in ``index``.
        classes: number of classes.
        student: the network that will learn.
        teacher: the network that will teach, at rest; None = there is none.
        objectives: what will be matched, by the name that weights go by.
        noisy: True [N] where the label is known to be wrong, for what is reported alone; None = not known.
        epoch_samples: how many samples an epoch of the student's training goes over.
    """

    labels: Tensor
    index: Tensor
    held_out: Tensor
    classes: int
    student: Net
    teacher: Net | None
    objectives: Mapping[str, Objective]
    noisy: Tensor | None
    epoch_samples: int

    def batches(self, index: Tensor, size: int = 256, view: int | None = None) -> Iterator[Batch]:
        """Batches over ``index`` in its order; ``view`` None = without augmentation."""
        ...

    def ask(self, batch: Batch) -> Outputs:
        """What the teacher says, live and without a graph."""
        ...

    def generator(self, *names: object) -> torch.Generator:
        """A fresh generator for what is named."""
        ...

    def probe(
        self, name: str, epochs: int, *, taught: bool = False, same_start: bool = False,
        after: Callable[[Net, int], None] | None = None,
    ) -> Net:  # fmt: skip
        """A fresh student trained beforehand on ``index``, in evaluation mode.

        Args:
            name: tells probes apart; another name starts from other weights.
            epochs: passes over the data, or as many steps as an epoch has, with the scenario's optimiser.
            taught: by the recipe's objectives; else by the labels alone.
            same_start: from the very weights that the student starts from.
            after: called with the network, in evaluation mode, and the number of each epoch that ends, in
                order; also for epochs that a resumed run passes over, whose findings ``once`` has kept.
        """
        ...

    def step(self, selection: Selection) -> nn.Module:
        """The student's training step ``(batch, at) -> terms`` with samples weighed by ``selection``.

        It holds the student as ``student``: whoever keeps the step must not register it.
        """
        ...

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """``compute()``, plain data, kept with the run: a resumed run takes what was computed before."""
        ...

    def warn(self, text: str) -> None:
        """Say in the run's log and on its page what a reader of its figures must know."""
        ...


@dataclass(frozen=True, kw_only=True)
class Selector:
    """What counts, and how much. Those without a memory implement ``weights`` or ``indices``; those that
    look at data or networks first, or learn, override ``prepare``.

    Attributes:
        asks: whether it compares what language models say of the same tokens.
        asks_all: whether it does so with all that the teacher says, not with its most probable tokens alone.
    """

    asks: ClassVar[bool] = False
    asks_all: ClassVar[bool] = False

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Tensor | Mapping[str, Tensor] | None:
        """Weights [B] >= 0 for all objectives, or by the objective's name; None = all samples count alike."""
        return None

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """The samples worth a step in ``epoch``: a part of ``index`` [N], in any order."""
        return index

    def prepare(self, course: Course) -> Selection:
        """The selector at work in one training."""
        return Selection(self)


class Selection(nn.Module):
    """A selector at work: what it found out before the training, and what of it learns."""

    def __init__(self, selector: Selector) -> None:
        super().__init__()
        self.selector = selector

    @property
    def weighs(self) -> bool:
        """Whether it may give weights."""
        return (type(self).weights, type(self.selector).weights) != (Selection.weights, Selector.weights)

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Tensor | Mapping[str, Tensor] | None:
        """As ``Selector.weights``."""
        return self.selector.weights(batch, student, teacher, at)

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """As ``Selector.indices``."""
        return self.selector.indices(index, labels, epoch, generator)

    def lesson(self) -> tuple[nn.Module, Any] | None:
        """What takes a step of its own on each batch before the student: a module ``(batch, at) -> terms``
        and its ``engine.optim.Optim``; None where nothing of it learns."""
        return None

    def facts(self) -> dict[str, Any]:
        """Plain data about what was selected, for ``result.json``."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How data and time arrive: a procedure of a few calls of the engine."""

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The student of a finished run of ``recipe``, in evaluation mode, from its learnt ``state``."""
        raise TypeError(f"{type(self).__name__} defines no load_student()")

    def open_student(self, recipe: Any, folder: Path, figures: Mapping[str, Any]) -> Net | None:
        """The student of a finished run from its ``folder``, where its own library wrote that; else None."""
        return None

    def check(self, recipe: Any) -> None:
        """Preflight: raise before any weight is read if ``recipe`` cannot work."""

    def run(self, recipe: Any, run: Any) -> dict[str, Any]:
        """Carry the scenario out in ``run`` (an ``engine.run.Run``); returns the final figures."""
        raise TypeError(f"{type(self).__name__} defines no run()")


def check_width(what: str, got: int, want: int, fix: str) -> None:
    """Raise ``ShapeError`` unless ``got == want``; the message names both and the fix."""
    if got != want:
        raise ShapeError(f"{what} is {got} but must be {want}: {fix}")
