"""Hostile recipes and overrides: text that a grammar makes, shipped recipes changed, bombs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.faults.hostile import CANARY, WORDS, Case, changed_tree, mutated, mutated_text, odd_value

from limbeck import api, cli, config, plain, registry
from limbeck.errors import LimbeckError

QUICK = (
    "kd",
    "kd-cnn",
    "cdl-kdp",
    "static",
    "dkd",
    "crd",
    "reviewkd",
    "dho",
    "taid",
    "first",
    "l2p",
    "vid",
    "lm-kd",
    "ddk",
    "data-pruning",
    "self-distillation",
    "elastic",
    "autodistil",
    "trg",
    "kd3",
)
"""Recipes whose preflight takes little time; those that are not shipped are left out."""

TAGS = (
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{CANARY}']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/new:os.system [x]",
    "!!python/tuple [1]",
    "!!binary aGk=",
    "!!binary ---",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!timestamp 2001-01-01",
    "!!timestamp x",
    "!!int abc",
    "!!float abc",
    "!!bool abc",
    "!!null abc",
    "!!str 1",
    "!!map [1]",
    "!!seq {a: 1}",
    "!foo bar",
    "!<tag:yaml.org,2002:int> x",
    "!!merge x",
    "!!value x",
    "! x",
)


class Stopped(Exception):
    """A run got past its preflight: all that is tried here."""


def refused_by_cli(*arguments: str) -> None:
    """Run a command of the CLI up to the first step of a training.

    Raises:
        LimbeckError: it was refused as the CLI must: exit code 2 and one line.
    """
    out, err = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code: Any = 0
    with stopped_before_training(), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            code = end.code
        except Stopped:
            pass
    err.flush()
    said = err.buffer.getvalue().decode()
    out.getvalue().encode()
    if code in (0, None):
        return
    lines = said.splitlines()
    assert code == 2, f"exit code {code}: {said}"
    assert lines and lines[-1].startswith("limbeck: "), said
    assert all(line.startswith("warning: ") for line in lines[:-1]), said
    assert all(c.isprintable() for c in lines[-1]), f"control characters: {lines[-1]!r}"
    raise LimbeckError(lines[-1])


@contextmanager
def stopped_before_training() -> Iterator[None]:
    """Where a run would begin, ``Stopped`` is raised."""

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    before = api._carry_out
    api._carry_out = stop  # type: ignore[assignment]
    try:
        yield
    finally:
        api._carry_out = before


def written(folder: Path, text: str | bytes, name: str = "given.yaml") -> str:
    """The path of a file with that content."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return str(path)


def shown(folder: Path, text: str | bytes) -> Case:
    """``limbeck show`` of a recipe file."""
    return Case(f"show {text!r}", lambda: refused_by_cli("show", written(folder, text)))


def started(folder: Path, text: str | bytes, *words: str) -> Case:
    """``limbeck run`` of a recipe file, up to the first step."""
    out = str(folder / "run")
    return Case(
        f"run {text!r} {words}",
        lambda: refused_by_cli("run", written(folder, text), "--out", out, *words),
    )


# Made by a grammar

FIELDS = (
    "teacher",
    "student",
    "objective",
    "selector",
    "scenario",
    "data",
    "views",
    "engine",
    "seed",
    "name",
    "base",
    "description",
    "baselines",
    "predicted",
)
INNER = (
    "name",
    "backbone",
    "prompts",
    "pool",
    "length",
    "weight",
    "temperature",
    "epochs",
    "batch_size",
    "optim",
    "lr",
    "tasks",
    "sizes",
    "threads",
    "cache_root",
    "root",
    "network",
    "target",
    "kwargs",
    "images",
)


def scalars() -> st.SearchStrategy[Any]:
    """Leaves of a tree."""
    named = st.sampled_from([n for kind in registry.WINGS for n in registry.names(kind)])
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        named,
        st.sampled_from(WORDS),
        st.text(max_size=12),
    )


def trees() -> st.SearchStrategy[Any]:
    """Trees that look like a recipe's from afar."""
    inner = st.recursive(
        scalars(),
        lambda child: (
            st.lists(child, max_size=4) | st.dictionaries(st.sampled_from(INNER), child, max_size=4)
        ),
        max_leaves=12,
    )
    return st.dictionaries(st.sampled_from(FIELDS), inner, max_size=9)


def drawn(strategy: st.SearchStrategy[Any], random: Random, count: int) -> list[Any]:
    """``count`` values that hypothesis draws."""
    found: list[Any] = []

    @seed(random.getrandbits(32))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def take(value: Any) -> None:
        found.append(value)

    take()
    return found[:count]


