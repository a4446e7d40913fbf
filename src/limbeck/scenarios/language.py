"""A language model that learns from texts, a teacher, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.contracts import Net, Progress, Scenario, Selection, Spec
from limbeck.data.aligned import aligned_rows
from limbeck.data.texts import Corpus, Reading, TextSplits
from limbeck.data.together import Going
from limbeck.data.tokenizers import special_of, tokenizer_of, vocabulary_hash
from limbeck.data.tokens import Rows, TokenBatches, rows_of
from limbeck.engine import shared
from limbeck.engine.fit import Source, Turn, autocast, fit
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.engine.seeds import derive
from limbeck.engine.state import value_hash
from limbeck.errors import ConfigError
from limbeck.nets.causal_lm import CausalLM, check_packing
from limbeck.nets.language_models import load_model
from limbeck.scenarios import text_checks
from limbeck.scenarios.answers import answered
from limbeck.scenarios.course import Lessons, Watched, by_labels, facts_of
from limbeck.scenarios.exposures import Reader, exposures
from limbeck.scenarios.fit_together import check_objectives, has_teacher
from limbeck.scenarios.judging import judged
from limbeck.scenarios.pair import Pair, constants, hashes
from limbeck.scenarios.replayed import Replayed
from limbeck.scenarios.selected import Selected
from limbeck.scenarios.written import Writing, Written, check_prompts, model_of, writes


@dataclass(frozen=True, kw_only=True)
class Language(Scenario):
    """A causal language model trained on texts, from their tokens, a teacher, or both.

    A teacher that learns is trained first, on the same texts; then it stands still.

    Attributes:
        epochs: passes over the rows of tokens, or rounds of ``epoch_steps``.
        epoch_steps: steps of an epoch, the rows going round; None = once over the rows.
        batch_size: rows per step.
        eval_batch_size: rows per evaluation step.
        eval_rows: rows of the test part that figures are taken on, evenly spread over it; None = all.
        optim: the student's optimiser.
        teacher_epochs: epochs of a teacher that learns; None = as many as the student's.
        teacher_optim: its optimiser; None = the student's.
        start_epochs: epochs in which the student first learns the texts as they come, from the labels alone
            and with the teacher's optimiser, so that a teacher finds a language model; None = 0.
        writing: what part of the training texts a network writes itself; None = none.
        answers: prompts of the test part that are answered, at most, evenly spread over it, where the texts
            have prompts; 0 = none.
        answer_tokens: tokens of an answer, at most.
    """

    scenario: ClassVar[str] = "language"

    epochs: int = 1
    epoch_steps: int | None = None
    batch_size: int = 16
    eval_batch_size: int = 16
    eval_rows: int | None = None
    optim: Optim = field(default_factory=lambda: Optim(name="adamw", lr=3e-3, schedule="cosine", clip=1.0))
    teacher_epochs: int | None = None
    teacher_optim: Optim | None = None
    start_epochs: int | None = None
    writing: Writing | None = None
    answers: int = 16
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("epochs", "epoch_steps", "batch_size", "eval_batch_size", "eval_rows", "teacher_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: allowed are values of at least 1")
        if self.start_epochs is not None and self.start_epochs < 0:
            raise ConfigError(f"start_epochs is {self.start_epochs}: allowed are values of at least 0")
        if self.answers < 0 or self.answer_tokens < 1:
            raise ConfigError(
                f"answers is {self.answers} of {self.answer_tokens} tokens: allowed are numbers from 0, of "
                "at least 1 token each"
            )

    def check(self, recipe: Any) -> None:
        """Preflight: texts, tokenizers, and whether both networks read text."""
        text_checks.check_texts(recipe)
        text_checks.check_privacy(recipe)
        text_checks.check_selector(recipe)
        text_checks.check_writing(self.writing, recipe)
        if self.writing is None or self.writing.by == "student":  # else it is heard through its texts
            check_objectives(recipe)
        tokens = Tokens(recipe)
        text_checks.check_kept(recipe, tokens.spec.classes)
        text_checks.check_alignment(recipe, len(tokens.tokenizer), tokens.other, self.writing)
        recipe.student.check(tokens.spec)
        if self.start_epochs and recipe.student.needs_teacher:
            raise ConfigError(
                f"scenario.start_epochs is {self.start_epochs}, but the student is "
                f"{type(recipe.student).__name__}, which begins with its teacher's weights: set it to 0"
            )
        if has_teacher(recipe):
            recipe.teacher.check(tokens.teachers)

    def open_student(self, recipe: Any, folder: Path, figures: Mapping[str, Any]) -> Net:
        """The student of a finished run, from the folder that its own library loads."""
        dtype = getattr(recipe.student, "dtype", "float32")
        return CausalLM(load_model(str(folder), dtype=dtype)).eval()

    def run(self, recipe: Any, run: Run) -> dict[str, Any]:
        """Train on the recipe's texts; returns the figures on their test part."""
        desk = self.desk(recipe, run)
        pair = desk.pair
        if self.writing is not None:
            check_prompts(self.writing.prompt, desk.learning.rows)
            if self.writing.buffer is not None and not len(desk.held_out):
                raise ConfigError(
                    "scenario.writing.buffer looks at texts held out but there are none: set it to null"
                )
        if pair.learns:
            self.teach(pair, desk)
        self.begin(pair, desk)
        lessons = Lessons(
            pair, desk.everything, desk.learning, desk.held_out, self.optim, steps=self.epoch_steps
        )
        pair.prepare(lessons)
        selection = recipe.selector.prepare(lessons)
        run.modules.add_module("selector", selection)
        kept = self.train(pair, desk, selection)
        found = self.measure(pair, desk)
        return {
            "recipe": recipe.name, "scenario": self.scenario, "seed": run.seed, **desk.about(),
            "protocol": self.protocol() | desk.protocol(), **found, **kept, **facts_of(selection),
            **pair.facts(),
        }  # fmt: skip

    def desk(self, recipe: Any, run: Run) -> Desk:
        """The texts in batches, and the networks."""
        return Desk(self, recipe, run)

    def watches(self, desk: Desk) -> Callable[[Net, int], None] | None:
        """What looks at the student behind each epoch, whose number it is given; None = nothing."""
        return None

    def teach(self, pair: Pair, desk: Desk) -> None:
        """The stage ``teacher``: it learns the texts."""
        assert pair.teacher is not None
        pair.teach(True)
        epochs = self.teacher_epochs or self.epochs
        self.learn(desk, "teacher", pair.teacher, desk.taught, epochs, desk.key("teacher"))
        pair.teacher.finish_task()

    def begin(self, pair: Pair, desk: Desk) -> None:
        """The stage ``start``: the student learns the texts before it has a teacher."""
        if self.start_epochs:
            self.learn(desk, "start", pair.student, desk.learning, self.start_epochs, desk.key("start"))

    def learn(
        self, desk: Desk, stage: str, net: Net, batches: TokenBatches, epochs: int, key: Mapping[str, Any]
    ) -> None:
        """A stage in which ``net`` learns texts by their labels, or is taken from a run where it learnt them
        the same way: all of that is in ``key``, besides epochs, their steps and the optimiser."""
        run, optim = desk.run, self.teacher_optim or self.optim
        made = {**key, "epochs": epochs, "optim": repr(optim), "steps": self.epoch_steps}
        book, reuse = shared.Teachers(desk.pair.root, made), run.settings.reuse_teachers
        if not (reuse and book.take(run, stage, net)):
            source = desk.source(batches, steps=self.epoch_steps)
            run.meter.plan[stage] = source.steps * epochs
            fit(run, stage, [Turn(stage, by_labels(net), optim, constants({stage: net}))], source, epochs)
            if reuse:
                book.keep(run, stage, net)

    def train(self, pair: Pair, desk: Desk, selection: Selection) -> dict[str, Any]:
        """The student's training; returns what ``result.json`` says of it."""
        return self.distil(pair, desk, selection, "train")

    def distil(self, pair: Pair, desk: Desk, selection: Selection | None, stage: str) -> dict[str, Any]:
        """A stage of the student; the teacher is asked once for each row where rows come again, or where it
        is served. Returns what ``result.json`` says of the answers kept."""
        run, frozen = pair.run, constants(pair.nets())
        source = desk.source(desk.learning, selection, steps=self.epoch_steps)
        ask, captured = None, None
        if self.writing is not None:
            source = desk.written(self.writing, source)
            run.modules.add_module("writing", source)
        if pair.teacher is not None and (selection is not None or pair.listens):
            pair.teach(False)
            frozen["teacher"] = pair.teacher
            rounds = source.steps * self.epochs / desk.learning.steps
            fixed = self.writing is None  # what is written comes once
            captured = pair.captured_teacher(desk.learning, math.ceil(rounds)) if fixed else None
            ask = pair.remembered(captured)
        pair.start(stage, desk.learning.index, desk.learning.labels)
        run.meter.plan[stage] = source.steps * self.epochs
        turns = [Turn("student", pair.distillation(None, ask, selection), self.optim, frozen)]
        lesson = None if selection is None else selection.lesson()
        if lesson is not None:
            turns.insert(0, Turn("selector", *lesson, {}))
        watches = self.watches(desk)
        watched = source if watches is None else Watched(source, watches, pair.student)
        fit(run, stage, turns, watched, self.epochs)
        if isinstance(watched, Watched):
            watched.catch_up(self.epochs)
        pair.student.finish_task()
        found = {}
        if isinstance(source, Replayed):
            found["writing"] = run.once("writing", source.facts)
        if captured is None:
            return found
        if pair.top() is not None:
            found["teacher_cache"] = run.once("teacher_cache", lambda: pair.left_out(captured, desk.learning))
        captured.delete()
        return found

    def measure(self, pair: Pair, desk: Desk) -> dict[str, Any]:
        """Figures of both networks, and of those within the student, over the tokens of the test part."""

        def compute() -> dict[str, Any]:
            found = judged(pair, desk.test)
            canaries = desk.tokens.splits.train.facts.get("canaries")
            if canaries:
                draws = pair.run.generator("exposure")
                found["exposure"] = exposures(desk.readers(), canaries, draws)
            for who, figures in desk.answered().items():
                found[who] = (found[who] or {}) | figures
            return found

        found: dict[str, Any] = pair.run.once("evaluation", compute)
        return found

    def protocol(self) -> dict[str, Any]:
        """What a reader must know to compare the figures with others."""
        return {
            "epochs": self.epochs, "epoch_steps": self.epoch_steps, "batch": self.batch_size,
            "start_epochs": self.start_epochs or 0,
            "optimiser": f"{self.optim.name}, lr {self.optim.lr}", "ema": self.optim.ema,
            "writing": None if self.writing is None else asdict(self.writing),
            "evaluated": "last epoch, on the test texts; nothing is chosen on them",
            "interval": "95 %, of the test tokens taken as independent, not of seeds",
        }  # fmt: skip


