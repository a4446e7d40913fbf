"""What torchrun starts for ``test_ranks``: the recipes of a folder in turn, by the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from limbeck.cli import main

if __name__ == "__main__":
    for recipe in sorted(Path(sys.argv[1]).glob("*.yaml")):
        try:
            main(["run", str(recipe), "--out", str(recipe.with_suffix("")), "--json"])
        except SystemExit as end:
            if end.code:
                raise
