"""What there is to choose from: the lists and the single entries that the command line shows."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from limbeck import plain, registry
from limbeck.errors import unknown

Listing = dict[str, dict[str, str]]
SECTION = "section"
SECTIONS = ("views", "engine")
NARROW = 72  # characters of a line of YAML, which may end a word later, where a terminal has 80


def listing(kind: str | None = None) -> Listing:
    """Each kind's names with one line on each, read without importing a choice.

    Raises:
        ConfigError: there is no such kind.
    """
    kinds = registry.kinds() if kind is None else (kind,)
    return {k: {name: registry.describe(k, name) for name in registry.names(k)} for k in kinds}


def listing_text(listed: Listing) -> RenderableType:
    """``listed`` as tables."""
    tables: list[RenderableType] = []
    for kind, lines in listed.items():
        table = Table(title=kind, title_justify="left", box=None, show_header=False, pad_edge=False)
        for name, line in lines.items():
            table.add_row(name, line)
        tables += [table, ""]
    return Group(*tables[:-1])


def entries(name: str) -> list[dict[str, Any]]:
    """Every recipe, choice and section of that name.

    Args:
        name: ``dkd``, ``students/prompted_vit`` for one kind, the section ``views`` or ``engine``, or the
            path of a recipe's ``.yaml`` file.

    Raises:
        ConfigError: nothing has that name.
    """
    if name.endswith(".yaml"):
        return [_entry("recipes", name)]
    kind, slash, own = name.rpartition("/")
    if slash:
        return [_entry(kind, registry.canonical(kind, own))]
    every = {(k, n) for k in registry.kinds() for n in registry.names(k)} | {(SECTION, s) for s in SECTIONS}
    found = sorted((k, n) for k, n in every if n.replace("-", "_") == name.lower().replace("-", "_"))
    if not found:
        raise unknown("recipe or choice", name, {n for _, n in every})
    return [_entry(k, n) for k, n in found]


def _entry(kind: str, name: str) -> dict[str, Any]:
    from limbeck import config

    if kind == "recipes":
        recipe = config.load(name)
        whole = config.to_plain(recipe)
        return {"kind": kind, "name": recipe.name, "doc": recipe.description, "recipe": whole}
    return _described(kind, name, config.section(name) if kind == SECTION else registry.get(kind, name))


def _described(kind: str, name: str, cls: type[Any]) -> dict[str, Any]:
    """A dataclass for reading, with those that its fields hold."""
    from limbeck import config

    fields = [
        {"name": f.name, "type": _spell_type(f.type), "default": _spell_default(f)}
        for f in dataclasses.fields(cls)
    ]
    inner = [_described("fields", key, held) for key, held in config.nested(cls).items()]
    entry = {"kind": kind, "name": name, "doc": inspect.getdoc(cls) or "", "fields": fields}
    return entry | ({"inner": inner} if inner else {})


def entries_text(found: list[dict[str, Any]]) -> RenderableType:
    """``found`` for reading: what it is, then its fields or its whole YAML."""
    parts: list[RenderableType] = []
    flat = [e for entry in found for e in (entry, *entry.get("inner", ()))]
    for entry in flat:
        parts.append(Text(f"{entry['name']} ({entry['kind']})", style="bold"))
        parts += [Text(entry["doc"]), ""]
        if "recipe" in entry:
            text = plain.write(entry["recipe"], width=NARROW)
            parts += [Syntax(text.rstrip(), "yaml", background_color="default", word_wrap=True), ""]
        elif entry["fields"]:
            table = Table("field", "type", "default", box=None, pad_edge=False)
            for field in entry["fields"]:
                table.add_row(field["name"], field["type"], field["default"])
            parts += [table, ""]
    return Group(*parts[:-1])


def _spell_type(hint: Any) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def _spell_default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"