class Tokens:
    """The texts of a recipe as its networks read them.

    Args:
        recipe: its data names the texts and how they are read.

    Attributes:
        splits: the texts.
        lessons: those of a teacher that learns from others; None = there are none.
        tokenizer: the student's.
        other: the teacher's, where it reads other tokens; else None.
        spec: what the student is built for.

    Raises:
        ConfigError: no tokenizer is named, or a student that is made of its teacher has another.
    """

    def __init__(self, recipe: Any) -> None:
        self.splits: TextSplits = recipe.data.seeded(recipe.seed).load()
        reading: Reading = recipe.data.reading
        self.tokenizer = self._tokenizer(recipe, reading.tokenizer)
        self.lessons = lessons_of(recipe)
        other = self._teachers(recipe)
        same = other is None or vocabulary_hash(other) == vocabulary_hash(self.tokenizer)
        self.other = None if same else other
        if self.other is not None and recipe.student.needs_teacher:
            raise ConfigError(
                f"data.tokenizer has {len(self.tokenizer)} tokens, but the student is made of its teacher's "
                f"weights and reads that one's {len(other)}: set it to null"
            )
        self.reading, self.spec = reading, spec_of(self.tokenizer, reading)

    def rows(self, corpus: Corpus) -> Rows:
        """Texts in rows, as both networks read them."""
        if self.other is None:
            return rows_of(corpus, self.tokenizer, self.reading)
        return aligned_rows(corpus, self.tokenizer, self.other, self.reading)

    @property
    def test(self) -> Rows:
        """The test part in rows."""
        return self.rows(self.splits.test)

    @property
    def teachers(self) -> Spec:
        """What the teacher is built for."""
        return self.spec if self.other is None else replace(self.spec, classes=len(self.other))

    def _teachers(self, recipe: Any) -> Any:
        """The teacher's tokenizer: that of the texts of its own, or what it brings; None = the student's."""
        if not has_teacher(recipe):
            return None
        if self.lessons is None or recipe.teacher.lessons().reading.tokenizer is None:
            return recipe.teacher.tokenizer()
        return tokenizer_of(recipe.teacher.lessons().reading.tokenizer, self.lessons.train)

    def _tokenizer(self, recipe: Any, name: str | None) -> Any:
        if name is not None:
            asked = tokenizer_of(name, self.splits.train)
            if getattr(recipe.student, "pretrained", False):
                check_own(asked, recipe.student.tokenizer())
            return asked
        found = recipe.student.tokenizer()
        if found is None and has_teacher(recipe):
            found = recipe.teacher.tokenizer()
        if found is None:
            raise ConfigError(
                "data.tokenizer is null but neither student nor teacher brings one: set it to characters, "
                "bpe:4096, or a model's name"
            )
        return found


