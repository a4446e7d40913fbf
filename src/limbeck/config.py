"""A recipe as typed choices: every field checked before a network is built or data touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from limbeck import plain, registry
from limbeck.contracts import Objective, Scenario, Selector, Student, Teacher
from limbeck.errors import ConfigError, LimbeckError, nearest, unknown
from limbeck.plain import SLOTS, Plain, mapping

T = TypeVar("T")

SECTIONS = {"views": "limbeck.data.views:Views", "engine": "limbeck.engine.settings:Engine"}
"""The sections that are no choice. By name, as the registry does it: the ground imports nothing above."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: the five choices, the data, and how the machine carries it out.

    Attributes:
        name: what the run is called; a recipe's file name where the file does not say.
        description: one line on what it is.
        teacher: who teaches.
        student: who learns.
        objective: what is matched; the terms of all add up.
        selector: what counts.
        scenario: how data and time arrive.
        data: the data set, a ``limbeck.data.images.Dataset``.
        views: how images are augmented, a ``limbeck.data.views.Views``.
        engine: settings of the machine, a ``limbeck.engine.settings.Engine``.
        seed: the root of all randomness.
        baselines: recipes that ``demonstrate`` sets it against.
        predicted: what its paper leads one to expect, as ``figure > baseline`` or ``figure > figure`` or
            with ``<``; figures are dotted paths of ``result.json``; ``demonstrate`` says whether it was seen.
    """

    name: str
    description: str = ""
    teacher: Teacher
    student: Student
    objective: tuple[Objective, ...]
    selector: Selector
    scenario: Scenario
    data: Any
    views: Any
    engine: Any
    seed: int = 0
    baselines: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        plain.check_file_name(self.name, "name")
        if self.seed not in range(2**63):
            raise ConfigError(f"seed is {self.seed}: allowed are whole numbers from 0 to 2**63 - 1")


def load(source: str | Path, sets: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """The recipe of that name, or in that file, with overrides.

    Args:
        source: a name that ``limbeck list recipes`` shows, or the path of a ``.yaml`` file.
        sets: overrides ``path.to.field=value`` (``limbeck.plain.override``).
        seed: replaces the recipe's own.

    Raises:
        ConfigError: an unknown name or field, a wrong type or value; the message is one line.
    """
    given = plain.read(source)
    for item in sets:
        given = plain.override(given, item)
    return build(given if seed is None else {**given, "seed": seed})


def build(given: Mapping[str, Any]) -> Recipe:
    """Check a plain mapping and make the ``Recipe`` of it.

    Raises:
        ConfigError: as in ``load``.
    """
    given = {"teacher": "none", "selector": "all", "views": {}, "engine": {}} | dict(given)
    _refuse_unknown(given, {f.name for f in dataclasses.fields(Recipe)}, "")
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is MISSING]
    if missing := next((key for key in required if key not in given), None):
        raise ConfigError(f"the recipe lacks {missing!r}: add it{_choices_of(missing)}")
    hints = get_type_hints(Recipe)
    return Recipe(**{key: _part(key, value, hints[key]) for key, value in given.items()})


def _part(key: str, value: Any, hint: Any) -> Any:
    if key in SECTIONS:
        return make(section(key), mapping(value, key), key)
    if key == "objective":
        return tuple(_choose(entry, "objectives", where) for entry, where in _objectives(value))
    return _choose(value, SLOTS[key], key) if key in SLOTS else _check(value, hint, key)


def objectives(given: Sequence[Any]) -> tuple[Objective, ...]:
    """Objectives by name, as maps of their fields, or as they are.

    Raises:
        ConfigError: as in ``load``.
    """
    return tuple(
        entry if isinstance(entry, Objective) else _choose(entry, "objectives", f"objective.{place}")
        for place, entry in enumerate(given)
    )


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in; ``load`` of it gives an equal recipe.

    Raises:
        ConfigError: a field holds an object that YAML cannot hold, such as a module built in Python.
    """
    return plain.write(to_plain(recipe))


def to_plain(recipe: Recipe) -> Plain:
    """The recipe as maps, lists and scalars, with every default filled in.

    Raises:
        ConfigError: as in ``dump``.
    """
    return {f.name: plain_value(getattr(recipe, f.name), f.name) for f in dataclasses.fields(recipe)}


