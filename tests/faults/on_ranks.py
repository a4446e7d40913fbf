"""What a rank does for ``ranks``: ``python -m tests.faults.on_ranks TASK FOLDER``, as torchrun starts it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.engine.killing import Killed

from limbeck import api, config
from limbeck.config import Recipe
from limbeck.engine.ranks import here
from limbeck.engine.run import Run
from limbeck.errors import DataError


def cut_off(recipe: Recipe, folder: Path, at: int) -> None:
    """Carry out ``recipe`` up to step ``at``, without a word; every step before it has a checkpoint."""
    seen = 0

    def deadly(self: Run, *given: object) -> bool:
        nonlocal seen
        seen += 1
        if seen == at:
            raise Killed
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "diagnoses", deadly)
        with pytest.raises(Killed):
            api.run(recipe, out=folder, quiet=True)


def whole(place: Path) -> None:
    """Run the recipe, then cut it off twice; go on with the first one at once."""
    recipe = config.load(place / "recipe.yaml")
    api.run(recipe, out=place / f"whole{here().size}", quiet=True)
    for name in ("same", "other"):
        cut_off(recipe, place / f"{name}{here().size}", at=9)
    api.resume(place / f"same{here().size}", quiet=True)


def resumed(place: Path) -> None:
    """Go on with what another number of ranks began."""
    api.resume(place / f"other{3 - here().size}", quiet=True)


def sharded(place: Path) -> None:
    """Run the recipe with whole networks, and as two with shared ones; the last of these is also cut off."""
    for shard in ("none", "teacher", "student", "both")[: 1 if here().size == 1 else None]:
        recipe = config.load(place / "recipe.yaml", [f"engine.shard={shard}"])
        api.run(recipe, out=place / f"{shard}{here().size}", quiet=True)
    if here().size == 2:
        for name in ("same", "other"):
            every = replace(recipe, engine=replace(recipe.engine, checkpoint_seconds=0))
            cut_off(every, place / f"{name}2", at=9)
        api.resume(place / "same2", quiet=True)
    else:
        api.resume(place / "other2", quiet=True)


def failing(place: Path) -> None:
    """The last rank cannot read on at step 5."""
    from limbeck.cli import main

    inner, seen = Run.diagnoses, 0

    def failing_there(self: Run, *given: object) -> bool:
        nonlocal seen
        seen += 1
        if seen == 5 and here().number == here().size - 1:
            raise DataError("sample 3 cannot be read: mend it")
        return inner(self, *given)  # type: ignore[arg-type]

    Run.diagnoses = failing_there  # type: ignore[method-assign, assignment]
    main(["run", str(place / "recipe.yaml"), "--out", str(place / "failed"), "--json"])


def long(place: Path) -> None:
    """A run of some seconds."""
    from limbeck.cli import main

    main(["run", str(place / "long.yaml"), "--out", str(place / "killed"), "--json"])


def on(place: Path) -> None:
    """Go on with ``long``."""
    api.resume(place / "killed", quiet=True)


TASKS = {task.__name__: task for task in (whole, resumed, sharded, failing, long, on)}

if __name__ == "__main__":
    TASKS[sys.argv[1]](Path(sys.argv[2]))