def check_own(asked: Any, own: Any, who: str = "student") -> None:
    """Raise where a network that was trained with the tokenizer ``own`` would read other tokens."""
    if vocabulary_hash(asked) != vocabulary_hash(own):
        raise ConfigError(
            f"data.tokenizer has {len(asked)} tokens of its own, but the {who} was trained with {len(own)} "
            f"others: name the {who}'s tokenizer, or take another {who}, not pretrained"
        )


def lessons_of(recipe: Any) -> TextSplits | None:
    """The texts of its own that a teacher is trained on; None = the student's.

    Raises:
        ConfigError: they are no texts.
    """
    data = recipe.teacher.lessons() if has_teacher(recipe) else None
    if data is None:
        return None
    if not isinstance(getattr(data, "reading", None), Reading):
        raise ConfigError(
            f"teacher.data is {type(data).__name__}, which holds no texts: name a data set of text"
        )
    found: TextSplits = data.seeded(recipe.seed).load()
    return found


def evenly(count: int | None, total: int) -> Tensor:
    """``count`` of the numbers below ``total``, evenly spread; None or too many = all."""
    count = total if count is None else min(count, total)
    return torch.arange(count) * total // count


def spec_of(tokenizer: Any, reading: Reading) -> Spec:
    """What texts ask of a network."""
    return Spec(
        classes=len(tokenizer), channels=0, size=reading.length, special=special_of(tokenizer)
    )  # fmt: skip


