"""Knowledge distillation: from any teacher into any student, with any published method.

``limbeck.run("cdl-kdp")`` carries out a recipe. All names are imported when first used, so that
``import limbeck`` is light.
"""

from __future__ import annotations

from typing import Any

NAMES = {
    "Arena": "tournament",
    "Export": "api",
    "Result": "api",
    "arena": "tournament",
    "demonstrate": "demonstration",
    "distill": "distilling",
    "export": "api",
    "load_student": "api",
    "pretrain": "pretraining",
    "resume": "api",
    "run": "api",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"limbeck.{NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
