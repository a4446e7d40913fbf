"""What must be true of a student whose sub-networks all learn."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests.battery.networks import LLAMA, SPACE, TEXT, batch, seeded
from torch import nn

from limbeck.contracts import Net, Outputs, Progress
from limbeck.engine.distillation import Distillation
from limbeck.engine.guards import check_orphans
from limbeck.errors import ConfigError
from limbeck.metrics.cost import parameters
from limbeck.nets.search_space import SearchSpace
from limbeck.objectives.relations import Relations
from limbeck.students.llama import LlamaStudent
from limbeck.students.supernet import Place, SupernetLM, SupernetStudent

SMALL, LARGE = SearchSpace((1,), (6, 8), (1.0, 2.0), (1,)), SearchSpace((1, 2), (10, 12), (2.0,), (1, 2))
TWO = SupernetStudent(spaces=(SMALL, LARGE))


def teacher() -> Net:
    return LLAMA.build(TEXT, seeded(9))


def student(choice: SupernetStudent = TWO, seed: int = 0) -> SupernetLM:
    net = choice.build(TEXT, seeded(seed))
    net.attach_teacher(teacher())
    assert isinstance(net, SupernetLM)
    return net


def states(net: SupernetLM) -> list[dict[str, torch.Tensor]]:
    """The weights of each super network."""
    return [supernet.network.state_dict() for supernet in net._supernets]


def step(net: SupernetLM, at: int = 0) -> dict[str, Place]:
    net.start_step(Progress(step=at, steps=100))
    return net.learning


def test_it_starts_as_the_teacher() -> None:
    net, other = student(), teacher()
    given = batch(net)
    (taught,) = [part for part in other.modules() if hasattr(part, "unembedding")]
    for supernet in net._supernets:
        with torch.no_grad():
            found = supernet(given.inputs).logits
            assert torch.equal(found, taught.network(given.inputs).logits)


def test_it_takes_over_what_the_teacher_learnt_meanwhile() -> None:
    net, other = TWO.build(TEXT, seeded()), teacher()
    net.attach_teacher(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    net.prepare(None)  # type: ignore[arg-type]  # it looks at no data
    wanted = dict(other.network.state_dict())
    for state in states(net):
        assert all(torch.equal(state[name], value) for name, value in wanted.items())
    with torch.no_grad():
        other.network.model.norm.weight.zero_()
    assert all((state["model.norm.weight"] != 0).all() for state in states(net)), (
        "copies, not the teacher's own"
    )


def test_every_step_has_both_ends_and_distinct_others_of_each_space() -> None:
    net = student()
    for at in range(20):
        drawn = step(net, at)
        for number, space in enumerate(TWO.spaces):
            own = {name: place for name, place in drawn.items() if place.space == number}
            assert own[f"space{number}.largest"].architecture == space.largest
            assert own[f"space{number}.smallest"].architecture == space.smallest
            assert len(set(own.values())) == len(own) == 4
    assert next(iter(drawn)) == "space1.largest"


def test_draws_are_of_the_step_and_the_seed_alone() -> None:
    one, other = student(), student()
    for at in (5, 3, 5):
        assert step(one, at) == step(other, at)
    again = [tuple(step(one, at).values()) for at in range(12)]
    assert any(a != b for a, b in pairwise(again))
    assert again != [tuple(step(student(seed=1), at).values()) for at in range(12)]


def test_steps_without_ends_reach_every_sub_network() -> None:
    net = student(SupernetStudent(spaces=(SPACE,), ends=False))
    seen = [step(net, at).values() for at in range(60)]
    assert all(len(set(drawn)) == 4 for drawn in seen)
    assert {place for drawn in seen for place in drawn} == set(net.candidates())
    assert any(SPACE.largest not in {p.architecture for p in drawn} for drawn in seen)


def test_a_space_of_one_learns_alone() -> None:
    net = student(SupernetStudent(spaces=(SearchSpace((2,), (8,), (2.0,), (1,)),)))
    assert list(step(net)) == ["space0.largest"]
    assert net.train()(batch(net)).subnets == {}


def test_while_it_learns_it_answers_as_all_and_afterwards_as_the_chosen() -> None:
    net = student()
    step(net, 4)
    outputs = net.train()(batch(net))
    said = {next(iter(net.learning)): outputs, **outputs.subnets}
    assert said.keys() == net.learning.keys()
    for name, place in net.learning.items():
        assert torch.equal(said[name].logits, net.within(place, batch(net)).logits)
    for place in net.candidates():
        net.chosen = place
        assert torch.equal(net.eval()(batch(net)).logits, net.within(place, batch(net)).logits)


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_cut_out_is_the_sub_network(number: int) -> None:
    net = student().eval()
    for place in [p for p in net.candidates() if p.space == number]:
        small = net.cut_out(place)
        assert parameters(small) == net.parameters_of(place)
        own = small.eval()(batch(net))
        torch.testing.assert_close(own.logits, net.within(place, batch(net)).logits, rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(small(batch(net)).logits, own.logits), "weights of its own"


def test_gradients_of_a_sub_network_touch_its_own_super_network_and_slice() -> None:
    net = student()
    place = Place(0, SMALL.smallest)
    net.within(place, batch(net)).logits.square().sum().backward()
    assert all(p.grad is None for p in net._supernets[1].network.parameters())
    grads = [p.grad for p in net._supernets[0].network.parameters() if p.grad is not None]
    assert 0 < sum(int((g != 0).sum()) for g in grads) <= net.parameters_of(place)


class Heard(nn.Module):
    """An objective that counts what it hears."""

    def forward(
        self, student: Outputs, teacher: Outputs, batch: object, at: Progress
    ) -> dict[str, torch.Tensor]:
        return {"heard": student.logits.square().mean()}


def test_a_step_sums_what_the_objective_says_of_each_sub_network() -> None:
    net = student()
    module = Distillation(net, {"heard": Heard()}, Relations().needs())
    net.projects = True
    terms = module.train()(batch(net), Progress(step=3))
    names = [name for name in net.learning if name != "space1.largest"]
    assert set(terms) == {"heard", *(f"{name}.heard" for name in names)}
    for name, place in net.learning.items():
        key = "heard" if name == "space1.largest" else f"{name}.heard"
        assert float(terms[key].detach()) == pytest.approx(
            float(net.within(place, batch(net)).logits.detach().square().mean())
        )


def test_what_a_step_passes_over_is_no_orphan() -> None:
    net = student()
    optimizer = torch.optim.Adam(net.parameters())
    net.within(Place(0, SMALL.smallest), batch(net)).logits.sum().backward()
    check_orphans(nn.ModuleDict({"student": net}), optimizer)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (SearchSpace((1, 3), (8,), (2.0,), (1,)), "layers is 3 but must be from 1 to the 2 there are"),
        (SearchSpace((1,), (8, 16), (2.0,), (1,)), "hidden is 16 but must be from 1 to the network's 12"),
        (SearchSpace((1,), (8,), (2.0, 8.0), (1,)), "ffn is 64 but must be from 1 to the network's 32"),
        (SearchSpace((1,), (8,), (2.0,), (1, 3)), "heads is 3 but must be from 1 to the network's 2"),
    ],
)
def test_sub_networks_that_the_teacher_does_not_hold(space: SearchSpace, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student(SupernetStudent(spaces=(space,)))


def test_heads_that_split_a_group_of_queries() -> None:
    net = SupernetStudent(spaces=(SearchSpace((1,), (16,), (2.0,), (3,)),)).build(TEXT, seeded())
    with pytest.raises(ConfigError, match="heads is 3 but the network's queries come in groups of 2"):
        net.attach_teacher(LlamaStudent(layers=1, width=32, heads=4, kv_heads=2).build(TEXT, seeded()))


def test_fields_out_of_range() -> None:
    with pytest.raises(ConfigError, match="spaces is empty: name at least one"):
        SupernetStudent(spaces=())
    with pytest.raises(ConfigError, match="others is -1: allowed are values of at least 0"):
        SupernetStudent(spaces=(SPACE,), others=-1)


def test_what_is_used_is_the_sub_network_that_it_answers_as() -> None:
    net = student().eval()
    net.chosen = Place(0, SMALL.smallest)
    given = batch(net)
    torch.testing.assert_close(net.deployed()(given).logits, net(given).logits)
    assert parameters(net.deployed()) == net.parameters_of(net.chosen)


def test_a_teacher_that_is_no_language_model() -> None:
    with pytest.raises(
        ConfigError, match="the teacher holds 0 language models but the student is to be made"
    ):
        TWO.build(TEXT, seeded()).attach_teacher(Net())
