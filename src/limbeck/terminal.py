"""Where text meets the terminal: control characters of names from outside are shown, not obeyed."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from limbeck.errors import shown


class Terminal(Console):
    """A console that escapes the control characters in what is printed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of ``renderable``, those of the console itself as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)