def grammar(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Trees as YAML, or as JSON, which YAML reads too."""
    for place, tree in enumerate(drawn(trees(), random, count)):
        text = json.dumps(tree) if place % 3 == 0 else yaml.dump(tree, allow_unicode=place % 2 == 0)
        yield shown(folder, text) if place % 2 else started(folder, text)


# Shipped recipes changed


def shipped() -> list[str]:
    """Recipes whose preflight is quick."""
    return [name for name in QUICK if name in registry.names("recipes")]


def spares() -> list[Any]:
    """Names that stand in the wrong place."""
    return [name for kind in registry.WINGS for name in registry.names(kind)]


def changed_fields(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Whole recipes with a few fields of other types, values and names."""
    whole = [config.to_plain(config.load(name)) for name in shipped()]
    for _ in range(count):
        tree = changed_tree(random, random.choice(whole), spares())
        if tiny(tree):
            yield started(folder, yaml.dump(tree, allow_unicode=True))


def tiny(tree: Any) -> bool:
    """Whether what is asked for is no honest, but huge, piece of work."""
    return not any(isinstance(v, int) and 10**5 < v < 2**31 for v in leaves(tree))


def leaves(tree: Any) -> Iterator[Any]:
    """The scalars of a tree."""
    if isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(part)
    else:
        yield tree


def changed_text(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Recipe files with letters, lines or bytes changed."""
    texts = [registry.recipe(name).read_text(encoding="utf-8") for name in shipped()]
    texts += [plain.write(config.to_plain(config.load(name))) for name in shipped()]
    for _ in range(count):
        text: str | bytes = mutated_text(random, random.choice(texts))
        if random.random() < 0.3:
            text = mutated(random, str(text).encode("utf-8", "surrogatepass"))
        yield started(folder, text)


def bombs(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Anchors that double, circles, depth, length, tags."""
    for _ in range(count):
        key = random.choice((*FIELDS, "student.name", "zzz"))
        depth = random.choice((20, 60, 200, 1000, 20_000))
        many = random.choice((9, 30))
        text = random.choice(
            (
                "\n".join(
                    ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, many)]
                )
                + f"\n{key}: *a{many - 1}\n",
                "x: &x {"
                + ", ".join(
                    f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]" if i else "k0: &k0 [1]" for i in range(many)
                )
                + "}\n",
                f"{key}: &a [*a]\n",
                f"{key}: &a {{name: *a}}\n",
                f"&a {key}: *a\n",
                f"{key}: &a {{? *a : 1}}\n",
                f"{key}: " + "[" * depth + "]" * depth,
                f"{key}: " + "{a: " * depth + "1" + "}" * depth,
                f"{key}: " + "[" * depth,
                "- " * depth + "x",
                "".join(" " * i + "a:\n" for i in range(depth % 999)),
                f"{key}: {'9' * depth}\n",
                f"{key}: {'x' * depth * 20}\n",
                f"{'k' * depth}: 1\n",
                f"{key}: {random.choice(TAGS)}\n",
                random.choice(TAGS),
                f"{key}: [{random.choice(TAGS)}]\n",
                f"? {random.choice(TAGS)}\n: 1\n",
                "---\na: 1\n---\nb: 2\n",
                "%YAML 9.9\n---\na: 1",
                "\ufeffname: x",
                f"base: {random.choice(WORDS)}\n",
                "base: given.yaml\n",
                "base: /dev/null.yaml\n",
                "",
                "\x00",
                "~",
                f"? [1, 2]\n: {key}\n",
                f"? {{a: b}}\n: {key}\n",
                f"1: {key}\n",
                "\n".join(f"k{i}: {i}" for i in range(depth)),
            )
        )
        yield shown(folder, text) if random.random() < 0.5 else started(folder, text)


def overrides(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """``--set`` with paths and values that do not fit, and odd seeds."""
    values = (
        *WORDS,
        *TAGS,
        "{a: &a [*a]}",
        "[" * 3000,
        "&a [*a]",
        "{name: kd}",
        "[labels, kd]",
        "{",
        "1: 2: 3",
    )
    for _ in range(count):
        name = random.choice(shipped())
        paths = [".".join(map(str, path)) for path in paths_of(name)]
        sets: list[str] = []
        for _ in range(random.choice((1, 1, 1, 2))):
            path = (
                random.choice(paths) if random.random() < 0.8 else random.choice((*WORDS, "a..b", ".a", "a."))
            )
            value = random.choice(values) if random.random() < 0.6 else json.dumps(odd_value(random))
            glue = "=" if random.random() < 0.95 else random.choice((" ", "", ":", "=="))
            sets += ["--set", f"{path}{glue}{value}"]
        if random.random() < 0.1:
            sets += ["--seed", random.choice(("-1", "x", "9" * 30, "1e3", "", "0"))]
        if tiny(sets):
            out = str(folder / "run")
            yield Case(
                f"run {name} {sets}",
                lambda name=name, sets=sets, out=out: refused_by_cli("run", name, "--out", out, *sets),
            )


def paths_of(name: str) -> list[tuple[Any, ...]]:
    """The paths of a recipe's fields."""
    from tests.faults.hostile import places

    if name not in _paths:
        _paths[name] = places(config.to_plain(config.load(name)))[1:]
    return _paths[name]


_paths: dict[str, list[tuple[Any, ...]]] = {}


def processes(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Recipe files and odd words given to the program itself; each takes seconds, so there are few."""
    texts = [registry.recipe(name).read_text(encoding="utf-8") for name in shipped()]
    for _ in range(-(-count // 8)):
        text, words = mutated_text(random, random.choice(texts)), ["--json"]
        if random.random() < 0.3:
            words.append(random.choice(WORDS))
        if not any("\0" in word or "\ud800" in word for word in words):  # no process can be given these
            yield Case(
                f"limbeck show {text!r} {words}",
                lambda text=text, words=words: refused_by_program("show", written(folder, text), *words),
            )


def refused_by_program(*arguments: str) -> None:
    """Run the program as a user does.

    Raises:
        LimbeckError: it was refused as it must: exit code 2 and one line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *arguments],
        capture_output=True, text=True, errors="backslashreplace", check=False, timeout=60,
    )  # fmt: skip
    if done.returncode == 0:
        return
    lines = done.stderr.splitlines()
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
    assert lines and lines[-1].startswith("limbeck: "), done.stderr
    assert all(line.startswith("warning: ") for line in lines[:-1]), done.stderr
    raise LimbeckError(lines[-1])


KINDS = {
    "recipes from a grammar": (12, grammar),
    "recipes with changed fields": (6, changed_fields),
    "recipes with changed text": (8, changed_text),
    "recipe bombs and tags": (4, bombs),
    "overrides": (10, overrides),
    "commands as processes": (1, processes),
}
