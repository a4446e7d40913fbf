"""What the evaluation of every run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck import config, exporting
from limbeck.contracts import Batch
from limbeck.metrics.fidelity import linear_cka
from limbeck.nets.small import MLP, ConvNet
from limbeck.nets.taps import Frozen, Tapped, classifier_inputs
from limbeck.scenarios import figures


def batch(count: int = 6) -> Batch:
    none = torch.zeros(count, dtype=torch.int64)
    return Batch(inputs=torch.randn(count, 1, 8, 8), labels=none, index=none, view=none)


@pytest.mark.parametrize("width", [7, 5])
def test_what_a_classifier_reads_is_seen(width: int) -> None:
    """Also where another layer is as wide as there are classes."""
    net = Frozen(Tapped(MLP(64, [width, 5], 5)))
    given = batch()
    with classifier_inputs(net, 5) as seen:
        said = net(given, taps=("hidden",))
    assert len(seen) == 1
    assert torch.equal(seen[0], said.features["hidden"])
    net(given)
    assert len(seen) == 1, "no hook is left"


def test_a_network_without_a_linear_classifier_is_left_out() -> None:
    net = Tapped(nn.Sequential(nn.Conv2d(1, 5, 8), nn.Flatten()))
    with classifier_inputs(net, 5) as seen:
        net(batch())
    assert seen == []
    features = {"student": seen, "teacher": [torch.randn(6, 3)]}
    assert figures.cka(features, 6) == {}


def test_alike_networks_have_a_cka_of_one() -> None:
    nets = {"student": Tapped(ConvNet(1, [3, 4], 5)).eval(), "teacher": Frozen(Tapped(MLP(64, [6], 5)))}
    parts: list[Batch] = [batch(), batch(3)]
    with figures.watched(nets, 5) as features:
        for part in parts:
            for net in nets.values():
                net(part)
    own = torch.cat(features["student"])
    assert own.shape == (9, 4)
    assert figures.cka(features, 9)["cka"] == linear_cka(own, torch.cat(features["teacher"]))
    turned: dict[str, list[Tensor]] = {"student": [own], "teacher": [3 * own.flip(1)]}
    assert figures.cka(turned, 9)["cka"] == pytest.approx(1)


def test_every_run_is_evaluated_in_full(tmp_path: Path) -> None:
    short = ("scenario.epochs=1", "scenario.teacher_epochs=1", f"engine.cache_root={tmp_path / 'caches'}")
    found: dict[str, Any] = limbeck.run("kd", short, out=tmp_path / "run", quiet=True).data
    for who in ("student", "teacher"):
        assert {"accuracy", "accuracy_interval", "nll", "brier", "ece", "trust"} <= set(found[who])
        assert found[who]["trust"] == pytest.approx(
            found[who]["accuracy"] / 100 - found[who]["ece"], abs=0.05
        )
        price = found["cost"][who]
        assert min(price[part] for part in ("parameters", "multiply_adds", "latency_ms")) > 0
    assert {"agreement", "kl", "cka"} <= set(found["fidelity"])
    assert 0 < found["fidelity"]["cka"] <= 1
    student = limbeck.load_student(tmp_path / "run")
    recipe = config.load(tmp_path / "run" / "recipe.yaml")
    images = exporting.test_inputs(recipe, 450)
    with torch.no_grad():
        right = exporting.Answer(student)(images).argmax(1) == recipe.data.load().test.labels
    assert 100 * float(right.double().mean()) == pytest.approx(found["student"]["accuracy"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "linear CKA of what the classifiers" in page
