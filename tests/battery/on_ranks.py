"""What one of two processes does for ``test_ranks``: every choice, in float64 where it can, alone and shared.

Started as ``python -m tests.battery.on_ranks FOLDER`` in the environment that torchrun sets; the first
process writes the largest relative difference by wing and name to ``FOLDER/found.json``, or what was raised.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.battery import networks, test_objectives
from tests.selectors.courses import Small
from tests.selectors.small_texts import Texts
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck import registry
from limbeck.contracts import Batch, Needs, Net, Objective, Outputs, Progress, Selection, Unembedding
from limbeck.engine.distillation import Distillation, combine
from limbeck.engine.ranks import Ranks, here
from limbeck.engine.shards import blocks, share_out, whole
from limbeck.objectives.divergence import TokenDivergence
from limbeck.objectives.labels import Labels

STEPS = 2
PARTS = (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 2, 0]))  # uneven for two
LAST = torch.tensor([3])  # leaves one of two without a row
SINGLE = {"talking", "elastic", "influence"}  # compute parts in float32, whatever they are given


def at(step: int) -> Progress:
    """A step in the midst of a stage."""
    return replace(test_objectives.AT, step=test_objectives.AT.step + step)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if one.shape != other.shape:
        return float("inf")
    wide, wider = one.detach().double(), other.detach().double()
    if not wide.numel() or torch.equal(wide, wider):
        return 0.0
    return float((wide - wider).abs().max() / wide.abs().max().clamp(min=1e-6))


def compared(
    make: Callable[[], nn.Module], batches: Sequence[Batch], ranks: Ranks, *, shards: bool = False
) -> float:
    """Steps of two equal modules, of which one shares its batches, and where asked for its student's blocks:
    their terms, gradients and state."""
    alone, together = make(), make()
    if shards:
        student: Any = together.get_submodule("student")
        share_out(student, "student", ranks, torch.device("cpu"))
        assert any(isinstance(p, DTensor) for p in together.parameters())
    call, found = ranks.wrapped(together), []
    for step, batch in enumerate(batches):
        for module in (alone, together):
            module.zero_grad()
        terms, shared = alone(batch, at(step)), call(ranks.split(batch), at(step))
        assert terms.keys() == shared.keys()
        for given in (terms, shared):
            torch.stack(list(given.values())).sum().backward()
        found += [difference(terms[name], shared[name]) for name in terms]
        pairs = zip(alone.parameters(), together.parameters(), strict=True)
        grads = [(a.grad, whole(b.grad)) for a, b in pairs]
        found += [difference(a, b) for a, b in grads if a is not None and b is not None]
        buffers = zip(alone.buffers(), together.buffers(), strict=True)
        found += [difference(a, b) for a, b in buffers]
        assert [p.grad is None for p in alone.parameters()] == [p.grad is None for p in together.parameters()]
    state = together.state_dict()
    assert not any(isinstance(value, DTensor) for value in state.values())
    return max(found + [difference(value, state[name]) for name, value in alone.state_dict().items()])


class Table(Net):
    """A network that has its answer to each sample by heart; no objective asks for all of it."""

    partial = True

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.form, self.taps = outputs, list(outputs.features)
        kept = {"logits": outputs.logits, "soft": outputs.soft_logits, "hidden": outputs.hidden}
        kept["head"] = None if outputs.unembedding is None else outputs.unembedding.weight
        kept |= {f"tap{number}": outputs.features[tap] for number, tap in enumerate(self.taps)}
        self.kept = nn.ParameterDict({k: v.detach().clone() for k, v in kept.items() if v is not None})

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        rows = {name: self.kept[name][batch.index] for name in self.kept if name != "head"}
        return Outputs(
            rows["logits"], rows.get("soft"), {tap: rows[f"tap{n}"] for n, tap in enumerate(self.taps)},
            hidden=rows.get("hidden"),
            unembedding=Unembedding(self.kept["head"]) if "head" in self.kept else None,
        )  # fmt: skip


def precise(names: Iterable[str]) -> Iterator[str]:
    """The names, each with torch's default type set as it needs."""
    for name in names:
        torch.set_default_dtype(torch.float32 if name in SINGLE else torch.float64)
        yield name


def objectives(_: Path) -> Iterator[tuple[str, Callable[[], nn.Module], list[Batch]]]:
    """Each with networks that it fits."""
    for name in precise(registry.names("objectives")):
        choice = test_objectives.make(name)

        def make(choice: Objective = choice, name: str = name) -> nn.Module:
            return Distillation(
                Table(test_objectives.student(choice)), {name: test_objectives.build(choice)},
                choice.needs(), ask=Table(test_objectives.teacher(choice)).requires_grad_(False),
                by_row={name} if choice.by_row else (),
            )  # fmt: skip

        parts = [*PARTS, LAST] if choice.by_row else PARTS  # what compares samples needs several
        yield name, make, [some(test_objectives.batch(choice, part)) for part in parts]


