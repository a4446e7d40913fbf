"""What every selector must keep: a new file in ``selectors/`` is tested at once."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import config, registry
from limbeck.contracts import Batch, Outputs, Progress

INDEX = torch.arange(100, 140)
LABELS = INDEX % 4

pytestmark = pytest.mark.parametrize("name", registry.names("selectors"))


@pytest.fixture
def choice(name: str) -> Any:
    return registry.get("selectors", name)()


def chosen(choice: Any, epoch: int, seed: int = 0) -> Tensor:
    found: Tensor = choice.indices(INDEX, LABELS, epoch, torch.Generator().manual_seed(seed))
    return found


def weights(choice: Any, order: Tensor) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    own, other = (torch.randn(6, 4, generator=generator) for _ in range(2))
    batch = Batch(inputs=torch.zeros(6, 1), labels=LABELS[:6][order], index=order, view=0 * order)
    found: Tensor | None = choice.weights(
        batch, Outputs(logits=own[order]), Outputs(logits=other[order]), Progress(step=3, steps=9, epoch=1)
    )
    return found


def test_chosen_samples_are_a_part_of_the_data_each_once(choice: Any) -> None:
    for epoch in range(3):
        found = chosen(choice, epoch)
        assert set(found.tolist()) <= set(INDEX.tolist())
        assert len(found.unique()) == len(found) > 0


def test_every_epoch_has_as_many_steps(choice: Any) -> None:
    """The schedule of a run is planned from its first epoch."""
    assert len({len(chosen(choice, epoch, seed)) for epoch in range(4) for seed in range(3)}) == 1


def test_a_choice_depends_on_what_it_is_given_alone(choice: Any) -> None:
    torch.manual_seed(1)
    first = chosen(choice, 2)
    torch.manual_seed(2)
    assert torch.equal(first, chosen(choice, 2))


def test_weights_are_fair_shares(choice: Any) -> None:
    found = weights(choice, torch.arange(6))
    if found is not None:
        assert found.shape == (6,)
        assert not found.requires_grad
        assert (found >= 0).all()
        assert found.sum().item() == pytest.approx(6)


def test_weights_follow_the_order_of_the_batch(choice: Any) -> None:
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    found, turned = weights(choice, torch.arange(6)), weights(choice, order)
    if found is not None and turned is not None:
        torch.testing.assert_close(turned, found[order])


def test_fields_are_the_whole_configuration(choice: Any, name: str) -> None:
    plain = config.plain_value(choice, "selector")
    assert plain.pop("name") == name
    assert config.make(type(choice), plain, "selector") == choice
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.fraction = 2


def test_docstring_is_complete(choice: Any) -> None:
    text = inspect.getdoc(type(choice)) or ""
    assert text.splitlines()[0].endswith(".")
    assert [f.name for f in dataclasses.fields(choice) if f"{f.name}:" not in text] == []
