"""A run that is killed at a step, without a word, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck import api
from limbeck.config import Recipe
from limbeck.engine.run import Run


class Killed(BaseException):
    """What no part of the program catches."""


def killed_and_resumed(recipe: Recipe, folder: Path, *, at: int) -> Path:
    """Run ``recipe``, kill it at training step or kept fact number ``at``, and resume it."""
    seen = 0

    def counted(method: Any) -> Any:
        def deadly(self: Run, *given: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Killed
            return method(self, *given)

        return deadly

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "diagnoses", counted(Run.diagnoses))
        patch.setattr(Run, "once", counted(Run.once))
        with pytest.raises(Killed):
            api.run(recipe, out=folder, quiet=True)
    api.resume(folder, quiet=True)
    return folder
