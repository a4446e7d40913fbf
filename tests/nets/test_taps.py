"""Features by path, and frozen networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from limbeck.errors import ShapeError
from limbeck.nets.taps import Frozen, Tapped, capture, resolve


def small() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(nn.Flatten(), body, nn.Linear(8, 6))


def test_paths_count_from_the_end() -> None:
    assert resolve(small(), "-1") == "2"
    assert resolve(small(), "1.-3") == "1.0"
    for path, hint in (("1.7", "1 holds 0, 1, 2"), ("1.-4", "1 holds"), ("bodi", "Sequential holds 0, 1, 2")):
        with pytest.raises(ShapeError, match=hint):
            resolve(small(), path)


def test_nearest_path_is_named(vit: Any) -> None:
    with pytest.raises(ShapeError, match=r"did you mean 'blocks\.\d'\? blocks holds 0, 1, 2"):
        resolve(vit(), "blocks.9")


def test_capture_leaves_no_hook() -> None:
    network, x = small().eval(), torch.rand(2, 1, 28, 28)
    with capture(network, ("1.-1", "-1")) as features:
        out = network(x)
    assert torch.equal(features["-1"], out) and features["1.-1"].shape == (2, 8)
    network(x + 1)
    assert torch.equal(features["-1"], out)
    assert not any(module._forward_hooks for module in network.modules())


def test_tapped_gives_outputs(batch: Any) -> None:
    said = Tapped(small())(batch(), taps=("1.0",))
    assert said.logits.shape == (4, 6) and said.features["1.0"].requires_grad
    with pytest.raises(ShapeError, match=r"gave shape \[4, 28, 28\] but must give logits"):
        Tapped(nn.Flatten(0, 1))(batch())
    with pytest.raises(ShapeError, match="tap 'body' gives a tuple"):
        module = nn.Module()
        module.body = nn.LSTM(28, 4)
        module.forward = lambda x: module.body(x[:, 0])[0][:, 0]  # type: ignore[method-assign]
        Tapped(module)(batch(), taps=("body",))


def test_frozen_stays_frozen(batch: Any) -> None:
    teacher = Frozen(Tapped(small()))
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    said = teacher.train()(batch(), taps=("1.-1",))
    assert not said.logits.requires_grad and not said.features["1.-1"].requires_grad
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.constant
