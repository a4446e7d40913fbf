"""Recipes as plain data: YAML read, inherited from a base, overridden. Fields are not checked here.

Scalars are those of YAML 1.2: ``1e-3`` is a number, ``no`` is a word, ``true`` and ``false`` are the only
truth values; a repeated key is an error. Tags, aliases, whole numbers of more than 64 bits and lists within
lists without end are refused: a recipe may come from a stranger.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck import registry
from limbeck.errors import ConfigError

Plain = dict[str, Any]

SLOTS = {
    "teacher": "teachers",
    "student": "students",
    "objective": "objectives",
    "selector": "selectors",
    "scenario": "scenarios",
    "data": "data",
    "prompts": "prompts",
    "network": "students",
    "oracle": "students",
}
"""The keys that hold a choice, by its kind. A changed ``name`` there drops the fields of the other."""

WORDS = ("name", "description", "baselines", "predicted")
"""What is said about a recipe and asks for nothing; a base's words are not those of what is based on it."""


DEEPEST = 50
"""So many lists and maps may stand within one another."""
WHOLE = range(-(2**63), 2**63)
LONGEST = 20
"""Characters of the longest of them."""


LONGEST_NAME = 150


class Loader(yaml.SafeLoader):
    """Reads scalars, lists and maps alone; refuses repeated keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def get_event(self) -> Any:
        """The next piece of the text, refused before anything is made of it."""
        event = super().get_event()  # type: ignore[no-untyped-call]
        self._depth += isinstance(event, yaml.CollectionStartEvent)
        self._depth -= isinstance(event, yaml.CollectionEndEvent)
        if self._depth > DEEPEST:
            raise _wrong(f"more than {DEEPEST} lists and maps within one another", event)
        if isinstance(event, yaml.AliasEvent):
            raise _wrong(f"alias *{event.anchor}: write the value out", event)
        if getattr(event, "tag", None):
            raise _wrong(f"tag {event.tag}: write a plain value, text in quotes", event)
        return event

    def construct_scalar(self, node: Any) -> Any:
        """The text of a scalar."""
        text = super().construct_scalar(node)
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _wrong("half of a pair of code units, which is no letter", node)
        return text

    def construct_yaml_int(self, node: Any) -> int:
        """A whole number of 64 bits."""
        text = self.construct_scalar(node)
        if len(text) > LONGEST or int(text) not in WHOLE:
            raise _wrong(f"{text[:LONGEST]} has more than 64 bits", node)
        return int(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The map of ``node``, each key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        odd = [key for key in keys if not isinstance(key, str)]
        if odd:
            raise _wrong(f"key {odd[0]!r} is no word: put it in quotes", node)
        if len(set(keys)) < len(keys):
            raise _wrong(f"repeated key {Counter(keys).most_common(1)[0][0]!r}", node)
        return super().construct_mapping(node, deep)


def _wrong(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.yaml_implicit_resolvers = {}  # else those of YAML 1.1 stay
NUMBER = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", NUMBER, list("-+.0123456789")),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that ``Loader`` would not read as strings."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        """``Loader`` reads none."""
        return True


def write(plain: Mapping[str, Any], width: int = 100) -> str:
    """YAML text that ``parse`` reads back equal, in lines of about ``width`` characters."""
    text: str = yaml.dump(
        dict(plain), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=None
    )
    return text


def parse(text: str, where: str) -> Any:
    """The value that YAML ``text`` holds.

    Raises:
        ConfigError: it is no YAML; the message names ``where`` and the line.
    """
    try:
        return Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line} is no valid YAML: {problem}") from error


def from_json(text: str) -> Any:
    """The value that JSON ``text`` holds.

    Raises:
        ValueError: it is no JSON, or nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists and maps within one another without end") from None


