"""One lazy table from (kind, name) to the class of a choice, and from a name to a recipe's file.

A choice is found by its file: ``objectives/dkd.py`` defines one public dataclass that inherits from
``Objective``, and is named ``dkd``. Files are read as text until a choice is asked for, so that listing
and describing need no import of torch. Hyphens and underscores mean the same in every name.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from limbeck.errors import ConfigError, unknown

PACKAGE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Wing:
    """Where the choices of one kind live, and the class that they inherit from."""

    folder: str
    base: str
    noun: str


WINGS = {
    "teachers": Wing("teachers", "Teacher", "teacher"),
    "students": Wing("students", "Student", "student"),
    "objectives": Wing("objectives", "Objective", "objective"),
    "selectors": Wing("selectors", "Selector", "selector"),
    "scenarios": Wing("scenarios", "Scenario", "scenario"),
    "prompts": Wing("nets/prompts", "PromptLearner", "prompt learner"),
    "data": Wing("data", "Dataset", "data set"),
}


def kinds() -> tuple[str, ...]:
    """Every kind that has names: the wings, and ``recipes``."""
    return (*WINGS, "recipes")


def names(kind: str) -> tuple[str, ...]:
    """The names of one kind, sorted.

    Raises:
        ConfigError: there is no such kind.
    """
    return tuple(sorted(_recipes() if kind == "recipes" else _choices(_kind(kind))))


def get(kind: str, name: str) -> type[Any]:
    """The class of a choice; its module is imported now.

    Raises:
        ConfigError: no such kind or name.
    """
    kind, name = _kind(kind), canonical(kind, name)
    module = ".".join(("limbeck", *WINGS[kind].folder.split("/"), name))
    found: type[Any] = getattr(import_module(module), _choices(kind)[name].name)
    return found


def recipe(name: str) -> Path:
    """The file of a recipe that the package ships.

    Raises:
        ConfigError: there is no such recipe.
    """
    return _recipes()[canonical("recipes", name)]


def describe(kind: str, name: str) -> str:
    """One line on a choice or a recipe, read without importing it; empty where it says nothing."""
    if kind == "recipes":
        return _description(recipe(name))
    doc = ast.get_docstring(_choices(_kind(kind))[canonical(kind, name)])
    return doc.strip().splitlines()[0] if doc else ""


def canonical(kind: str, name: str, *, where: str = "") -> str:
    """``name`` as its file spells it.

    Args:
        where: the place the name was written at, for the message.

    Raises:
        ConfigError: no such kind or name; the message holds the nearest one.
    """
    known = {_plain(n): n for n in names(kind)}
    if _plain(name) not in known:
        noun = "recipe" if kind == "recipes" else WINGS[kind].noun
        raise unknown(noun, name, known.values(), where=where)
    return known[_plain(name)]


def name_of(choice: object) -> tuple[str, str]:
    """The (kind, name) under which the class of ``choice`` is found.

    Raises:
        ConfigError: it is not in the table.
    """
    cls = choice if isinstance(choice, type) else type(choice)
    folder, _, name = cls.__module__.removeprefix("limbeck.").replace(".", "/").rpartition("/")
    for kind, wing in WINGS.items():
        if wing.folder == folder and name in _choices(kind) and _choices(kind)[name].name == cls.__name__:
            return kind, name
    raise ConfigError(
        f"{cls.__module__}.{cls.__qualname__} is no named choice: {', '.join(WINGS)} hold those"
    )


def kind_of(base: type) -> str | None:
    """The kind whose choices inherit from ``base`` itself, or None."""
    if not base.__module__.startswith("limbeck."):
        return None
    return next((kind for kind, wing in WINGS.items() if wing.base == base.__name__), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _kind(kind: str) -> str:
    if kind not in WINGS:
        raise unknown("kind", kind, kinds())
    return kind


@functools.cache
def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in (PACKAGE / "recipes").glob("*.yaml")}


@functools.cache
def _choices(kind: str) -> dict[str, ast.ClassDef]:
    """The class of each choice of a kind, by file name."""
    wing = WINGS[kind]
    paths = [p for p in (PACKAGE / wing.folder).glob("*.py") if not p.stem.startswith("_")]
    classes = {path.stem: list(_public_classes(path)) for path in paths}
    heirs = _heirs([c for found in classes.values() for c in found], wing.base)
    return {
        stem: _one(stem, own)
        for stem, found in classes.items()
        if (own := [c for c in found if c.name in heirs])
    }


def _public_classes(path: Path) -> Iterator[ast.ClassDef]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node


def _heirs(classes: list[ast.ClassDef], base: str) -> set[str]:
    """Names of the classes that inherit from ``base``, also through one another."""
    parents = {
        c.name: {b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in c.bases}
        for c in classes
    }
    heirs: set[str] = set()
    while new := {name for name, above in parents.items() if above & (heirs | {base})} - heirs:
        heirs |= new
    return heirs


def _one(stem: str, found: list[ast.ClassDef]) -> ast.ClassDef:
    """The only choice of a file; where it holds several, the one named like the file."""
    named = [c for c in found if c.name.lower() == stem.replace("_", "")]
    if len(found) > 1 and len(named) != 1:
        raise ConfigError(
            f"{stem}.py defines {', '.join(c.name for c in found)}: a file holds one choice; move the others"
        )
    return (named or found)[0]


def _description(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("description:"):
            return line.removeprefix("description:").strip().strip("'\"")
    return ""
