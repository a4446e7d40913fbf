"""What a recipe names cannot lead out of the run's folder and the caches, nor run code that nobody trusts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.engine import small

from limbeck import api, config, plain
from limbeck.demonstration import demonstrate
from limbeck.engine.cache import Cache
from limbeck.engine.state import write_sealed
from limbeck.errors import CacheError, ConfigError
from limbeck.tournament import arena

NAMES = (
    "../../x",
    "/etc/x",
    "a/b",
    "..",
    ".x",
    "-x",
    "",
    "a\\b",
    "C:x",
    "a\nb",
    "\x1b[31m",
    "\u202ex",
    "x" * 200,
)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_name_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"name is .* cannot be part of a file's name: use") as error:
        api.run(config.build({**small.given(tmp_path / "nets"), "name": name}))
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nets"]


@pytest.mark.parametrize("name", ["cdl-kdp", "a.b", "Übung 1", "a_b+c", "x" * 150])
def test_plain_names_will_do(name: str) -> None:
    plain.check_file_name(name, "name")


def test_shipped_names_will_do() -> None:
    from limbeck import registry

    for name in registry.names("recipes"):
        plain.check_file_name(name, "name")


@pytest.mark.parametrize("label", ["../x", "a/../../b", "a\nb"])
def test_labels_lead_nowhere_else(tmp_path: Path, label: str) -> None:
    places = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match=r"label is .* cannot be part of a file's name"):
        demonstrate(["kd"], label=label, **places)
    with pytest.raises(ConfigError, match=r"label is .* cannot be part of a file's name"):
        arena("kd-cnn", label=label, **places)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_names_files_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim.bin"
    victim.write_bytes(b"whole")
    cache = Cache(tmp_path, {"a": 1}, torch.arange(2), 1)
    cache.folder.mkdir()
    header = {
        "key": cache.key,
        "shapes": {"../victim": [[], "uint8"]},
        "rows": 0,
        "complete": False,
        "sha256": {},
    }
    write_sealed(cache.folder / "header.json", header)
    with pytest.raises(CacheError, match=r"names a file '\.\./victim' elsewhere: delete that folder"):
        cache.fill(lambda _: iter(()), print)
    assert victim.read_bytes() == b"whole"


def test_a_log_that_is_a_link_is_not_cut(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to(victim)
    recipe = small.recipe(tmp_path / "nets")
    with pytest.raises(Exception, match="no plain file"):
        api.run(recipe, out=run, quiet=True)
    assert victim.read_text() == "whole"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_code_is_run_only_of_packages_that_the_user_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    canary = tmp_path / "canary"
    given = small.given(tmp_path / "nets")
    images = {"channels": 1, "size": 8, "mean": [0.5], "std": [0.5]}
    target = {
        "name": "module",
        "target": "os:system",
        "kwargs": {"command": f"touch {canary}"},
        "images": images,
    }
    plan = {"name": "static", "epochs": 1, "batch_size": 32}
    recipe = config.build({**given, role: target, "scenario": plan})
    with pytest.raises(
        ConfigError, match=r"target is 'os:system', code of the package 'os' .* set LIMBECK_TRUST=os"
    ):
        api.run(recipe, out=tmp_path / "run", quiet=True)
    assert not canary.exists() and not (tmp_path / "run").exists()
    monkeypatch.setenv("LIMBECK_TRUST", f"{os.environ['LIMBECK_TRUST']},os")
    with pytest.raises(ConfigError, match="gave a int, not a torch"):
        api.run(recipe, out=tmp_path / "run", quiet=True)
    assert canary.exists()
