"""Run folders as a real run leaves them, made from a seed; the figures in them agree with one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DEFINITIONS = {
    "cdl": "mean over the N tasks of (accuracy right after learning - final accuracy), divided by N",
    "coda": "mean over steps of the mean drop of the old tasks from one step to the next",
    "l2p": "mean over the first N - 1 tasks of (best accuracy so far - final accuracy)",
}


def matrix(rng: np.random.Generator, tasks: int, first: float, drop: float) -> list[list[float | None]]:
    rows: list[list[float | None]] = []
    for t in range(tasks):
        row: list[float | None] = [None] * tasks
        for i in range(t + 1):
            row[i] = float(np.clip(first - drop * (t - i) ** 0.8 - 1.5 * t + rng.normal(0, 2), 2, 100))
        rows.append(row)
    return rows


def continual(rows: list[list[float | None]]) -> dict[str, Any]:
    """The figures of an accuracy matrix, by their definitions."""
    n = len(rows)
    a = np.array([[np.nan if v is None else v for v in row] for row in rows])
    running = [float(np.mean(a[t, : t + 1])) for t in range(n)]
    just = np.diag(a)
    coda = [np.mean(a[t - 1, :t] - a[t, :t]) for t in range(1, n)]
    best = np.array([np.nanmax(a[:-1, i]) if n > 1 else 0.0 for i in range(n - 1)])
    return {
        "accuracy_matrix": rows,
        "average_accuracy": running[-1],
        "average_accuracy_interval": [running[-1] - 1.9, running[-1] + 1.8],
        "incremental_average": float(np.mean(running)),
        "just_learned": float(just.mean()),
        "forgetting": {
            "cdl": float((just - a[-1]).mean()),
            "coda": float(np.mean(coda)) if coda else 0.0,
            "l2p": float((best - a[-1, :-1]).mean()) if n > 1 else 0.0,
        },
        "running_average": running,
    }


def confusion(rng: np.random.Generator, classes: int, accuracy: float) -> list[list[int]]:
    table = np.zeros((classes, classes), dtype=int)
    for true in range(classes):
        chance = rng.dirichlet(np.full(classes, 0.3)) * (1 - accuracy / 100)
        chance[true] += accuracy / 100
        table[true] = rng.multinomial(36, chance / chance.sum())
    return table.tolist()


def calibration(rng: np.random.Generator, classes: int, accuracy: float) -> dict[str, Any]:
    confidence = np.linspace(0.033, 0.967, 15)
    right = np.clip(confidence * 0.85 + rng.normal(0, 0.03, 15), 0, 1)
    counts = (200 * confidence**3).astype(int)
    ece = float(np.sum(counts * np.abs(right - confidence)) / counts.sum())
    return {
        "ece": ece,
        "nll": 0.71,
        "brier": 0.33,
        "reliability": [
            {"confidence": float(c), "accuracy": float(r), "count": int(k)}
            for c, r, k in zip(confidence, right, counts, strict=True)
        ],
        "confusion": confusion(rng, classes, accuracy),
        "class_names": [f"class {c}" if classes > 10 else str(c) for c in range(classes)],
    }


def events(
    rng: np.random.Generator, tasks: int, steps: int, student: Any, teacher: Any
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for task in range(tasks):
        for who in ("teacher", "student"):
            for step in range(steps):
                left = np.exp(-5 * step / steps)
                terms = {"labels": 0.2 + 2.1 * left * rng.uniform(0.7, 1.3)}
                if who == "student":
                    terms["kd"] = 0.05 + 1.4 * left * rng.uniform(0.7, 1.3)
                    terms["prompt"] = 0.004 * rng.uniform(0.9, 1.1)
                line = {"event": "step", "stage": f"task{task}/{who}", "task": task, "epoch": step // 8}
                line |= {"step": step, "loss": sum(terms.values()), "terms": terms, "lr": 0.01 * left}
                lines.append(line | {"seconds": 0.02, "teacher_share": 0.21})
                if who == "student" and step % 20 == 0:
                    shares = {
                        "labels": 0.62 - 0.2 * step / steps,
                        "kd": 0.375 + 0.2 * step / steps,
                        "prompt": 0.005,
                    }
                    stage = {"event": "gradient_share", "stage": f"task{task}/{who}", "step": step}
                    lines.append(stage | {"shares": shares})
        for who, rows in (("teacher", teacher), ("student", student)):
            lines.append(
                {"event": "evaluation", "task": task, "who": who, "accuracy": rows[task][: task + 1]}
            )
    lines.append(
        {"event": "warning", "text": "task0/student: the term 'prompt' carries 0.5 % of the gradient"}
    )
    return lines


COST = {
    "student": {"parameters": 312_874, "trainable": 41_230, "multiply_adds": 5_213_184, "latency_ms": 2.31},
    "teacher": {"parameters": 702_210, "trainable": 78_100, "multiply_adds": 12_104_448, "latency_ms": 4.87},
}
VERSIONS = {"limbeck": "0.1.0", "torch": "2.13.0", "timm": "1.0.20", "python": "3.11.2"}


def write_continual(
    folder: Path,
    *,
    recipe: str = "cdl-kdp",
    seed: int = 0,
    tasks: int = 5,
    per_task: int = 2,
    steps: int = 160,
    first: float = 94.0,
    data: str = "digits",
    temperature: float = 2.0,
    teacher: bool = True,
    finished: bool = True,
    upto: int | None = None,
) -> Path:
    """A run of the scenario ``continual``; ``upto`` cuts an unfinished one after that many lines."""
    rng = np.random.default_rng([seed, len(recipe), tasks])
    student_rows, teacher_rows = matrix(rng, tasks, first, 9.0), matrix(rng, tasks, 97.0, 6.0)
    classes = tasks * per_task
    figures = continual(student_rows)
    figures |= calibration(rng, classes, figures["average_accuracy"]) | {"key_accuracy": None}
    tutor = continual(teacher_rows)
    tutor |= calibration(rng, classes, tutor["average_accuracy"])
    tutor["key_accuracy"] = [float(v) for v in rng.uniform(60, 95, tasks)]
    gap = [b - a for a, b in zip(student_rows[-1], teacher_rows[-1], strict=True)]  # type: ignore[operator]
    over = [b - a for a, b in zip(figures["running_average"], tutor["running_average"], strict=True)]
    stages = {
        f"task{t}/{who}": float(rng.uniform(4, 9)) for t in range(tasks) for who in ("teacher", "student")
    }
    protocol = {
        "tasks": tasks, "class_order": rng.permutation(classes).tolist(), "sizes": [per_task] * tasks,
        "batch": 50, "epochs": 40, "views": {"count": 4, "crop": 0.8},
        "head_masking": "train: current task; test: none",
        "evaluated": "last epoch", "forgetting_definitions": DEFINITIONS,
    }  # fmt: skip
    result = {
        "recipe": recipe, "scenario": "continual", "seed": seed, "data": data, "protocol": protocol,
        "student": figures, "teacher": tutor if teacher else None,
        "fidelity": {"agreement": 86.2 + rng.normal(), "kl": 0.31 + 0.02 * rng.normal(),
                     "gap_per_task": gap, "gap_over_tasks": over,
                     "agreement_over_tasks": rng.uniform(84, 97, tasks).tolist()} if teacher else None,
        "cost": COST if teacher else COST | {"teacher": None},
        "time": {"seconds": sum(stages.values()) + 4, "teacher_share": 0.21, "stages": stages},
        "versions": VERSIONS,
    }  # fmt: skip
    config = {
        "name": recipe, "seed": seed, "data": {"name": data},
        "student": {"name": "prompted_vit", "backbone": "limbeck-glyphs-s", "kd_prompts": {"length": 6}},
        "objective": [{"name": "labels", "weight": 0.5}, {"name": "kd", "temperature": temperature}],
        "scenario": {"name": "continual", "tasks": tasks, "epochs": 40},
        "versions": VERSIONS,
    }  # fmt: skip
    lines = events(rng, tasks, steps, student_rows, teacher_rows)
    if not teacher:
        lines = [
            e for e in lines if e.get("who") != "teacher" and not str(e.get("stage")).endswith("teacher")
        ]
    return write(folder, config, result if finished else None, lines[:upto])


def write_static(
    folder: Path, *, recipe: str = "kd", seed: int = 0, classes: int = 10, accuracy: float = 91.0
) -> Path:
    """A run of the scenario ``static``."""
    rng = np.random.default_rng([seed, classes])
    lines = [e for e in events(rng, 1, 300, [[accuracy]], [[96.0]]) if e["event"] != "evaluation"]
    for event in lines:
        if "stage" in event:
            event["stage"] = str(event["stage"]).partition("/")[2]
    result = {
        "recipe": recipe, "scenario": "static", "seed": seed, "data": "fashion_mnist",
        "protocol": {"batch": 64, "epochs": 10, "evaluated": "last epoch"},
        "student": {"accuracy": accuracy + rng.normal(), "accuracy_interval": [accuracy - 1, accuracy + 1]}
        | calibration(rng, classes, accuracy),
        "teacher": {"accuracy": 96.0, "accuracy_interval": [95.2, 96.7]} | calibration(rng, classes, 96.0),
        "fidelity": {"agreement": 93.0, "kl": 0.12, "cka": 0.84},
        "cost": COST, "time": {"seconds": 61.2, "teacher_share": 0.3, "stages": {"student": 55.0}},
        "versions": VERSIONS,
    }  # fmt: skip
    config = {"name": recipe, "seed": seed, "data": {"name": "fashion_mnist"}, "scenario": {"name": "static"}}
    return write(folder, config, result, lines)


def write(folder: Path, config: Any, result: Any, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder
