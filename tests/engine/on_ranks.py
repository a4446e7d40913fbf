"""What torchrun starts for ``test_ranks``: recipes in turn, by the command line, some of which are refused;
then two plain modules, where the other rank comes late."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from limbeck import distill
from limbeck.cli import main


class Late(os.PathLike[str]):
    """A path that the second rank takes its time to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        time.sleep(2 * int(os.environ["RANK"]))
        return str(self.path)


def distilled(folder: Path) -> None:
    """The smallest distillation into ``folder``."""
    torch.manual_seed(0)
    data = torch.randn(8, 3), torch.arange(8) % 2
    distill(nn.Linear(3, 2), nn.Linear(3, 2), data, epochs=1, out=Late(folder), quiet=True)  # type: ignore[arg-type]


def ran(recipe: Path) -> int:
    """The exit code of a recipe's run into the folder of its name."""
    try:
        main(["run", str(recipe), "--out", str(recipe.with_suffix("")), "--json"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for folder, code in (("two", 0), ("refused", 2)):
        for recipe in sorted((place / folder).glob("*.yaml")):
            assert ran(recipe) == code, recipe
    distilled(place / "two" / "distilled")