def mapping(value: Any, where: str) -> Plain:
    """``value`` as a map from field names.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} is {value!r} but must be a map of field names to values")
    return dict(value)


def check_file_name(value: str, what: str) -> None:
    """Raise unless ``value`` may be part of a file's name: it leads nowhere else.

    Raises:
        ConfigError: it is empty or longer than 150 bytes, begins with a dot or a hyphen, or has a slash or
            a control character in it.
    """
    odd = not value.isprintable() or any(letter in "/\\:" for letter in value)
    if odd or not 0 < len(value.encode()) <= LONGEST_NAME or value[0] in ".-":
        raise ConfigError(
            f"{what} is {value!r}, which cannot be part of a file's name: use letters, digits, hyphens and "
            f"dots, at most {LONGEST_NAME}, first a letter or a digit"
        )


def read(source: str | Path) -> Plain:
    """The mapping of a recipe, laid on all that it is based on.

    Args:
        source: a name that ``limbeck list recipes`` shows, or the path of a ``.yaml`` file.

    Raises:
        ConfigError: no such recipe or file, no valid YAML, or a circle of bases.
    """
    return _read(_locate(str(source), Path()), ())


def _locate(source: str, beside: Path) -> Path:
    if not source.endswith((".yaml", ".yml")):
        return registry.recipe(source)
    path = beside / source
    if not os.path.isfile(path):
        raise ConfigError(f"there is no file {path}: give a .yaml file or a name of `limbeck list recipes`")
    return path


def _read(path: Path, seen: tuple[Path, ...]) -> Plain:
    if path.resolve() in seen:
        circle = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"recipe {path.name} is based on itself ({circle}): remove one base")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    own = mapping(parse(text, str(path)), str(path))
    base = own.pop("base", None)
    own.setdefault("name", path.stem)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ConfigError(f"base of {path.name} is {base!r}: allowed is one recipe's name or .yaml file")
    under = _read(_locate(base, path.parent), (*seen, path.resolve()))
    return _lay_map({key: value for key, value in under.items() if key not in WORDS}, own)


def merge(under: Any, over: Any, slot: str = "") -> Any:
    """``over`` laid on ``under``: maps merge key by key, all else is replaced.

    In a slot (a key of ``SLOTS``) a bare word is a name, and a changed ``name`` replaces the whole choice:
    the fields of one are not those of another.
    """
    if slot in SLOTS:
        under, over = ({"name": v} if isinstance(v, str) else v for v in (under, over))
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    if slot in SLOTS and "name" in over and _spelled(over["name"]) != _spelled(under.get("name")):
        return dict(over)
    return _lay_map(under, over)


def _lay_map(under: Mapping[str, Any], over: Mapping[str, Any]) -> Plain:
    both = {key: merge(under[key], over[key], key) for key in over if key in under}
    return {**under, **over, **both}


def override(plain: Mapping[str, Any], item: str) -> Plain:
    """``plain`` with one ``path.to.field=value`` laid on it.

    Values are YAML. An entry of a list goes by its number or its ``name``: ``objective.1.weight=2``,
    ``objective.kd.weight=2``.

    Raises:
        ConfigError: no ``=``, no such entry of a list, or a value that is no YAML.
    """
    path, equals, text = item.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {item!r} must be written path.to.field=value, for example seed=1")
    changed: Plain = _lay_path(dict(plain), keys, parse(text, f"--set {path}"), path)
    return changed


def _lay_path(under: Any, keys: Sequence[str], value: Any, path: str, slot: str = "") -> Any:
    """``value`` laid on what ``keys`` lead to within ``under``, itself the content of key ``slot``."""
    if keys and isinstance(under, list):
        at = _entry(under, keys[0], path)
        return [_lay_path(u, keys[1:], value, path, slot) if i == at else u for i, u in enumerate(under)]
    if len(keys) > 1 and isinstance(under, Mapping) and keys[0] in under:
        return {**under, keys[0]: _lay_path(under[keys[0]], keys[1:], value, path, keys[0])}
    return merge(under, functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value), slot)


def _entry(entries: Sequence[Any], key: str, path: str) -> int:
    """The place of the list entry that ``key`` names by number or by its ``name``."""
    called = [_spelled(e.get("name") if isinstance(e, Mapping) else e) for e in entries]
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    if called.count(_spelled(key)) == 1:
        return called.index(_spelled(key))
    allowed = f"0 to {len(entries) - 1} or one of {', '.join(called)}"
    raise ConfigError(f"--set {path}: {key!r} is no entry of the list: choose {allowed}")


def _spelled(name: object) -> str:
    return str(name).lower().replace("-", "_")
