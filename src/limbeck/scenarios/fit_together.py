"""Preflight: whether data, teacher and student fit, asked before any weight is read."""

from __future__ import annotations

from typing import Any

from limbeck.contracts import Network
from limbeck.engine.distillation import combine
from limbeck.errors import ConfigError, ShapeError


def has_teacher(recipe: Any) -> bool:
    """Whether the recipe names a teacher."""
    return type(recipe.teacher).__name__ != "NoTeacher"


def named(recipe: Any) -> dict[str, Any]:
    """The recipe's objectives by name; a second one of a kind gets a number."""
    found: dict[str, Any] = {}
    for objective in recipe.objective:
        name = type(objective).__module__.rpartition(".")[2]
        again = sum(key.rstrip("0123456789") == name for key in found)
        found[f"{name}{again + 1}" if again else name] = objective
    return found


def load_data(recipe: Any) -> Any:
    """The splits of the recipe's images, as its seed draws them.

    Raises:
        ConfigError: data of texts, or a network that reads them.
    """
    for part in ("data", "student", "teacher"):
        choice = getattr(recipe, part)
        if hasattr(choice, "reading") or (isinstance(choice, Network) and choice.reads_text()):
            raise ConfigError(
                f"{part} is {type(choice).__name__}, of texts, but scenario {type(recipe.scenario).__name__} "
                "takes images: take scenario language, or images and networks that read them"
            )
    return recipe.data.seeded(recipe.seed).load()


def inputs(recipe: Any) -> Any:
    """The input format of the student: what all images are brought to."""
    return recipe.student.input_spec()


def check_networks(recipe: Any, *, classes: int) -> None:
    """Raise if the networks cannot see the same images, or an objective lacks its teacher."""
    check_objectives(recipe)
    for name, objective in named(recipe).items():
        if objective.texts:
            raise ConfigError(f"objective {name} matches language models: take scenario language, or kd")
    if recipe.selector.asks:
        raise ConfigError(
            f"selector is {type(recipe.selector).__name__}, which compares language models: take scenario "
            "language, or another selector"
        )
    check_classes(classes)
    if not has_teacher(recipe):
        return
    form, other = inputs(recipe), recipe.teacher.input_spec()
    if (form.channels, form.size) != (other.channels, other.size):
        raise ShapeError(
            f"the teacher reads {other.channels} x {other.size} px images and the student "
            f"{form.channels} x {form.size} px: choose networks of one input size"
        )


def check_classes(classes: int) -> None:
    """Raise unless there is something to tell apart."""
    if classes < 2:
        raise ConfigError(f"the data has {classes} class: a classifier needs at least 2")


def check_objectives(recipe: Any) -> None:
    """Raise if an objective or the student lacks its teacher, or a teacher has no objective that listens."""
    needs = combine(named(recipe))
    if not has_teacher(recipe):
        if getattr(recipe.student, "needs_teacher", False):
            raise ConfigError(
                f"the student is {type(recipe.student).__name__}, which is made of its teacher's weights, "
                "but teacher is none: name one"
            )
        wants = [name for name, o in named(recipe).items() if o.needs().teacher_logits or o.needs().teacher]
        if wants:
            raise ConfigError(
                f"objective {wants[0]!r} needs a teacher but teacher is none: name a teacher, or leave it out"
            )
        return
    if not needs.teacher_logits and not needs.teacher:
        raise ConfigError(
            f"teacher is {type(recipe.teacher).__name__} but no objective listens to it: add one such as kd, "
            "or set teacher to none"
        )
