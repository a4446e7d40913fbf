"""Making the shipped backbones anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from limbeck import registry
from limbeck.api import RUNS, Result, load_student, resume, run
from limbeck.data.batches import Batches
from limbeck.engine.state import write_atomically, write_json
from limbeck.errors import DataError, unknown
from limbeck.metrics.probe import linear_probe

PRETRAIN = "pretrain-"


def pretrain(name: str, *, out: str | Path | None = None, quiet: bool = False) -> Result:
    """Make a shipped backbone anew: train it by its recipe, leave its classifier out, probe it.

    Args:
        name: ``limbeck-glyphs-m`` or ``limbeck-glyphs-s``.
        out: folder of the run, which goes on where it was cut off; its ``backbone/`` is what the package
            ships under ``nets/weights/<name>``.

    Raises:
        ConfigError: there is no recipe for that name.
    """
    known = {
        f"limbeck-{n.removeprefix(PRETRAIN)}": n for n in registry.names("recipes") if n.startswith(PRETRAIN)
    }
    if name not in known:
        raise unknown("backbone", name, known)
    folder = Path(out) if out is not None else RUNS / known[name]
    begun = (folder / "recipe.yaml").exists()
    result = resume(folder, quiet=quiet) if begun else run(known[name], out=folder, quiet=quiet)
    student = load_student(result.folder)
    network = student.network
    network.reset_classifier(0)
    folder = folder / "backbone"
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path))
    write_json(folder / "config.json", student.description | {"num_classes": 0})
    probed = probe(network)
    write_json(folder / "probe.json", probed)
    return Result(result.folder, result.data | {"linear_probe": probed})


@torch.no_grad()
def probe(network: Any) -> dict[str, float]:
    """Accuracy, percent, of a linear classifier on a frozen timm vision transformer's features, by data set.

    Digits, and Fashion-MNIST (its first 5,000 training images) where that can be had.
    """
    found = {}
    for name, count in (("digits", None), ("fashion_mnist", 5000)):
        try:
            splits = registry.get("data", name)().load()
        except DataError:
            continue
        size = network.patch_embed.img_size[0]
        parts = []
        for part, limit in ((splits.train, count), (splits.test, None)):
            batches = Batches(
                part, torch.arange(len(part))[:limit], batch_size=500, shuffle=False, size=size,
                channels=network.patch_embed.proj.in_channels,
            )  # fmt: skip
            seen = [(network(batch.inputs), batch.labels) for batch in batches.epoch(0)]
            parts += [torch.cat(each) for each in zip(*seen, strict=True)]
        found[name] = linear_probe(*parts)
    return found
