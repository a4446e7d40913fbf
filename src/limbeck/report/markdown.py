"""Names and texts from outside within Markdown: as they are read, not as they would be carried out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from limbeck.errors import shown

MEANT = re.compile(r"([\\`\[\]<>|]|^[#=+~-])")
"""What begins HTML, links, code, cells, headings and rules."""


def inline(text: object) -> str:
    """``text`` in one line, where nothing of it is markup."""
    return MEANT.sub(r"\\\1", shown(" ".join(str(text).split())))


def code(text: object) -> str:
    """``text`` in one line as code."""
    return f"`{shown(' '.join(str(text).split())).replace('`', chr(39))}`"


def block(text: str, language: str = "") -> Iterator[str]:
    """The lines of ``text`` as a block of code, which nothing in it ends."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}{language}"
    yield shown(text)
    yield fence
