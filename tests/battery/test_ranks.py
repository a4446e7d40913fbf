"""Two ranks are one: every objective, student, teacher and selector, in one pair of processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.ranks import ended, launched

from limbeck import registry

TOLERANCE = 1e-5  # relative; 1e-12 but for models of transformers and what else computes in float32
WINGS = ("objectives", "students", "teachers", "selectors")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    for code, said in ended(launched("-m", "tests.battery.on_ranks", folder)):
        assert code == 0, said
    read: dict[str, dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return read


def test_blocks_that_are_shared_out_learn_alike(found: dict[str, dict[str, Any]]) -> None:
    assert found["shards"]
    for name, value in found["shards"].items():
        assert isinstance(value, float), (name, value)
        assert value < TOLERANCE, name


@pytest.mark.parametrize(("wing", "name"), [(wing, name) for wing in WINGS for name in registry.names(wing)])
def test_two_ranks_are_one(found: dict[str, dict[str, Any]], wing: str, name: str) -> None:
    if wing in ("students", "teachers") and name not in found[wing]:
        pytest.skip("nothing in it learns by gradient")
    assert isinstance(found[wing][name], float), found[wing][name]
    assert found[wing][name] < TOLERANCE
