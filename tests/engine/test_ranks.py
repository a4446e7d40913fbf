"""Runs of two processes, as torchrun starts them, end as those of one do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, small_texts
from tests.ranks import ENVIRONMENT, ROOT, TORCHRUN, difference

from limbeck import api, config, plain

# Largest difference of any weight, of the largest weight: float32 sums in another order, through all steps.
TOLERANCES = {
    "adapters": 1e-5, "continual": 1e-5, "elastic": 1e-5, "generations": 1e-5, "language": 1e-5,
    "static": 1e-4, "subclasses": 1e-5,
}  # fmt: skip
REFUSED = {
    "plus": "names the teacher, but DualPath has no blocks that always run whole: leave it whole",
    "tgeo": "shares the student out, whose weights selector tgeo replaces: leave it whole",
}
SGD = "{name: sgd, lr: 0.01}"
CNN = "{name: cnn, widths: [4, 8]}"
TRAINED = f"{{name: trained, network: {CNN}}}"
LORA = "{r: 2, target_modules: [q_proj, v_proj]}"


def recipes(place: Path) -> dict[str, dict[str, Any]]:
    """A small run of each kind. Of 359 digits in batches of 179 one is left for one rank alone."""
    caches = f"engine.cache_root={place / 'caches'}"
    return {
        "continual": small.given(place, caches, "scenario.epochs=2", *small.REPLAYED),
        "language": small_texts.given(place, caches),
        "static": small.given(
            place, caches, f"scenario={{name: static, epochs: 2, batch_size: 179, optim: {SGD}}}",
            f"student={CNN}", f"teacher={TRAINED}",
            "objective=[{name: labels}, {name: kd}, {name: dist}]",
        ),
        # What ranks share out
        "adapters": small_texts.given(
            place, caches, "scenario.epochs=1", "engine.shard=both",
            f"student={{name: causal_lm, model: '{small_texts.model(place)}', lora: {LORA}}}",
        ),
        "elastic": small_texts.given(
            place, caches, "scenario.epochs=1", "engine.shard=teacher", "student={name: elastic}"
        ),
        "generations": small.given(
            place, caches, "engine.shard=both", "objective=[{name: labels}, {name: kd}]", f"student={CNN}",
            "teacher={name: none}", "scenario={name: self_distillation, generations: 3, epochs: 1}",
        ),
        "subclasses": shared(
            place, f"student={{name: lelp, network: {CNN}, subclasses: 2}}",
            f"teacher={{name: lelp, teacher: {TRAINED}, subclasses: 2, null_space: false}}",
            "objective=[{name: labels}, {name: lelp}]",
        ),
    }  # fmt: skip


def shared(place: Path, *sets: str) -> dict[str, Any]:
    """A small run whose networks are shared out."""
    return small.given(
        place, f"engine.cache_root={place / 'caches'}", "engine.shard=both",
        f"scenario={{name: static, epochs: 1, batch_size: 64, optim: {SGD}, validation: 0.2}}",
        f"student={CNN}", f"teacher={TRAINED}", "objective=[{name: labels}, {name: kd}]", *sets,
    )  # fmt: skip


def refused(place: Path) -> dict[str, dict[str, Any]]:
    """Runs that cannot be shared out."""
    return {
        "plus": shared(
            place, f"teacher={{name: dfpt, plus: true, teacher: {TRAINED}}}",
            "objective=[{name: labels}, {name: kd, path: prompt}]",
        ),
        "tgeo": shared(place, "selector={name: tgeo}"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each recipe was run by two ranks, and by one."""
    found = tmp_path_factory.mktemp("runs")
    for folder, choices in (("two", recipes(found)), ("refused", refused(found))):
        (found / folder).mkdir()
        for name, given in choices.items():
            (found / folder / f"{name}.yaml").write_text(plain.write(given))
    command = [sys.executable, *TORCHRUN, "tests.engine.on_ranks", str(found)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    (found / "said").write_text(done.stderr)
    return found


@pytest.mark.parametrize("name", sorted(TOLERANCES))
def test_two_ranks_end_as_one(place: Path, name: str) -> None:
    api.run(config.load(place / "two" / f"{name}.yaml"), out=place / "one" / name, quiet=True)
    one, two = small.figures(place / "one" / name), small.figures(place / "two" / name)
    assert one["protocol"] == two["protocol"]
    assert two["student"]["nll"] == pytest.approx(one["student"]["nll"], rel=1e-3)
    assert difference(place / "one" / name, place / "two" / name) < TOLERANCES[name]
    own, other = (small.lines(place / who / name) for who in ("one", "two"))
    assert [line["event"] for line in own] == [line["event"] for line in other]


def test_the_folder_is_as_of_one(place: Path) -> None:
    for name in TOLERANCES:
        folder = place / "two" / name
        assert not list(folder.rglob("*.tmp"))
        assert (folder / "report.html").exists()
        assert not (folder / "cache").exists()
        assert torch.stack([w.double().sum() for w in small.weights(folder).values()]).isfinite().all()


def test_a_rank_that_comes_late_finds_its_own_run(place: Path) -> None:
    assert (place / "two" / "distilled" / "report.html").exists()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_shared_out_is_refused_by_one_line(place: Path, name: str) -> None:
    assert (place / "said").read_text().count(f"limbeck: engine.shard {REFUSED[name]}\n") == 1
