"""Outputs of inner modules replaced while a network runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import ShapeError
from limbeck.nets.edited import edited
from limbeck.nets.taps import capture


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)


def test_the_rest_of_the_network_reads_the_edited_output() -> None:
    net, x = network(), torch.randn(5, 3)
    with edited(net, {"1": lambda h: 2 * h + 1}):
        got = net(x)
    assert torch.equal(got, net[2](2 * net[:2](x) + 1))


def test_outside_the_context_nothing_is_edited() -> None:
    net, x = network(), torch.randn(5, 3)
    before = net(x)
    with pytest.raises(RuntimeError, match="stop"), edited(net, {"0": torch.zeros_like}):
        raise RuntimeError("stop")
    assert torch.equal(net(x), before)


def test_gradients_pass_through_frozen_parts_to_what_edits() -> None:
    net, shift = network(), torch.zeros(4, requires_grad=True)
    with edited(net, {"0": lambda h: h + shift}):
        net(torch.randn(5, 3)).sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_taps_inside_the_context_see_the_edited_output() -> None:
    net, x = network(), torch.randn(5, 3)
    with capture(net, ["-2"]) as own, edited(net, {"-2": torch.zeros_like}), capture(net, ["-2"]) as seen:
        net(x)
    assert torch.equal(seen["-2"], torch.zeros(5, 4))
    assert torch.equal(own["-2"], net[:2](x))


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(ShapeError, match="no tap '7' in Sequential"), edited(network(), {"7": torch.relu}):
        pass


def test_an_output_that_is_no_tensor() -> None:
    net = nn.Sequential(nn.LSTM(3, 3))
    with edited(net, {"0": torch.relu}), pytest.raises(ShapeError, match="'0' gives a tuple, not one tensor"):
        net(torch.randn(1, 2, 3))
