"""Adapters of the engine's schedules."""

from __future__ import annotations

from typing import Any

from limbeck.contracts import Progress
from limbeck.engine.optim import Optim


def cosine_schedule(case: Any) -> dict[str, Any]:
    epochs = int(case["epochs"])
    optim = Optim(lr=case.args["base_lr"], schedule="coda")
    return {
        "out_lr": [optim.rate(Progress(step=e, steps=epochs, epoch=e, epochs=epochs)) for e in range(epochs)]
    }


ADAPTERS = {("coda-prompt", "cosine_schedule"): cosine_schedule}
