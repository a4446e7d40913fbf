"""Named places in a run, each of which it passes a counted number of times, where something can befall it."""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from limbeck import api
from limbeck.engine import cache, fit, run, shared, state

Befall = Callable[[str, int], None]
"""Told of each place that is passed, and how often it has been."""

PLACES = (
    "a step: before the update",
    "a step: after the update",
    "a checkpoint: half of the weights",
    "a checkpoint: weights without facts",
    "an old checkpoint: one of its files gone",
    "a file: written but not renamed",
    "a log line: half of it",
    "a figure: being computed",
    "a figure: computed but not kept",
    "a cache: between its rows",
    "a cache: rows without a header",
    "a taught teacher: before it is kept",
    "the student: before it is saved",
    "the card",
    "the page",
)


class Places:
    """Patches the program so that ``befall`` is told where it stands; only in a process that ends soon.

    Attributes:
        passed: how often each place was passed.
    """

    def __init__(self, befall: Befall) -> None:
        self.befall = befall
        self.passed: Counter[str] = Counter()

    def at(self, place: str, last_act: Callable[[], object] | None = None) -> None:
        """The program is at ``place``; ``last_act`` is what it has done by halves there."""
        self.passed[place] += 1
        if last_act is not None and self.comes(place):
            last_act()
        self.befall(place, self.passed[place])

    def comes(self, place: str) -> bool:
        """Whether something will befall the program here; by default it may."""
        return False

    def before(self, owner: Any, name: str, place: str) -> None:
        """``place`` is before each call of ``owner.name``."""
        true = getattr(owner, name)

        def told(*given: Any, **named: Any) -> Any:
            self.at(place)
            return true(*given, **named)

        setattr(owner, name, told)

    def patch(self) -> None:
        """Stand at all places."""
        self.before(fit, "gradient_norm", "a step: before the update")
        self.before(run.Run, "after_step", "a step: after the update")
        self.before(os, "replace", "a file: written but not renamed")
        self.before(pathlib.Path, "unlink", "an old checkpoint: one of its files gone")
        self.before(shared, "write_state", "a taught teacher: before it is kept")
        self.before(cache.Cache, "_flush", "a cache: rows without a header")
        self.before(api, "save_student", "the student: before it is saved")
        self.before(api, "write_card", "the card")
        self.before(api, "write_page", "the page")
        self._patch_checkpoints()
        self._patch_log()
        self._patch_figures()
        self._patch_cache()
        cache.FLUSH_SECONDS = -1  # at each chunk

    def _patch_checkpoints(self) -> None:
        save_file, write_sealed = state.save_file, state.write_sealed

        def save(tensors: Any, path: Any) -> None:
            save_file(tensors, path)
            content = path.read_bytes()
            half = content[: len(content) // 2]
            self.at("a checkpoint: half of the weights", lambda: path.write_bytes(half))

        def seal(path: Any, value: Any) -> None:
            self.at("a checkpoint: weights without facts")
            write_sealed(path, value)

        state.save_file, state.write_sealed = save, seal

    def _patch_log(self) -> None:
        log = run.Run.log

        def half(own: run.Run, event: str, **values: Any) -> None:
            def begun() -> None:
                own._log.write(b'{"event": "st')
                own._log.flush()

            self.at("a log line: half of it", begun)
            log(own, event, **values)

        run.Run.log = half  # type: ignore[method-assign]

    def _patch_figures(self) -> None:
        once = run.Run.once

        def kept(own: run.Run, name: str, compute: Callable[[], Any]) -> Any:
            def told() -> Any:
                self.at("a figure: being computed")
                found = compute()
                self.at("a figure: computed but not kept")
                return found

            return once(own, name, told)

        run.Run.once = kept  # type: ignore[method-assign]

    def _patch_cache(self) -> None:
        write = cache.Cache._write

        def broken(own: cache.Cache, chunks: Any, header: Any, sums: Any) -> Any:
            def told(first: int) -> Iterator[Any]:
                for chunk in chunks(first):
                    yield chunk
                    self.at("a cache: between its rows")

            return write(own, told, header, sums)

        cache.Cache._write = broken  # type: ignore[method-assign]
