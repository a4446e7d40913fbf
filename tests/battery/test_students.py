"""What every student must keep: a new file in ``students/`` is tested at once."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.battery.networks import IMAGES, batch, build, classes, example, ordered, reads_text, seeded

from limbeck import config, registry
from limbeck.contracts import Net
from limbeck.engine.optim import Optim, trainable_groups
from limbeck.engine.state import constant_prefixes, load_variable_state, variable_state

pytestmark = pytest.mark.parametrize("name", registry.names("students"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def choice(name: str, folder: Path) -> Any:
    return example("students", name, folder)


@pytest.fixture
def net(choice: Any) -> Net:
    return build(choice)


def test_input_format_is_told_without_building(choice: Any) -> None:
    found = choice.input_spec().channels, choice.input_spec().size
    assert found == ((0, 0) if reads_text(type(choice)) else (IMAGES.channels, IMAGES.size))


def test_outputs_are_finite_and_of_the_right_shape(net: Net) -> None:
    given, count = batch(net), classes(net)
    for mode in (True, False):
        outputs = net.train(mode)(given)
        assert outputs.logits.shape == (len(given.labels), count)
        assert len(outputs.soft) == len(given.labels)
        assert outputs.soft.shape[1] % count == 0  # a class may have parts
        assert torch.isfinite(outputs.logits).all() and torch.isfinite(outputs.soft).all()
        assert all(loss.shape == () and torch.isfinite(loss) for loss in outputs.losses.values())
        assert net.predict(outputs).shape == (len(given.labels), count)


def test_answers_do_not_depend_on_the_other_samples(net: Net) -> None:
    net.eval()
    whole = net.predict(net(batch(net)))
    part, places = ordered(batch(net), torch.tensor([3, 1, 4]))
    torch.testing.assert_close(net.predict(net(part)), whole[places])


def test_evaluation_has_no_chance_and_moves_nothing(net: Net) -> None:
    net.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert torch.equal(net(batch(net)).logits, net(batch(net)).logits)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_pickled_copy_answers_alike(net: Net) -> None:
    copy, given = pickle.loads(pickle.dumps(net.eval())), batch(net)  # noqa: S301  # our own
    assert torch.equal(copy(given).logits, net(given).logits)


def test_gradient_reaches_all_that_learns_and_nothing_else(net: Net) -> None:
    if not any(p.requires_grad for p in net.parameters()):
        pytest.skip("nothing in it learns by gradient")
    outputs = net.train()(batch(net))
    sum([outputs.logits.square().sum(), outputs.soft.square().sum(), *outputs.losses.values()]).backward()
    for key, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_one_optimiser_step_moves_all_that_learns_and_no_constant_part(net: Net) -> None:
    if not any(p.requires_grad for p in net.parameters()):
        pytest.skip("nothing in it learns by gradient")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = Optim(name="sgd", lr=0.5, momentum=0).build(trainable_groups(torch.nn.ModuleDict({"s": net})))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}
    outputs = net.train()(batch(net))
    (outputs.logits.square().sum() + outputs.soft.square().sum()).backward()
    optimizer.step()
    skip = constant_prefixes(net)
    for key, value in net.state_dict().items():
        assert not key.startswith(skip) or torch.equal(before[key], value)
    assert not torch.equal(before[head := list(before)[-1]], net.state_dict()[head])


def test_bf16(net: Net) -> None:
    exact = net.eval()(batch(net)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(batch(net)).logits
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_the_same_generator_builds_the_same(choice: Any) -> None:
    torch.manual_seed(1)
    first = build(choice, 3).state_dict()
    torch.manual_seed(2)
    second = build(choice, 3).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_building_leaves_torchs_own_chance_alone(choice: Any) -> None:
    before = torch.get_rng_state()
    build(choice)
    assert torch.equal(before, torch.get_rng_state())


def test_saved_and_loaded_between_tasks(choice: Any) -> None:
    net, other = build(choice, 0), build(choice, 1)
    net.start_task(1, seeded(5))
    net.finish_task()
    load_variable_state(other, variable_state(net))
    assert torch.equal(net.eval()(batch(net)).logits, other.eval()(batch(net)).logits)


def test_constant_parts_stay_in_evaluation_mode(net: Net) -> None:
    net.train()
    for part in net.modules():
        if getattr(part, "constant", False):
            assert not any(module.training for module in part.modules())
            assert not any(p.requires_grad for p in part.parameters())


def test_the_query_is_frozen_and_has_the_width_it_says(net: Net) -> None:
    if net.query_dim is None:
        pytest.skip("it asks for no query")
    query = net.query(batch(net).inputs)
    assert query.shape == (5, net.query_dim)
    assert not query.requires_grad
    net.eval()
    own = net(batch(net)).logits
    assert torch.equal(net(dataclasses.replace(batch(net), query=query)).logits, own)


def test_fields_are_the_whole_configuration(choice: Any, name: str) -> None:
    plain = config.plain_value(choice, "student")
    assert plain.pop("name") == name
    assert config.make(type(choice), plain, "student") == choice
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.share = 2


def test_docstring_is_complete(choice: Any) -> None:
    text = inspect.getdoc(type(choice)) or ""
    assert text.splitlines()[0].endswith(".")
    assert [f.name for f in dataclasses.fields(choice) if f"{f.name}:" not in text] == []
