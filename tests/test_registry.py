from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck import contracts, registry
from limbeck.errors import ConfigError

CHOICES = [(kind, name) for kind in registry.WINGS for name in registry.names(kind)]
BASES = {"teachers": "Teacher", "students": "Student", "objectives": "Objective", "selectors": "Selector"}


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from limbeck import registry as r\n"
        "[r.describe(k, n) for k in r.kinds() for n in r.names(k)]\n"
        "assert not {'torch', 'pydantic'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_every_choice_is_a_frozen_dataclass_found_under_its_own_name(kind: str, name: str) -> None:
    cls = registry.get(kind, name)
    parameters = cls.__dataclass_params__
    assert parameters.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert registry.name_of(cls) == (kind, name)
    assert registry.describe(kind, name)
    if kind in BASES:
        assert issubclass(cls, getattr(contracts, BASES[kind]))


def test_hyphens_case_and_underscores_mean_the_same() -> None:
    assert registry.get("selectors", "RANDOM") is registry.get("selectors", "random")
    assert registry.canonical("recipes", "cdl_kdp") == "cdl-kdp"
    assert registry.canonical("students", "prompted-vit") == "prompted_vit"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown selector 'randm'.*did you mean 'random'"):
        registry.get("selectors", "randm")
    with pytest.raises(ConfigError, match=r"unknown kind 'selector': did you mean 'selectors'"):
        registry.names("selector")
    with pytest.raises(ConfigError, match=r"unknown recipe 'cdl-kpd'.*cdl-kdp"):
        registry.recipe("cdl-kpd")
    with pytest.raises(ConfigError, match="is no named choice"):
        registry.name_of(3)


def test_helpers_in_a_wing_are_no_choices() -> None:
    assert not {"images", "stream", "views", "batches"} & set(registry.names("data"))


def test_a_new_file_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "mine.py").write_text(
        "class Shared(Objective):\n    'Not it.'\nclass Mine(Shared):\n    'My way.\\n\\n    More.'\n"
    )
    (tmp_path / "objectives" / "helper.py").write_text("class Helper:\n    'No choice.'\n")
    (tmp_path / "objectives" / "_private.py").write_text("class Private(Objective):\n    'Hidden.'\n")
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    registry._choices.cache_clear()
    try:
        assert registry.names("objectives") == ("mine",)
        assert registry.describe("objectives", "mine") == "My way."
    finally:
        registry._choices.cache_clear()


def test_a_file_with_two_choices_is_refused() -> None:
    body = ast.parse("class A(Objective): ...\nclass B(Objective): ...").body
    with pytest.raises(ConfigError, match=r"both\.py defines A, B: a file holds one choice"):
        registry._one("both", [node for node in body if isinstance(node, ast.ClassDef)])
