"""What runs share: the folder of caches, and teachers that were trained in exactly the same way."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch

from limbeck.engine.ranks import here
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine
from limbeck.engine.state import (
    load_variable_state,
    locked,
    read_state,
    value_hash,
    variable_state,
    write_state,
)
from limbeck.errors import CheckpointError


def cache_root(folder: Path, settings: Engine) -> Path:
    """Where shared caches lie: the setting, else ``LIMBECK_CACHE``, else ``.cache`` beside the run."""
    given = settings.cache_root or os.environ.get("LIMBECK_CACHE")
    return Path(given) if given else folder.resolve().parent / ".cache"


class Teachers:
    """The trained state of a teacher under a key that names everything it depends on.

    Args:
        root: folder of the caches.
        key: plain data; torch's version and the numbers of threads and ranks are added.
    """

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        made_by = {name: importlib.metadata.version(name) for name in ("limbeck", "timm", "torch")}
        made_by |= {"threads": str(torch.get_num_threads()), "ranks": str(here().size)}
        self.stem = root / "teachers" / value_hash({**key, **made_by})

    def take(self, run: Run, stage: str, net: torch.nn.Module) -> bool:
        """Load the state into ``net`` and mark ``stage`` done; False where there is none to take."""
        if run.pending is not None or not run.ranks.told(self.stem.with_suffix(".json").exists()):
            return False
        try:
            kept = read_state(self.stem)
            load_variable_state(net, kept["net"])
        except CheckpointError as error:
            self.stem.with_suffix(".json").unlink(missing_ok=True)
            run.warn(f"{error}; the teacher is trained anew")
            return False
        run.log("teacher_reused", stage=stage, seconds=kept["seconds"], key=self.stem.name)
        run.seconds[stage] = 0.0
        run.adopt(stage)
        return True

    def keep(self, run: Run, stage: str, net: torch.nn.Module) -> None:
        """Store the state of ``net``, which ``stage`` trained to its end, unless it is there already."""
        if run.probing:
            return
        if run.pending is not None:  # an earlier attempt came this far, and may have been killed right here
            if run.ranks.first:
                with locked(self.stem.parent):
                    return
            return
        state = variable_state(net)  # asked for by all ranks, should it be shared out among them
        if not run.ranks.first:
            return
        with locked(self.stem.parent):
            if not self.stem.with_suffix(".json").exists():
                write_state(self.stem, {"net": state, "seconds": run.seconds[stage]})
