"""Whole runs of a second: two random transformers of 8 x 8 pixels on a fifth of the digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from limbeck import config, plain
from limbeck.config import Recipe
from limbeck.nets.backbones import VisionTransformer

SHAPES = {"small": {"embed_dim": 12, "depth": 2}, "large": {"embed_dim": 16, "depth": 3}}


def backbone(folder: Path, size: str) -> str:
    """The name of a tiny transformer with fixed random weights, written into ``folder``."""
    place = folder / size
    if not place.exists():
        args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_heads": 2, **SHAPES[size]}
        torch.manual_seed(len(size))
        place.mkdir(parents=True)
        state = VisionTransformer(**args, num_classes=0).state_dict()
        save_file({name: 3 * value for name, value in state.items()}, place / "model.safetensors")
        cfg = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "num_classes": 0}
        about = {"architecture": "vit_tiny_patch16_224", "model_args": args, "pretrained_cfg": cfg}
        (place / "config.json").write_text(json.dumps(about))
    return f"local-dir:{place}"


def given(folder: Path, *sets: str) -> dict[str, Any]:
    """A small KDP recipe as plain data: two tasks, each with four steps an epoch."""
    coda = {"name": "coda", "pool": 4, "length": 4, "blocks": [0]}
    asked: dict[str, Any] = {
        "name": "small",
        "teacher": {"name": "prompted_vit", "backbone": backbone(folder, "large"), "prompts": coda},
        "student": {
            "name": "prompted_vit",
            "backbone": backbone(folder, "small"),
            "prompts": coda,
            "kd_prompts": {"length": 2},
        },
        "objective": [{"name": "labels", "weight": 0.5}, {"name": "kd", "weight": 0.5, "temperature": 2}],
        "scenario": {"name": "continual", "tasks": 2, "epochs": 3, "batch_size": 32, "optim": {"lr": 0.01}},
        "data": {"name": "digits", "test_fraction": 0.8},
        "engine": {"threads": 1, "checkpoint_seconds": 1000, "reuse_teachers": False, "log_every": 2},
    }
    for item in sets:
        asked = plain.override(asked, item)
    return asked


def recipe(folder: Path, *sets: str) -> Recipe:
    """The same, checked."""
    return config.build(given(folder, *sets))


JOINT = (
    "scenario.schedule=joint",
    "student.kd_prompts=null",
    "student.prompt_map={components: 4, length: 4, blocks: [0]}",
)
REPLAYED = ("views.count=2", "views.translate=0.1")
FRESH = ("views.translate=0.1",)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The learnt state of a finished run's student."""
    state: dict[str, torch.Tensor] = load_file(run / "student" / "model.safetensors")
    return state


def figures(run: Path) -> dict[str, Any]:
    """The figures of a finished run, without what time has a part in."""
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    for own in ("time", "sha256"):
        found.pop(own)
    found["files"].pop("recipe.yaml")  # which says how often checkpoints are written
    for side in found["cost"].values():
        if side is not None:
            side.pop("latency_ms", None)
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without what time has a part in."""
    timed = ("seconds", "teacher_share")
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in read]


def assert_same(run: Path, other: Path) -> None:
    """Two runs ended with the same bytes of weights, the same figures and the same log."""
    own, others = (path / "student" / "model.safetensors" for path in (run, other))
    assert own.read_bytes() == others.read_bytes()
    assert figures(run) == figures(other)
    assert lines(run) == lines(other)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Python ``code`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
