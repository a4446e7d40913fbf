"""Knowledge distillation: from any teacher into any student, with any published method.

``limbeck.run("cdl-kdp")`` carries out a recipe; the other names are those of ``limbeck.api``. They are
imported when first used, so that ``import limbeck`` is light.
"""

from __future__ import annotations

from typing import Any

NAMES = ("Result", "demonstrate", "distill", "load_student", "pretrain", "resume", "run")


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    from limbeck import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
