"""A teacher and a student at work together: built, asked, captured, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import (
    Batch,
    Course,
    Facts,
    Net,
    Objective,
    Outputs,
    Selection,
    Spec,
    Teacher,
    Unembedding,
)
from limbeck.data.batches import Batches
from limbeck.engine import shared
from limbeck.engine.capture import (
    CHUNK,
    Captured,
    Replayable,
    WithQuery,
    outputs_of,
    rows_of,
    token_outputs,
    token_rows,
    topped,
)
from limbeck.engine.distillation import Ask, Distillation, combine, main_of
from limbeck.engine.fit import Source, autocast
from limbeck.engine.guards import checksum
from limbeck.engine.run import Run
from limbeck.engine.seeds import generator
from limbeck.engine.shards import is_shared, share_out
from limbeck.engine.state import load_variable_state, module_hash, value_hash
from limbeck.errors import ConfigError, NonFiniteError, ShapeError
from limbeck.nets.taps import core
from limbeck.objectives.labels import Labels
from limbeck.scenarios.fit_together import has_teacher, named
from limbeck.scenarios.selected import Selected
from limbeck.scenarios.weighed import Weighed

Window = tuple[int, int]


class Pair:
    """Both networks of a recipe, what is matched between them, and their caches.

    Args:
        recipe: names teacher, student, objectives and selector.
        run: the run to work in; its ``modules`` are set here.
        spec: what the networks are built for.
        example: a batch for the dry run that sizes the objectives' adapters.
        shared_query: whether the student's query also selects the teacher's prompts.
        samples: how many samples the data has.
        teacher_classes: what the teacher is built for; None = the student's classes.

    Attributes:
        order: where a teacher was trained before on the data set's own class numbers: that number of each
            of the student's classes; None = both number alike.
        tokens: how many the student knows, where the teacher reads the same ones; None = it does not.
        tells: of how many of its most probable tokens a served teacher tells; None = it is not served.
    """

    tokens: int | None = None

    def __init__(
        self, recipe: Any, run: Run, spec: Spec, example: Batch, *, shared_query: bool = True,
        samples: int = 0, teacher_classes: int | None = None,
    ) -> None:  # fmt: skip
        self.run, self.samples, self.recipe, self.spec = run, samples, recipe, spec
        self.order: Tensor | None = None
        self.objectives = named(recipe)
        self.tells = recipe.teacher.tells() if isinstance(recipe.teacher, Teacher) else None
        self.needs = combine(self.objectives)
        self.root = shared.cache_root(run.folder, run.settings)
        self.teacher: Net | None
        self.student, self.teacher = build_networks(
            recipe, spec, run.seed, shared_query=shared_query, device=run.device,
            teacher_classes=teacher_classes,
        )  # fmt: skip
        for who, net in self.here().items():
            if run.settings.shards(who):
                share_out(net, who, run.ranks, run.device)
        for net in self.nets().values():
            project(net, self.needs.logits)
        if example.rows is not None and example.other is None:
            self.tokens = len(head_of(self.student).weight)
        self.judged = teacher_classes in (None, spec.classes)
        self.adapting = None if self.teacher is None else self.teacher.adapting()
        if self.adapting is not None:
            renormalise(recipe, self.adapting.to(run.device))
            if not any(objective.path for objective in self.objectives.values()):
                run.warn("the teacher's second path learns but no objective listens to it: give one a path")
        self.query_net = self.student if shared_query and self.student.query_dim is not None else None
        self.query_hash = {} if self.query_net is None else hashes({"net": self.query_net})
        self.learns = (
            [] if self.teacher is None else [p for p in self.teacher.parameters() if p.requires_grad]
        )
        self.example = example.to(run.device)
        self.adapters = self._build_adapters(self.example)
        parts: dict[str, nn.Module] = {**self.nets(), "objectives": self.adapters}
        run.modules = nn.ModuleDict(parts if self.adapting is None else {**parts, "adapting": self.adapting})

    def agree(self, **data: str) -> None:
        """Hold a resumed run to the frozen networks, and to the ``data`` by its fingerprints, that it began
        with.

        Raises:
            CheckpointError: one of them is another.
        """
        still = constants(self.nets())
        if self.teacher is not None and not self.learns:
            still["teacher"] = self.teacher
        sums = {name: value_hash(checksum(part)) for name, part in still.items()}
        self.run.agree("what the run reads", {**data, **sums})

    @property
    def listens(self) -> bool:
        """Whether an objective reads what the teacher says."""
        return self.needs.teacher_logits or bool(self.needs.teacher)

    def succeed(self, student: Net, objectives: Mapping[str, Objective]) -> None:
        """Let another student take the place of this one, to learn by ``objectives``.

        Raises:
            LimbeckError: they do not fit the networks.
        """
        self.student, self.objectives = student.to(self.run.device), dict(objectives)
        self.needs = combine(self.objectives)
        for net in self.nets().values():
            project(net, self.needs.logits)
        self.adapters = self._build_adapters(self.example)
        self.run.modules.add_module("student", self.student)
        self.run.modules.add_module("objectives", self.adapters)

    def nets(self) -> dict[str, Net]:
        """The networks by role."""
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    def here(self) -> dict[str, Net]:
        """The networks that are built here, by role: all but a served teacher."""
        return {who: net for who, net in self.nets().items() if who == "student" or self.tells is None}

    @torch.no_grad()
    def _build_adapters(self, example: Batch) -> nn.ModuleDict:
        """The dry run, and the objectives, sized by what both networks give in a dry run."""
        example = self.with_query(example)
        taught = None
        if self.teacher is not None:
            taught = self.ask_live(example)
            if self.adapting is not None:
                taught = self.adapting.eval()(self.told(example), taught, self.needs.teacher)
        self.student.eval()
        own = self.student(example, taps=self.needs.student, teacher=taught)
        self.classes = own.logits.shape[1] if example.rows is None else self.spec.classes
        if taught is not None:
            self._check_answer(taught, example)
        self.dry = own, own if taught is None else taught
        return self.built(self.objectives)

    def _check_answer(self, taught: Outputs, example: Batch) -> None:
        """Raise where what the teacher says in the dry run cannot be learnt from."""
        answer = main_of(taught)
        if not torch.isfinite(answer).all() and not torch.isnan(example.inputs).any():
            raise NonFiniteError(
                "the teacher's output is not finite before any training: mend its weights, or name others"
            )
        if example.rows is None and self.needs.teacher_logits and taught.logits.shape[1] != self.classes:
            raise ShapeError(
                f"the teacher has {taught.logits.shape[1]} classes and the student {self.classes}: "
                "give both a classifier for the same classes"
            )
        if self.tokens is not None and self.needs.logits and 0 < taught.logits.shape[1] < self.tokens:
            raise ShapeError(
                f"the teacher has {taught.logits.shape[1]} tokens and the student {self.tokens}, and an "
                "objective compares all logits: take divergence, or a student with the teacher's vocabulary"
            )

    def built(self, objectives: Mapping[str, Objective], student: Net | None = None) -> nn.ModuleDict:
        """The modules of ``objectives``, sized by what both networks gave in the dry run.

        Args:
            student: the network that learns by them; None = the student itself.
        """
        own, taught = self.dry
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.derive("objectives"))
            built = {
                name: o.build(own, taught.along(o.path), self._facts(name, student or self.student))
                for name, o in objectives.items()
            }
        return nn.ModuleDict(built).to(self.run.device)

    def _facts(self, name: str, student: Net) -> Facts:
        seed = self.run.derive("objectives", name)
        return Facts(samples=self.samples, seed=seed, student=student, teacher=self.teacher)

    def prepare(self, course: Course) -> None:
        """Let student and objectives look at data and teacher before the student's training."""
        self.student.prepare(course)
        prepare(self.adapters, course)

    def start(self, stage: str, index: Tensor, labels: Tensor, built: nn.ModuleDict | None = None) -> None:
        """Tell the objectives, or others that were ``built``, which samples [n] the stage goes over, and the
        labels [N] of the data."""
        for name, objective in (self.adapters if built is None else built).items():
            if hasattr(objective, "start"):
                objective.start(index, labels, self.run.generator("start", stage, name))  # type: ignore[operator]

    def trainable(self) -> dict[str, int]:
        """How many numbers each network's training may change, and that of a teacher's second path."""
        found = {"student": _learning(self.student)}
        if self.teacher is not None:
            found["teacher"] = sum(p.numel() for p in self.learns)
        return found if self.adapting is None else {**found, "second_path": _learning(self.adapting)}

    # Steps

    def teach(self, learns: bool) -> None:
        """Let the teacher learn, or make it stand still."""
        assert self.teacher is not None
        for parameter in self.learns:
            parameter.requires_grad_(learns)
        self.teacher.train(learns)

    def lesson(self, window: Window | None, *, keep: bool = False) -> Distillation:
        """The teacher's own step: the labels. ``keep`` holds its outputs for a student's turn."""
        assert self.teacher is not None
        dummy = Outputs(torch.empty(1, 2))
        return Distillation(
            self.teacher,
            {"labels": Labels().build(dummy, dummy)},
            replace(self.needs, student=self.needs.teacher if keep else (), teacher=()),
            by_row={"labels"},
            window=window,
            query=None if self.query_net is None else self.query_net.query,
            keep=keep,
        )

    def distillation(
        self, window: Window | None, ask: Ask | None, selection: Selection | None = None
    ) -> Distillation:
        """The student's step, and that of the teacher's second path."""
        return Distillation(
            self.student,
            dict(self.adapters.items()),
            self.needs,
            ask=ask,
            adapting=self.adapting if ask is not None else None,
            paths={name: objective.path for name, objective in self.objectives.items()},
            by_row={name for name, objective in self.objectives.items() if objective.by_row},
            selector=None if selection is None else Weighed(selection, self.adapters),
            window=window,
            query=self.student.query if self.student.query_dim is not None else None,
            own_query=self.query_net is None,
        )

    def told(self, batch: Batch) -> Batch:
        """The batch as the teacher gets it: in its own tokens, and without a query that it does not share."""
        read = batch if batch.other is None else batch.other
        return read if self.query_net is not None else replace(read, query=None)

    def ask_live(self, batch: Batch) -> Outputs:
        """What the teacher says to a batch that carries the shared query."""
        assert self.teacher is not None
        self.teacher.eval()
        outputs: Outputs = self.teacher(self.told(batch), taps=self.needs.teacher)
        return self._in_order(outputs).detach()

    def ask_kept(self, batch: Batch) -> Outputs:
        """What the teacher says live, as a cache would give it back: no more of it than is kept."""
        said, top = self.ask_live(batch), self.top()
        if top is None:
            return said
        if batch.rows is None:
            return replace(outputs_of(rows_of(said, top), self.classes), prompts=said.prompts)
        head = self.head()
        width = head if isinstance(head, int) else len(head.weight)
        return topped(said, top, width, project=self.needs.logits)

    @torch.no_grad()
    def observe(self, batches: Batches) -> None:
        """Let the teacher look once at what the student learns from; a resumed run keeps what it found."""
        if self.teacher is None or type(self.teacher).observe is Net.observe or self.run.pending is not None:
            return
        seen = batches.in_order(CHUNK).epoch(0)
        self.teacher.eval().observe(self.told(self.with_query(b.to(self.run.device))) for b in seen)

    def arranged(self, who: str, logits: Tensor) -> Tensor:
        """``logits`` [B, C] in the student's numbering of the classes."""
        return logits if self.order is None or who == "student" else logits[:, self.order]

    def _in_order(self, outputs: Outputs) -> Outputs:
        """The teacher's outputs, its other paths' too, in the student's numbering of the classes, and without
        tokens that the student has no room for."""
        paths = {name: self._in_order(other) for name, other in outputs.paths.items()}
        found = replace(outputs, logits=self.arranged("teacher", outputs.logits), paths=paths)
        if self.tokens is None or outputs.unembedding is None:
            return found
        head = outputs.unembedding.first(self.tokens)
        return replace(found, logits=outputs.logits[:, : self.tokens], unembedding=head)

    def with_query(self, batch: Batch) -> Batch:
        """The batch with the student's query."""
        if self.student.query_dim is None or batch.query is not None:
            return batch
        return replace(batch, query=self.student.query(batch.inputs))

    # Sources and caches

    def source(
        self, batches: Batches, selection: Selection | None = None, *, equal_steps: bool = False
    ) -> Source:
        """The batches that a stage goes over: selected, and with query features read from disk where
        views are replayed."""
        chosen: Source = batches
        if selection is not None:
            chosen = Selected(batches, selection, self.run, steps=batches.steps if equal_steps else None)
        return self.with_queries(chosen, batches)

    def with_queries(self, chosen: Source, batches: Batches) -> Source:
        """``chosen``, a choice among ``batches``, with query features from disk where views are replayed."""
        net = self.student
        if net.query_dim is None or not self._caches(batches) or is_shared(self.student):
            return chosen

        def ask(batch: Batch) -> dict[str, Tensor]:
            with autocast(self.run):
                return {"query": net.query(batch.inputs)}

        key = {"what": "query", "net": hashes({"net": net}), "precision": self.run.settings.precision}
        captured = Captured(self.root, lambda: key, batches, ask, device=self.run.device, warn=self.run.warn)
        return WithQuery(chosen, self.run.kept(captured))

    def captured_teacher(self, batches: Replayable, epochs: int) -> Captured | None:
        """The teacher's outputs on disk, where that pays: views replayed fewer times than epochs, or a served
        teacher, whose answers are kept should it stop."""
        teacher, settings, views = self.teacher, self.run.settings, batches.replays
        if teacher is None or views is None or not settings.cache:
            return None
        if views >= epochs and self.tells is None:
            return None
        queries = self.student.query_dim is not None and is_shared(self.student)
        if self.student.reads_prompts or is_shared(teacher) or queries:
            return None

        def key() -> dict[str, Any]:
            return {
                "what": "teacher", "net": module_hash(teacher), "taps": self.needs.teacher,
                "query": self.query_hash, "precision": settings.precision, "top": self.top(),
                "tokens": self.tokens,
            }  # fmt: skip

        def ask(batch: Batch) -> dict[str, Tensor]:
            self.run.heed("while the teacher was asked")
            with autocast(self.run):
                said = self.ask_live(self.with_query(batch))
            if batch.rows is not None:
                return token_rows(said, self.told(batch), self.top())
            rows = rows_of(said, self.top())
            if self.top() is not None:
                self._report_rest(rows)
            return rows

        dtype = torch.float16 if settings.cache_dtype == "float16" else torch.float32
        shares = settings.share_teacher_cache
        folder = self.root if shares else self.run.folder / "cache"
        size = CHUNK if self.dry[0].hidden is None else batches.batch_size  # a row of text is far more
        captured = Captured(
            folder, key, batches, ask, device=self.run.device, warn=self.run.warn, dtype=dtype, size=size,
            shared=shares,
        )  # fmt: skip
        return self.run.kept(captured)

    def _report_rest(self, rows: Mapping[str, Tensor]) -> None:
        """Log how much of the teacher's probability, at temperature 1, a shortened cache leaves out."""
        rest = rows["rest"] + math.log(self.classes - (self.top() or 0))
        share = (rest - torch.logaddexp(rest, rows["top"].logsumexp(1))).exp()
        self.run.log(
            "teacher_shortened",
            kept=self.top(),
            classes=self.classes,
            samples=len(share),
            spread=float(share.mean()),
        )

    def left_out(self, captured: Captured, batches: Replayable) -> dict[str, float]:
        """What a cache of a language model's most probable tokens lacks, for ``result.json``.

        Returns:
            ``kept`` of ``tokens`` tokens, and the mean ``left_out`` over the tokens that count of the
            probability of the others, in [0, 1], at temperature 1.
        """
        seen = self.run.over("left out", batches.in_order(batches.batch_size))
        kept = torch.cat([self.told(batch).counted(captured(batch)["shares"]).exp().sum(1) for batch in seen])
        left_out = 1 - float(kept.double().mean())
        return {"kept": self.top() or 0, "tokens": self.classes, "left_out": left_out}

    def remembered(self, captured: Captured | None) -> Ask:
        """A teacher that answers from what was captured, or live where nothing was."""
        if captured is None:
            return self.ask_kept

        def ask(batch: Batch) -> Outputs:
            if batch.rows is None:
                return outputs_of(captured(batch), self.classes)
            return token_outputs(captured(batch), self.told(batch), self.head(), project=self.needs.logits)

        return ask

    def head(self) -> Unembedding | int:
        """The last layer of a teacher that is a language model, for tokens that the student has too; of one
        that is served, how many tokens it has."""
        assert self.teacher is not None
        if self.tells is not None:
            return self.spec.classes
        head = head_of(self.teacher)
        return head if self.tokens is None else head.first(self.tokens)

    def top(self) -> int | None:
        """How many logits of the teacher are kept; None = all."""
        told = [count for count in (self.run.settings.cache_top_k, self.tells) if count is not None]
        return None if not told or min(told) >= self.classes else min(told)

    def _caches(self, batches: Batches) -> bool:
        return self.run.settings.cache and batches.replays is not None

    # Measuring

    @torch.no_grad()
    def tune(self, held_out: Batches, run: Run) -> dict[str, float]:
        """Let the student settle what it chooses after training, on validation samples; what it chose."""
        if type(self.student).tune is Net.tune:
            return {}

        def choose() -> dict[str, float]:
            self.student.eval()
            parts = [self.with_query(b.to(run.device)) for b in held_out.epoch(0)]
            return self.student.tune([self.student(b) for b in parts], torch.cat([b.labels for b in parts]))

        chosen: dict[str, float] = run.once("tuned", choose)
        self.student.tuned(chosen)
        return chosen

    def facts(self) -> dict[str, Any]:
        """What ``result.json`` says of the objectives' modules; nothing where they have nothing to say."""
        found = {name: o.facts() for name, o in self.adapters.items() if hasattr(o, "facts")}  # type: ignore[operator]
        return {"objectives": found} if found else {}

    @torch.no_grad()
    def answers(self, sources: Sequence[Source], classes: int) -> tuple[dict[str, Tensor], Tensor]:
        """Predictions [N, classes] of each network over ``sources`` in one pass, and the labels [N]."""
        nets = self.nets() if self.judged else {"student": self.student}
        said: dict[str, list[Tensor]] = {name: [] for name in nets}
        labels = []
        for net in nets.values():
            net.eval()
        for source in sources:
            for batch in self.run.over("evaluation", source):
                labels.append(batch.labels)
                with autocast(self.run):
                    moved = self.with_query(batch.to(self.run.device))
                    for name, net in nets.items():
                        told = moved if net is self.student else self.told(moved)
                        answer = net(told)
                        logits = self.arranged(name, net.predict(answer))
                        said[name].append(logits[:, :classes].float().cpu())
                        if net is not self.student:
                            second = self.adapting
                            whole = self._in_order(answer) if second is None else second.eval()(told, answer)
                            for path, other in whole.paths.items():
                                found = said.setdefault(f"teacher/{path}", [])
                                found.append(other.logits[:, :classes].float().cpu())
        return {name: torch.cat(parts) for name, parts in said.items()}, torch.cat(labels)

    @torch.no_grad()
    def key_accuracy(self, who: str, tests: Sequence[Source]) -> list[float] | None:
        """Percent of each task's test samples that find the task's own prompts; None where no key is a
        task's, or where the network selects by a query of its own."""
        net = self.nets()[who]
        if net.query_dim is None or (net is self.teacher and self.query_net is None):
            return None
        shares = []
        for task, source in enumerate(tests):
            seen = self.run.over("key accuracy", source)
            queries = [self.with_query(batch.to(self.run.device)).query for batch in seen]
            share = net.key_accuracy(torch.cat([q for q in queries if q is not None]), task)
            if share is None:
                return None
            shares.append(100 * float(share))
        return shares


