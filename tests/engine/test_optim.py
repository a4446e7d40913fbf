from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from limbeck.contracts import Progress
from limbeck.engine.optim import Optim, coda_cosine, trainable_groups
from limbeck.errors import ConfigError


def rates(optim: Optim, epochs: int = 5, per_epoch: int = 4) -> list[float]:
    """The rate of every step."""
    steps = epochs * per_epoch
    return [
        optim.rate(Progress(step=step, steps=steps, epoch=step // per_epoch, epochs=epochs))
        for step in range(steps)
    ]


def test_constant() -> None:
    assert rates(Optim(lr=0.3, schedule="constant")) == [0.3] * 20


def test_cosine_falls_from_the_base_to_nearly_nothing() -> None:
    found = rates(Optim(lr=0.2, schedule="cosine"))
    assert found[0] == 0.2
    assert found[10] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.1 * (1 + math.cos(math.pi * 19 / 20)))
    assert found == sorted(found, reverse=True)


def test_coda_runs_its_first_two_epochs_at_the_base_rate() -> None:
    found = rates(Optim(lr=0.2, schedule="coda"))[::4]
    assert found[:2] == [0.2, 0.2]
    assert found[2:] == [pytest.approx(0.2 * math.cos(99 * math.pi * e / 800)) for e in (1, 2, 3)]
    assert coda_cosine(0.2, 0, 1) == 0.2


def test_steps_of_multistep() -> None:
    found = rates(Optim(lr=1.0, schedule="multistep", milestones=(0.4, 0.8), gamma=0.1))[::4]
    assert found == [pytest.approx(x) for x in (1, 1, 0.1, 0.1, 0.01)]


@given(st.sampled_from(["constant", "cosine", "coda", "multistep"]), st.floats(0, 0.9), st.integers(1, 6))
def test_rates_are_positive_and_never_above_the_base(schedule: str, warmup: float, epochs: int) -> None:
    optim = Optim(lr=0.5, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    found = rates(optim, epochs)
    assert all(0 < rate <= 0.5 for rate in found)


def test_warm_up_rises_in_a_line() -> None:
    found = rates(Optim(lr=1.0, schedule="cosine", warmup=0.2))
    assert found[:5] == [pytest.approx(x) for x in (0.2, 0.4, 0.6, 0.8, 1.0)]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(2, 2)
        self.quick = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, object]]:
        return [{"params": [*self.slow.parameters(), *self.frozen.parameters()], "lr_scale": 0.1}]


def test_each_group_learns_at_its_own_scale() -> None:
    module = nn.ModuleDict({"student": Grouped(), "adapter": nn.Linear(2, 2)})
    groups = trainable_groups(module)
    slow = {id(p) for p in module["student"].slow.parameters()}
    assert [len(group["params"]) for group in groups] == [2, 4]
    assert {id(p) for p in groups[0]["params"]} == slow
    optim = Optim(lr=0.5, schedule="constant")
    optimizer = optim.build(groups)
    assert optim.set_rate(optimizer, Progress()) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.05), 0.5]


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimisers_take_their_fields(name: str, kind: type) -> None:
    optim = Optim(name=name, weight_decay=0.1, betas=(0.5, 0.6), momentum=0.7)  # type: ignore[arg-type]
    built = optim.build(trainable_groups(nn.Linear(2, 2)))
    assert type(built) is kind
    assert built.defaults["weight_decay"] == 0.1
    assert built.defaults.get("betas", (0.5, 0.6)) == (0.5, 0.6)
    assert built.defaults.get("momentum", 0.7) == 0.7


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("lr", math.nan), ("weight_decay", -1.0), ("warmup", 1.0)]
)
def test_wrong_values_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is .*: allowed are"):
        Optim(**{field: value})
