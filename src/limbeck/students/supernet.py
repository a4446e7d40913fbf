"""Super networks whose sub-networks all learn: a space of transformers to search in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from limbeck.contracts import Batch, Course, Nested, Net, Outputs, Progress, Spec, Student
from limbeck.engine.seeds import generator
from limbeck.errors import ConfigError
from limbeck.nets.causal_lm import CausalLM, TextInput, answer, language_model
from limbeck.nets.search_space import Architecture, SearchSpace, drawn, sandwich
from limbeck.nets.slices import check_cut, kind_and_config
from limbeck.nets.supernet import Supernet


@dataclass(frozen=True, kw_only=True)
class SupernetStudent(Student):
    """Copies of the teacher whose sub-networks all learn, as a space of students to search in (AutoDistil).

    Each of the K sub-spaces has a super network of its own, which starts as the teacher. In each step the
    largest and the smallest sub-network of each and some random ones learn from the same batch. Without a
    search the student answers as the largest sub-network of the last sub-space.

    Attributes:
        needs_teacher: it is made of its teacher's weights.
        spaces: K sub-spaces of the teacher, as ``{layers, hidden, ratio, heads}`` with rising values.
        others: M, random sub-networks of a step besides the largest and the smallest.
        ends: whether the largest and the smallest are in each step; else as many more are drawn.

    Raises:
        ConfigError: no sub-space, fewer than no others, or a sub-network that the teacher does not hold.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), sections 3.1 and 3.2.
    Differs: the K super networks learn in the same steps. They share no weight, so that this is as if one
    learnt after the other, unless the optimiser clips the gradient of all.
    """

    needs_teacher: ClassVar[bool] = True

    spaces: tuple[SearchSpace, ...]
    others: int = 2
    ends: bool = True

    def __post_init__(self) -> None:
        if not self.spaces:
            raise ConfigError("spaces is empty: name at least one {layers, hidden, ratio, heads}")
        if self.others < 0:
            raise ConfigError(f"others is {self.others}: allowed are values of at least 0")

    def input_spec(self) -> TextInput:
        """No pixels."""
        return TextInput()

    def reads_text(self) -> bool:
        """It does."""
        return True

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``; it has weights once a teacher is attached."""
        return SupernetLM(self, int(torch.randint(2**62, (), generator=generator)))

    def step(self, space: SearchSpace, generator: torch.Generator) -> dict[str, Architecture]:
        """The sub-networks of one step by name."""
        chosen = (
            sandwich(space, self.others, generator) if self.ends else drawn(space, 2 + self.others, generator)
        )
        ends = ("largest", "smallest")[: len({space.largest, space.smallest})] if self.ends else ()
        names = (*ends, *(f"random{number}" for number in range(len(chosen) - len(ends))))
        return dict(zip(names, chosen, strict=True))


class Place(NamedTuple):
    """A sub-network: the number of its sub-space, and its sizes."""

    space: int
    architecture: Architecture

    def sizes(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"space": self.space, **asdict(self.architecture)}


class SupernetLM(Net):
    """``SupernetStudent`` at work.

    Args:
        choice: what is built.
        seed: of the draws.

    Attributes:
        network: the super network of the last sub-space.
        before: those of the sub-spaces before it.
        learning: the sub-networks of the step by name; the first is the main answer.
        chosen: the sub-network that it answers as when it does not learn.
    """

    keeps_teacher = True
    partial = True  # a step may pass over layers, and an objective may read no logits

    def __init__(self, choice: SupernetStudent, seed: int) -> None:
        super().__init__()
        self.choice, self.seed = choice, seed
        self.network: CausalLM
        self.chosen = Place(len(choice.spaces) - 1, choice.spaces[-1].largest)
        self.start_step(Progress())

    def attach_teacher(self, teacher: Net) -> None:
        """Take over the teacher's form, and its weights as they are now.

        Raises:
            ConfigError: the teacher is no single model of the Llama family, or does not hold a sub-network.
        """
        self._teacher = (language_model(teacher),)  # unregistered: it is the teacher's
        self.network = copy.deepcopy(self._teacher[0]).float().requires_grad_(True).train()
        self.before = nn.ModuleList(copy.deepcopy(self.network.network) for _ in self.choice.spaces[1:])
        whole = (*self.before, self.network.network)
        self._supernets = tuple(Supernet(network) for network in whole)  # unregistered, as above
        for place in self.candidates():
            supernet = self._supernets[place.space]
            cut = supernet.cut(place.architecture)
            check_cut(supernet.network, cut)
            kind_and_config(supernet.network, cut)

    def prepare(self, course: Course) -> None:
        """Take over the weights of the teacher, which stands still now."""
        for supernet in self._supernets:
            supernet.network.load_state_dict(self._teacher[0].network.state_dict())

    def start_step(self, at: Progress) -> None:
        """Draw the sub-networks of a step."""
        self.learning: dict[str, Place] = {}
        for number in reversed(range(len(self.choice.spaces))):
            draws = generator(self.seed, at.task, at.step, number)
            for name, architecture in self.choice.step(self.choice.spaces[number], draws).items():
                self.learning[f"space{number}.{name}"] = Place(number, architecture)

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """What follows each token that counts; while it learns, as each sub-network of the step says."""
        if not self.training:
            return self.within(self.chosen, batch, taps)
        said = {name: self.within(place, batch, taps) for name, place in self.learning.items()}
        return replace(said.pop(next(iter(said))), subnets=said)

    def sharable(self) -> None:
        """See ``Net.sharable``: smaller networks run on parts of the weights."""

    def candidates(self) -> tuple[Place, ...]:
        """All sub-networks of all sub-spaces."""
        return tuple(
            Place(number, architecture)
            for number, space in enumerate(self.choice.spaces)
            for architecture in space.architectures()
        )

    def within(self, place: Place, batch: Batch, taps: tuple[str, ...] = ()) -> Outputs:
        """What the sub-network at ``place`` says; its gradients reach its part of the weights alone."""
        supernet = self._supernets[place.space]
        return supernet.run(
            supernet.cut(place.architecture),
            lambda small: answer(small, batch, taps, logits=self.projects),
        )

    def parameters_of(self, place: Place) -> int:
        """Exact number of parameters of a sub-network, shared ones once."""
        return self._supernets[place.space].parameters_of(place.architecture)

    def cut_out(self, place: Place) -> CausalLM:
        """That sub-network with weights of its own."""
        found = CausalLM(self._supernets[place.space].student(place.architecture))
        found.tokenizer = self.network.tokenizer
        return found

    def deployed(self) -> Net:
        """The sub-network that it answers as."""
        return self.cut_out(self.chosen)

    def nested(self) -> Mapping[str, Nested]:
        """The smallest and the largest sub-network of each sub-space."""
        found = {}
        for number, space in enumerate(self.choice.spaces):
            for name, architecture in (("smallest", space.smallest), ("largest", space.largest)):
                place = Place(number, architecture)
                found[f"space{number}.{name}"] = Nested(self.cut_out(place), place.sizes())
        return found

    def save(self, folder: Path) -> bool:
        """Write the sub-network that it answers as to ``folder``, and those of ``nested`` to folders of their
        names in it; ``from_pretrained`` loads each."""
        for name, nested in self.nested().items():
            nested.net.save(folder / name)
        return self.deployed().save(folder)