def some(batch: Batch) -> Batch:
    """Fewer samples than the battery's have fewer tokens that count."""
    return batch if batch.rows is None else replace(batch, rows=torch.arange(len(batch.index)))


def nets(kind: str, folder: Path) -> Iterator[tuple[str, Callable[[], nn.Module], list[Batch]]]:
    """Each that learns by gradient, taught by the labels; without dropout, which ranks draw apart."""
    for name in precise(registry.names(kind)):
        if name == "none":
            continue
        with here().in_turn():  # weights are written into the folder
            net = networks.build(networks.example(kind, name, folder))
        if not any(p.requires_grad for p in net.parameters()):
            continue
        seen = Outputs(torch.empty(1, networks.classes(net)))

        def make(net: Net = net, seen: Outputs = seen) -> nn.Module:
            own = copy.deepcopy(net).train()
            own.partial = True  # a second head learns from a teacher alone
            for part in own.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
            return Distillation(
                own, {"labels": Labels().build(seen, seen)}, Needs(), by_row={"labels"},
                query=own.query if own.query_dim is not None else None,
            )  # fmt: skip

        parts = [*PARTS, LAST]
        if any(isinstance(part, _BatchNorm) for part in net.modules()):
            parts = PARTS  # one sample has no statistics
        given = networks.batch(net, 6)
        yield name, make, [networks.ordered(given, part)[0] for part in parts]


class Chosen(nn.Module):
    """A selector at work beside a student: its shares of the loss, and the samples that it takes."""

    def __init__(self, name: str, course: Any) -> None:
        super().__init__()
        self.course = course
        self.selection: Selection = registry.get("selectors", name)().prepare(course)
        matched = {"kd": TokenDivergence()} if isinstance(course, Texts) else course.objectives
        one = course.student(course.batch(torch.arange(2)))
        self.step = Distillation(
            course.student, {name: objective.build(one, one) for name, objective in matched.items()},
            combine(matched), ask=course.ask, by_row=set(matched), selector=self.selection,
        )  # fmt: skip
        lesson = self.selection.lesson()
        self.lesson = None if lesson is None else lesson[0]

    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """The student's terms, the lesson's, which sees the whole batch, and the mean of what is chosen."""
        terms = self.step(batch, at)
        if self.lesson is not None:
            plain = self.course.batch(batch.index)
            terms |= {f"lesson.{name}": value for name, value in self.lesson(plain, at).items()}
        index = self.course.index
        chosen = self.selection.indices(index, self.course.labels[index], 0, torch.Generator().manual_seed(1))
        return terms | {"chosen": chosen.double().mean()}


def selectors(_: Path) -> Iterator[tuple[str, Callable[[], nn.Module], list[Batch]]]:
    """Each in the small course that it fits."""
    for name in precise(registry.names("selectors")):
        course = Texts if name in ("adaspec", "ddk") else Small

        def make(name: str = name, course: Any = course) -> nn.Module:
            return Chosen(name, Probed() if course is Texts else course())

        yield name, make, [course().batch(part) for part in PARTS]


class Probed(Texts):
    """Texts whose probe is another network."""

    def probe(self, name: str, epochs: int, *, taught: bool = False, same_start: bool = False) -> Net:
        """See the contract."""
        found: Net = type(self.student)(5)
        return found


@contextmanager
def said(found: dict[str, Any], name: str) -> Iterator[None]:
    """What is raised within is what was found."""
    try:
        yield
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    """Compare all wings."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", ".* returned a view tensor")
    ranks = here()
    wings: dict[str, Iterable[tuple[str, Callable[[], nn.Module], list[Batch]]]] = {
        "objectives": objectives(folder), "students": nets("students", folder),
        "teachers": nets("teachers", folder), "selectors": selectors(folder),
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {"shards": {}}
    for kind in ("students", "teachers"):
        for name, make, batches in nets(kind, folder):
            if list(blocks(make().get_submodule("student"))):
                with said(found["shards"], name):
                    found["shards"][name] = compared(make, batches, ranks, shards=True)
    for wing, choices in wings.items():
        found[wing] = {}
        for name, make, batches in choices:
            with said(found[wing], name):
                found[wing][name] = compared(make, batches, ranks)
    if ranks.first:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    ranks.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