def build_networks(
    recipe: Any, spec: Spec, seed: int, *, shared_query: bool = True, device: torch.device | str = "cpu",
    teacher_classes: int | None = None,
) -> tuple[Net, Net | None]:  # fmt: skip
    """Student and teacher, built from ``seed``; the student is introduced to its teacher."""
    student: Net = recipe.student.build(spec, generator(seed, "student")).to(device)
    if not has_teacher(recipe):
        return student, None
    dim = student.query_dim if shared_query else None
    wanted = replace(spec, query_dim=dim, classes=teacher_classes or spec.classes)
    teacher: Net = recipe.teacher.build(wanted, generator(seed, "teacher")).to(device)
    renormalise(recipe, teacher)
    student.attach_teacher(teacher)
    return student, teacher


def build_student(recipe: Any, spec: Spec, seed: int, *, shared_query: bool = True) -> Net:
    """The student alone; its teacher is built only where the student keeps something of it."""
    student: Net = recipe.student.build(spec, generator(seed, "student"))
    if not student.keeps_teacher:
        return student
    return build_networks(recipe, spec, seed, shared_query=shared_query)[0]


def renormalise(recipe: Any, teacher: nn.Module) -> None:
    """Images come as the student expects them: let the teacher see them as it does, where that differs."""
    if not (hasattr(recipe.student, "input_spec") and hasattr(recipe.teacher, "input_spec")):
        return
    ours, theirs = recipe.student.input_spec(), recipe.teacher.input_spec()
    if (ours.mean, ours.std) == (theirs.mean, theirs.std):
        return
    mean, std, to_mean, to_std = (
        torch.tensor(values).reshape(-1, 1, 1) for values in (ours.mean, ours.std, theirs.mean, theirs.std)
    )

    def see(_net: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        batch: Batch = given[0]
        scale, shift = (std / to_std).to(batch.inputs), ((mean - to_mean) / to_std).to(batch.inputs)
        return (replace(batch, inputs=batch.inputs * scale + shift), *given[1:])

    teacher.register_forward_pre_hook(see)


def with_weights(student: Net, state: dict[str, Tensor]) -> Net:
    """``student`` with the learnt weights of a finished run, in evaluation mode."""
    load_variable_state(core(student), state)
    return student.eval()


def head_of(net: Net) -> Unembedding:
    """The last layer of a language model, without a graph.

    Raises:
        ConfigError: the network is no language model, or several.
    """
    found = [part for part in net.modules() if hasattr(part, "unembedding")]
    if len(found) != 1:
        raise ConfigError(
            f"{type(net).__name__} holds {len(found)} language models: take one that is a single one"
        )
    head: Unembedding = found[0].unembedding().detach()  # type: ignore[operator]
    return head


def prepare(built: nn.ModuleDict, course: Course) -> None:
    """Let objectives look at data and teacher before the training that they are of."""
    for objective in built.values():
        if hasattr(objective, "prepare"):
            objective.prepare(course)  # type: ignore[operator]


def project(net: Net, logits: bool) -> None:
    """Tell language models within ``net`` whether anybody reads their logits."""
    for part in net.modules():
        if isinstance(part, Net):
            part.projects = logits


def _learning(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def constants(nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts that must not move, by a name that a message can use."""
    return {
        f"{name}.{path}".rstrip("."): part
        for name, net in nets.items()
        for path, part in net.named_modules()
        if getattr(part, "constant", False)
    }


def hashes(nets: Mapping[str, nn.Module]) -> dict[str, str]:
    """Hashes of the constant parts."""
    return {name: module_hash(part) for name, part in constants(nets).items()}