def fingerprint(recipe: Recipe) -> str:
    """A hash (64 hex digits) of all that a recipe asks for; words about it do not count."""
    asked = {k: v for k, v in to_plain(recipe).items() if k not in plain.WORDS}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def make(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass ``cls`` from plain values, checked field by field.

    Args:
        where: the path of ``given`` in the recipe, for messages.

    Raises:
        ConfigError: an unknown or missing field, or a value that its type or ``__post_init__`` refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    _refuse_unknown(given, fields, where)
    required = [n for n, f in fields.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := next((n for n in required if n not in given), None):
        raise ConfigError(f"{where}.{missing} is missing: it has no default{_choices_of(missing)}")
    hints = get_type_hints(cls)
    values = {key: _field(value, hints[key], f"{where}.{key}", key) for key, value in given.items()}
    try:
        return cls(**values)
    except (LimbeckError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _field(value: Any, hint: Any, where: str, key: str) -> Any:
    """One field's value: a nested choice, a nested dataclass, several of them, or a checked scalar."""
    for member in _members(hint):
        if get_origin(member) is tuple and isinstance(value, list) and _nests(get_args(member)[0], key):
            return tuple(_field(v, get_args(member)[0], f"{where}.{i}", key) for i, v in enumerate(value))
        kind = _kind(member, key)
        if kind is not None and (
            isinstance(value, str | Mapping) or (member is Any and (value is not None or hint is Any))
        ):
            return _choose(value, kind, where)
        if _is_plain_dataclass(member) and isinstance(value, Mapping):
            return make(member, value, where)
    return _check(value, hint, where)


def _members(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(m for arg in get_args(hint) for m in _members(arg))
    return (hint,)


def _kind(hint: Any, key: str) -> str | None:
    """The kind of choice that a field of this type holds, or None."""
    if hint is Any:
        return SLOTS.get(key)
    return registry.kind_of(hint) if isinstance(hint, type) else None


def _is_plain_dataclass(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _nests(hint: Any, key: str) -> bool:
    return any(_kind(m, key) is not None or _is_plain_dataclass(m) for m in _members(hint))


def _choose(value: Any, kind: str, where: str) -> Any:
    """The choice that ``{name: ..., field: ...}`` or a bare name stands for."""
    given = {"name": value} if isinstance(value, str) else mapping(value, where)
    if not isinstance(given.get("name"), str):
        raise ConfigError(f"{where} says no name: add one of {', '.join(registry.names(kind))}")
    name = registry.canonical(kind, given["name"], where=where)
    return make(registry.get(kind, name), {k: v for k, v in given.items() if k != "name"}, where)


def _objectives(value: Any) -> list[tuple[Any, str]]:
    if not isinstance(value, list):
        return [(value, "objective")]
    if not value:
        raise ConfigError("objective is an empty list: name at least one objective")
    return [(entry, f"objective.{i}") for i, entry in enumerate(value)]


def _check(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint`` reads it, by pydantic's strict rules for JSON (a list may be a tuple)."""
    try:
        return _adapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where} is {value!r} but {_allowed(error, value)}") from error


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except PydanticUserError:  # a dataclass brings its own configuration
        return TypeAdapter(hint)


def _allowed(error: ValidationError, value: Any) -> str:
    """What pydantic would have taken, as one line."""
    problems = error.errors(include_url=False)
    words: list[str] = []
    for problem in problems:
        place = "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
        text = problem["msg"].replace("Input should be ", "must be ") + (f" at {place}" if place else "")
        words.extend([text] if text not in words else [])
    expected = [str(p["ctx"]["expected"]) for p in problems if "expected" in p.get("ctx", {})]
    options = [w for text in expected for w in re.findall(r"'([^']*)'", text)]
    close = nearest(value, options) if isinstance(value, str) else ""
    return " or ".join(words) + (f": did you mean {close!r}?" if close else "")


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    allowed = set(known)
    for key in given:
        if key not in allowed:
            raise unknown("field", key, allowed, where=where)


def _choices_of(key: str) -> str:
    return f", choose from {', '.join(registry.names(SLOTS[key]))}" if key in SLOTS else ""


def section(key: str) -> type[Any]:
    """The class of a section that is no choice: a key of ``SECTIONS``."""
    module, _, name = SECTIONS[key].partition(":")
    found: type[Any] = getattr(import_module(module), name)
    return found


def nested(cls: type[Any]) -> dict[str, type[Any]]:
    """The dataclasses that fields of ``cls`` hold and that are no choices, by field name."""
    held = {
        key: [m for m in _members(hint) if _is_plain_dataclass(m)]
        for key, hint in get_type_hints(cls).items()
    }
    own = {f.name for f in dataclasses.fields(cls)}
    return {key: found[0] for key, found in held.items() if key in own and found and not _kind(found[0], key)}


def plain_value(value: Any, where: str) -> Any:
    """A choice, section or value of a recipe as maps, lists and scalars; ``where`` names it in errors."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = (
            {"name": registry.name_of(value)[1]} if any(map(registry.kind_of, type(value).__mro__)) else {}
        )
        own = {
            f.name: plain_value(getattr(value, f.name), f"{where}.{f.name}")
            for f in dataclasses.fields(value)
            if f.init
        }
        return {**named, **own}
    if isinstance(value, Mapping):
        return {str(k): plain_value(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(v, f"{where}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which a recipe cannot hold: give its name instead"
    )
