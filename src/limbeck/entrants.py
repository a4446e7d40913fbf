"""Who takes part in an arena: methods as objectives, with taps that fit the two networks at hand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from torch import nn

from limbeck import config, registry
from limbeck.config import Recipe
from limbeck.contracts import Net, Objective
from limbeck.errors import ConfigError, unknown
from limbeck.nets.taps import Frozen, Tapped
from limbeck.teachers.none import NoTeacher

ALONE, BASELINE = "ce", "kd"
"""The labels alone, and what all others are set against."""
SETTINGS = ("label-smoothing", "logit-std")
"""Methods that are settings of an objective: they take part by their recipe's name."""
PLAIN = {
    "teacher": ("none", "trained", "network", "timm", "module"),
    "student": ("mlp", "cnn", "cifar_resnet", "timm", "module"),
    "selector": ("all",),
}
"""Choices that leave a method to its objectives."""
DEPTHS = {"stages": 3, "blocks": 12, "hidden": 2}
"""How deep the networks are that the taps of recipes and of defaults were written for."""
STAGES = ("stages", "layers", "blocks", "hidden")
POOLED = ("pool", "global_pool", "fc_norm", "hidden")


@dataclass(frozen=True)
class Entrant:
    """A method that takes part.

    Attributes:
        name: what it is called.
        objective: what is added up.
        alone: whether it has no teacher.
        origin: where weights and temperatures are from.
        unfit: why its objectives alone are not the method; empty where they are.
    """

    name: str
    objective: tuple[Objective, ...]
    alone: bool = False
    origin: str = ""
    unfit: str = ""

    @property
    def description(self) -> str:
        """One line on the method."""
        if self.name == ALONE:
            return "Cross entropy: the labels alone, without a teacher."
        kind = "objectives" if self.name.replace("-", "_") in registry.names("objectives") else "recipes"
        return registry.describe(kind, self.name)

    def told(self) -> str:
        """What is added up, in a line: names, and those fields that are no defaults and no taps."""
        return " + ".join(map(_told, self.objective))

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """``base`` with this method in it."""
        return replace(
            base, name=self.name, description=self.description, objective=self.objective, seed=seed,
            teacher=NoTeacher() if self.alone else base.teacher, baselines=(), predicted=(),
        )  # fmt: skip


def _told(objective: Objective) -> str:
    name = registry.name_of(objective)[1]
    changed = {
        f.name: getattr(objective, f.name)
        for f in dataclasses.fields(objective)
        if not f.name.startswith(("student_", "teacher_")) and getattr(objective, f.name) != f.default
    }
    weight = getattr(objective, "weight", 1.0)
    changed.pop("weight", None)
    inside = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in changed.items())  # fmt: skip
    return f"{'' if weight == 1 else f'{weight:g} '}{name}{f' ({inside})' if inside else ''}"


def entrants(names: Sequence[str], base: Recipe) -> list[Entrant]:
    """The methods of these names, the two baselines first; all of them where none is named.

    A name is that of an objective, whose weights are those of the recipe of its name or else its defaults
    beside the labels, or that of a recipe, of which the objectives alone are taken.

    Raises:
        ConfigError: an unknown name; it may be an objective, a recipe, or ``ce``.
    """
    objectives = [name.replace("_", "-") for name in registry.names("objectives") if name != "labels"]
    asked = [*objectives, *SETTINGS] if not names else [name.replace("_", "-") for name in names]
    known = [*objectives, *registry.names("recipes"), ALONE]
    for name in asked:
        if name not in known:
            raise unknown("method", name, known)
    return [_entrant(name, base) for name in dict.fromkeys([BASELINE, ALONE, *asked])]


def _entrant(name: str, base: Recipe) -> Entrant:
    if name == ALONE:
        return Entrant(name, config.objectives(["labels"]), alone=True, origin="labels alone")
    if name == BASELINE and [registry.name_of(o)[1] for o in base.objective] == ["labels", "kd"]:
        return Entrant(name, base.objective, origin=f"recipe {base.name}")
    if name in registry.names("recipes"):
        objective = config.load(name).objective
        stem = name.replace("-", "_")
        named = [registry.name_of(o)[1] for o in objective]
        if stem not in registry.names("objectives") or stem in named:
            alone = not any(o.needs().teacher_logits or o.needs().teacher for o in objective)
            return Entrant(name, objective, alone, f"recipe {name}", _more(config.load(name)))
    return Entrant(name, config.objectives(["labels", name]), origin="defaults, beside the labels")


def _more(recipe: Recipe) -> str:
    """What of a method's own recipe an arena cannot take over: it changes the objectives alone."""
    for role, plain in PLAIN.items():
        kind = registry.name_of(getattr(recipe, role))[1]
        if kind not in plain:
            return f"the method is more than its objectives: recipe {recipe.name} has the {role} {kind!r}"
    return ""


# Taps


@dataclass(frozen=True)
class Places:
    """Where a network can be tapped.

    Attributes:
        stages: what each stage gives, from the first to the last.
        pooled: the vector that the classifier reads; empty where it is not known.
    """

    stages: tuple[str, ...]
    pooled: str

    def at(self, tap: str) -> str:
        """The tap of this network that stands where ``tap`` stands in the networks it was written for."""
        found = re.fullmatch(r"(stages|blocks|hidden)\.(-?\d+)", tap)
        if found and self.stages:
            depth, number = DEPTHS[found[1]], int(found[2])
            place = number if number >= 0 else depth + number
            return self.stages[min(ceil((place + 1) / depth * len(self.stages)), len(self.stages)) - 1]
        return self.pooled if tap == "pool" and self.pooled else tap


def places(net: Net) -> Places:
    """The places of a built student or teacher."""
    network: nn.Module = net
    while isinstance(network, Frozen | Tapped):
        network = network.network
    children = dict(network.named_children())
    stages: Iterable[str] = [name for name in children if re.fullmatch(r"layer\d+", name)]
    for part in STAGES:
        if not stages and part in children:
            stages = [f"{part}.{name}" for name, _ in children[part].named_children()]
    return Places(tuple(stages), next((name for name in POOLED if name in children), ""))


def fitted(entrant: Entrant, student: Places, teacher: Places) -> Entrant:
    """``entrant`` with its taps where the two networks have them."""
    moved = tuple(_moved(objective, student, teacher) for objective in entrant.objective)
    return replace(entrant, objective=moved)


def _moved(objective: Objective, student: Places, teacher: Places) -> Objective:
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(objective):
        where = {"student": student, "teacher": teacher}.get(f.name.partition("_")[0])
        value = getattr(objective, f.name)
        if where is None:
            continue
        if isinstance(value, str):
            changes[f.name] = where.at(value)
        elif isinstance(value, tuple) and all(isinstance(tap, str) for tap in value):
            changes[f.name] = tuple(where.at(tap) for tap in value)
    try:
        return replace(objective, **changes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
