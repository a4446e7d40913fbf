"""A part of the fuzzing of strangers' input: see ``tests/faults/fuzz.py`` for the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults.fuzz import KINDS, Judge, fuzz
from tests.faults.hostile import CANARY, Case

QUICK = [kind for kind in KINDS if kind not in ("run folders", "recipes with changed fields")]


def test_what_strangers_give_works_or_is_refused_in_one_line() -> None:
    judge = fuzz(150, seed=1, kinds=QUICK)
    assert judge.cases >= 150
    assert judge.faults == []


@pytest.mark.parametrize("wrong", ["traceback", "code", "lines"])
def test_a_fault_is_seen(tmp_path: Path, wrong: str) -> None:
    judge = Judge()
    run = {
        "traceback": lambda: [][1],
        "code": CANARY.touch,
        "lines": lambda: (_ for _ in ()).throw(SystemExit(1)),
    }[wrong]
    judge("kind", 0, Case("x", run))
    assert len(judge.faults) == 1
    assert not CANARY.exists()