class Desk:
    """The texts of one run in batches, and the pair that works on them.

    Attributes:
        everything: the rows of the training and of the validation part.
        held_out: places [m] of the latter.
        learning: the batches of the training.
        taught: the batches of a teacher that learns.
        test: the batches of the evaluation.
    """

    def __init__(self, plan: Language, recipe: Any, run: Run) -> None:
        self.plan, self.recipe, self.run = plan, recipe, run
        self.tokens = Tokens(recipe)
        rows, splits = self.tokens.rows, self.tokens.splits
        self.train_rows, validation = rows(splits.train), rows(splits.validation)
        self.test_rows = self.tokens.test
        whole, count = self.train_rows.joined(validation), len(self.train_rows)
        places, seed = torch.arange(len(whole)), derive(run.seed, "batches")
        self.held_out = places[count:]
        self.everything = TokenBatches(whole, batch_size=plan.eval_batch_size, shuffle=False)
        self.learning = TokenBatches(whole, places[:count], batch_size=plan.batch_size, seed=seed)
        self.test = TokenBatches(
            self.test_rows, evenly(plan.eval_rows, len(self.test_rows)), batch_size=plan.eval_batch_size,
            shuffle=False,
        )  # fmt: skip
        self.taught = self._lessons(recipe) or self.learning
        example = next(iter(self.learning.in_order(2).epoch(0)))
        self.pair = Pair(
            recipe, run, self.tokens.spec, example, samples=len(whole),
            teacher_classes=self.tokens.teachers.classes,
        )  # fmt: skip
        self.pair.agree(train=whole.fingerprint, test=self.test_rows.fingerprint)
        for part in self.pair.student.modules():
            if isinstance(part, CausalLM):
                part.tokenizer = self.tokens.tokenizer  # what it is saved with
        if any(rows.segments is not None for rows in (whole, self.test_rows)):
            for net in self.pair.nets().values():
                for part in net.modules():
                    if isinstance(part, CausalLM):
                        check_packing(part)

    def _lessons(self, recipe: Any) -> TokenBatches | None:
        """The batches of a teacher that learns from texts of its own."""
        if self.tokens.lessons is None:
            return None
        tokenizer = self.tokens.other or self.tokens.tokenizer
        rows = rows_of(self.tokens.lessons.train, tokenizer, recipe.teacher.lessons().reading)
        seed = derive(self.run.seed, "lessons")
        return TokenBatches(rows, batch_size=self.plan.batch_size, seed=seed)

    def readers(self) -> dict[str, Reader]:
        """Both networks, as they are used by themselves, with what they read texts by."""
        own, other = self.tokens.tokenizer, self.tokens.other or self.tokens.tokenizer
        return {
            who: (net.deployed().eval(), own if who == "student" else other)
            for who, net in self.pair.here().items()
        }

    def answered(self) -> dict[str, dict[str, Any]]:
        """Figures of what both networks answer to prompts of the test part; empty where there are none."""
        asked = [document for document in self.tokens.splits.test.documents if document.prompt]
        places = evenly(self.plan.answers, len(asked)).tolist()
        readers = {who: reader for who, reader in self.readers().items() if writes(reader[0])}
        found = answered(
            readers, [asked[place] for place in places], tokens=self.plan.answer_tokens,
            template=self.recipe.data.reading.template, batch_size=self.plan.eval_batch_size,
        )  # fmt: skip
        if places and not found:
            self.run.warn("no prompt of the test leaves room for an answer: lower scenario.answer_tokens")
        return found

    def source(
        self, batches: TokenBatches, selection: Selection | None = None, *, steps: int | None = None
    ) -> Source:
        """The batches of a stage: those that were selected, ``steps`` of them to an epoch."""
        if selection is not None:
            return Selected(batches, selection, self.run, steps=steps)
        return batches if steps is None else Going(batches, steps)

    def written(self, plan: Writing, source: Source) -> Written:
        """``source`` with texts that a network writes."""
        nets = self.pair.nets()
        kind: Callable[..., Written] = Written
        if plan.buffer is not None:
            kind = partial(Replayed, epochs=self.plan.epochs, validate=self.held_out_loss)
        return kind(
            plan, source, self.learning.rows, model_of(nets[plan.by]), self.run,
            spec=self.tokens.spec, batch_size=self.plan.batch_size,
            teacher=model_of(nets["teacher"]) if plan.teacher_mix else None,
        )  # fmt: skip

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The student's mean loss in nats over the tokens of the validation part, as it is now."""
        net = self.pair.student
        step, total, count = by_labels(net.eval()), 0.0, 0
        for batch in self.run.over("validation", self.everything.subset(self.held_out)):
            with autocast(self.run):
                terms = step(batch.to(self.run.device), Progress())
            total += len(batch.labels) * float(terms["labels"])
            count += len(batch.labels)
        net.train()
        return total / count

    def key(self, stage: str) -> dict[str, Any]:
        """All that the weights after a stage of learning by labels depend on, besides its length and the
        optimiser; the stage is ``teacher`` or ``start``."""
        settings, teaches = self.run.settings, stage == "teacher"
        choice, net = (
            (self.recipe.teacher, self.pair.teacher) if teaches else (self.recipe.student, self.pair.student)
        )
        batches = self.taught if teaches else self.learning
        return {
            "stage": stage, "network": repr(choice), "data": batches.describe(), "seed": self.run.seed,
            "index": value_hash(batches.index.tolist()), "batch": self.plan.batch_size,
            "constants": hashes({stage: net} if net is not None else {}),
            "precision": settings.precision, "compile": settings.compile, "device": self.run.device.type,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """The data's name, licence and source."""
        train = self.tokens.splits.train
        return {
            "data": self.tokens.splits.name, "data_licence": train.licence, "data_source": train.source
        }  # fmt: skip

    def protocol(self) -> dict[str, Any]:
        """What the run's texts were."""
        reading: Reading = self.recipe.data.reading
        return {
            "vocabulary": self.tokens.spec.classes, "length": reading.length,
            "packed": reading.pack and self.tokens.other is None, "training_rows": len(self.learning.index),
            "training_tokens": self.train_rows.counted, "validation_rows": len(self.held_out),
            "test_rows": len(self.test.index),
            "test_tokens": sum(len(batch.labels) for batch in self.test.epoch(0)),
        }  # fmt: skip
