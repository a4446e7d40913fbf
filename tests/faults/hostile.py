"""What hostile files are made of: cases, canaries, mutations of bytes, texts and trees."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

CANARY = Path(tempfile.gettempdir()) / "limbeck-canary"
"""A file that only code brought along by a hostile file would touch."""


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        said: what is given, for a reader who looks for the fault.
        run: gives it to limbeck.
    """

    said: str
    run: Callable[[], object]


class Evil:
    """Touches the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (CANARY,)


def pickled() -> bytes:
    """A pickle that touches the canary."""
    buffer = io.BytesIO()
    pickle.dump(Evil(), buffer)
    return buffer.getvalue()


EVIL_CODE = f"from pathlib import Path\nPath({str(CANARY)!r}).touch()\n"
"""Python that touches the canary."""

WORDS = (
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "../../x",
    "/etc/passwd",
    "none",
    "null",
    "true",
    "nan",
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "0",
    "-1",
    "1e-999",
    "0x10",
    "1_000",
    "9" * 40,
    "9" * 5000,
    "é",
    "\u202egnp",
    "\u0000",
    "\x1b[31mred\x1b[0m",
    "\ud800",
    "\U0001f600" * 3,
    "a" * 5000,
    "a\nb",
    "a\r\nb",
    "\t",
    "{{7*7}}",
    "${HOME}",
    "<script>alert(1)</script>",
    "]]>",
    "%s%n",
    "name",
    "kd",
    "digits",
    "*a",
    "&a",
    "<<",
    "!!python/none",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    -7,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    0.0,
    -0.0,
    0.5,
    1e-300,
    1e300,
    1.7e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)


def odd_value(random: Random, depth: int = 0) -> Any:
    """A scalar, or a list or map of a few, that hardly any field takes."""
    pick = random.random()
    if depth < 3 and pick < 0.12:
        return [odd_value(random, depth + 1) for _ in range(random.randrange(4))]
    if depth < 3 and pick < 0.24:
        return {str(odd_key(random)): odd_value(random, depth + 1) for _ in range(random.randrange(4))}
    if pick < 0.55:
        return random.choice(NUMBERS)
    if pick < 0.65:
        return random.choice((None, True, False))
    return random.choice(WORDS)


def odd_key(random: Random) -> Any:
    """What stands for a field's name."""
    return random.choice((*WORDS, "name", "target", "model", "path", "root", "lr", "epochs", "prompts"))


def mutated(random: Random, raw: bytes) -> bytes:
    """``raw`` with a few bytes flipped, cut, doubled, moved or put in."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        span = random.choice((1, 1, 2, 8, 64))
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                del changed[at : at + span]
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = changed[at : at + span]
            case 4:
                changed[at:at] = random.randbytes(span)
            case 5:
                changed[at : at + span] = random.choice((b"\x00", b"\xff", b"\x7f")) * span
    return bytes(changed)


def mutated_text(random: Random, text: str) -> str:
    """``text`` with a few characters or lines changed."""
    lines = text.splitlines(keepends=True) or [""]
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(lines))
        line = lines[at]
        place = random.randrange(len(line) + 1)
        match random.randrange(6):
            case 0:
                lines[at] = line[:place] + random.choice("{}[]:,&*!|>'\"%@`#- \n\t?~") + line[place:]
            case 1:
                lines[at] = line[:place] + line[place + random.randrange(1, 9) :]
            case 2:
                lines.insert(at, random.choice(lines))
            case 3:
                lines[at] = line[:place] + random.choice(WORDS) + line[place:]
            case 4:
                lines[at] = "  " * random.randrange(1, 4) + line
            case 5:
                key, colon, _ = line.partition(":")
                lines[at] = f"{key}{colon} {random.choice(WORDS)}\n"
    return "".join(lines)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of nested maps and lists."""
    found = [path]
    parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        found += places(part, (*path, key))
    return found


def changed_tree(random: Random, tree: Any, spares: Sequence[Any] = ()) -> Any:
    """``tree`` with one or two parts replaced, taken out or added."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        path = random.choice(places(tree)[1:] or [()])
        value = random.choice(spares) if spares and random.random() < 0.3 else odd_value(random)
        tree = _with(tree, path, value, random)
    return tree


def _with(tree: Any, path: tuple[Any, ...], value: Any, random: Random) -> Any:
    if not path:
        return value
    if isinstance(tree, Mapping):
        if len(path) == 1 and random.random() < 0.15:
            return {key: part for key, part in tree.items() if key != path[0]}
        if len(path) == 1 and random.random() < 0.15:
            return {**tree, str(odd_key(random)): value}
        return {**tree, path[0]: _with(tree[path[0]], path[1:], value, random)}
    return [_with(part, path[1:], value, random) if i == path[0] else part for i, part in enumerate(tree)]
