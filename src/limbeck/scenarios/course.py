"""What a selector may look at before a static training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Objective, Outputs, Selection
from limbeck.data.together import Going, Sampled
from limbeck.engine.distillation import Distillation, combine
from limbeck.engine.fit import Source, Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.seeds import generator
from limbeck.errors import ConfigError
from limbeck.objectives.labels import Labels
from limbeck.scenarios.pair import Pair, constants, prepare, project


class Lessons:
    """The ``contracts.Course`` of a static training.

    Args:
        pair: both networks.
        everything: all training samples, those held out too.
        learning: the batches of the training to come.
        held_out: samples [m] kept for validation.
        optim: the student's optimiser.
        steps: of an epoch, where the samples go round; None = once over them.
    """

    def __init__(
        self, pair: Pair, everything: Sampled, learning: Sampled, held_out: Tensor, optim: Optim,
        *, steps: int | None = None,
    ) -> None:  # fmt: skip
        self.pair, self.everything, self.learning, self.optim = pair, everything, learning, optim
        self.labels, self.index, self.held_out = learning.labels, learning.index, held_out
        self.classes = pair.classes
        self.student, self.teacher = pair.student, pair.teacher
        self.objectives: Mapping[str, Objective] = pair.objectives
        self.noisy, self.steps = learning.noisy, steps
        self.epoch_samples = len(learning.index) if steps is None else steps * learning.batch_size
        self.once, self.warn = pair.run.once, pair.run.warn
        self.generator = pair.run.generator

    def batches(self, index: Tensor, size: int = 256, view: int | None = None) -> Iterator[Batch]:
        """Batches over ``index`` in its order; ``view`` None = without augmentation."""
        source = (self.everything if view is None else self.learning).subset(index).in_order(size)
        for batch in source.epoch(view or 0):
            yield self.pair.with_query(batch.to(self.pair.run.device))

    def ask(self, batch: Batch) -> Outputs:
        """What the teacher says, live and without a graph."""
        with torch.no_grad():
            return self.pair.ask_live(batch)

    def step(self, selection: Selection) -> Distillation:
        """See ``contracts.Course.step``."""
        return self.pair.distillation(None, None if self.teacher is None else self.pair.ask_kept, selection)

    def probe(
        self, name: str, epochs: int, *, taught: bool = False, same_start: bool = False,
        after: Callable[[Net, int], None] | None = None,
    ) -> Net:  # fmt: skip
        """See ``contracts.Course.probe``."""
        run, pair, stage = self.pair.run, self.pair, f"probe-{name}"
        draws = generator(run.seed, *(("student",) if same_start else ("probe", name)))
        net: Net = pair.recipe.student.build(pair.spec, draws).to(run.device)
        project(net, pair.needs.logits)
        if pair.teacher is not None:
            net.attach_teacher(pair.teacher)
        net.prepare(self)
        if same_start:  # the student may have learnt before its teacher came
            net.load_state_dict(self.student.state_dict())
        objectives = pair.objectives if taught else {"labels": Labels()}
        apart = [key for key, objective in objectives.items() if pair.adapting and objective.path]
        if apart:
            raise ConfigError(
                f"objective {apart[0]!r} listens to a path that learns beside the student, which the probe "
                "of a selector cannot ask: set selector.taught to false"
            )
        built = pair.built(objectives, net)
        prepare(built, self)
        pair.start(stage, self.index, self.labels, built)
        run.modules.add_module(stage, nn.ModuleDict({"net": net, "objectives": built}))
        module = Distillation(
            net, dict(built.items()), combine(objectives),
            ask=pair.ask_kept if taught and pair.teacher is not None else None,
            paths={key: objective.path for key, objective in objectives.items()},
            by_row={key for key, objective in objectives.items() if objective.by_row},
            query=net.query if net.query_dim is not None else None,
        )  # fmt: skip
        source: Source = self.learning if self.steps is None else Going(self.learning, self.steps)
        watched = None if after is None else Watched(source, after, net)
        source = watched or source
        run.meter.plan[stage] = source.steps * epochs
        fit(run, stage, [Turn(stage, module, self.optim, constants({stage: net}))], source, epochs)
        if watched is not None:
            watched.catch_up(epochs)
        return net.eval()


class Watched:
    """Batches at whose end of each epoch a network is looked at; it then trains on.

    A resumed run looks again, in order, at the epochs that it passed over: what is found there is kept in
    the run (``Course.once``), so that the network's weights do not matter.
    """

    def __init__(self, source: Source, after: Callable[[Net, int], None], net: Net) -> None:
        self.source, self.after, self.net, self.steps = source, after, net, source.steps
        self.seen = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        self.catch_up(epoch)
        yield from self.source.epoch(epoch, start)
        self.catch_up(epoch + 1)

    def catch_up(self, epochs: int) -> None:
        """Look at all epochs before number ``epochs`` that were not looked at."""
        with torch.random.fork_rng(devices=[]):
            for epoch in range(self.seen, epochs):
                self.after(self.net.eval(), epoch)
        self.seen = max(self.seen, epochs)
        self.net.train()


def by_labels(net: Net) -> Distillation:
    """A step of ``net`` on the labels alone."""
    dummy = Outputs(torch.empty(1, 2))
    objective = Labels()
    built = {"labels": objective.build(dummy, dummy)}
    return Distillation(net, built, objective.needs(), by_row={"labels"})


def facts_of(selection: Any) -> dict[str, Any]:
    """What ``result.json`` says of a selection; nothing where it has nothing to say."""
    found = selection.facts()
    return {"selection": found} if found else {}
