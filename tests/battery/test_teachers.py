"""What every teacher must keep: a new file in ``teachers/`` is tested at once."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.battery import networks
from tests.battery.networks import IMAGES, SPEC, batch, build, classes, example, ordered, seeded

from limbeck import config, registry
from limbeck.contracts import Net, Outputs
from limbeck.engine.capture import outputs_of, rows_of, token_outputs, token_rows
from limbeck.engine.state import load_variable_state, variable_state
from limbeck.errors import ConfigError

TEACHERS = [name for name in registry.names("teachers") if name != "none"]
every = pytest.mark.parametrize("name", TEACHERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def choice(name: str, folder: Path) -> Any:
    return example("teachers", name, folder)


@pytest.fixture
def net(choice: Any) -> Net:
    return build(choice)


def said(net: Net, taps: tuple[str, ...] = ()) -> Outputs:
    with torch.no_grad():
        outputs: Outputs = net.eval()(batch(net), taps=taps)
    return outputs


def test_no_teacher_builds_nothing() -> None:
    with pytest.raises(ConfigError, match="teacher is none, so there is nothing to ask: name a teacher"):
        registry.get("teachers", "none")().build(SPEC, seeded())


@every
def test_input_format_is_told_without_building(choice: Any) -> None:
    found = choice.input_spec().channels, choice.input_spec().size
    assert found == ((0, 0) if networks.reads_text(type(choice)) else (IMAGES.channels, IMAGES.size))


@every
def test_outputs_are_finite_and_of_the_right_shape(net: Net) -> None:
    outputs = said(net)
    assert outputs.logits.shape == (len(batch(net).labels), classes(net))
    assert torch.isfinite(outputs.logits).all()


@every
def test_answers_do_not_depend_on_the_other_samples(net: Net) -> None:
    part, places = ordered(batch(net), torch.tensor([3, 1, 4]))
    torch.testing.assert_close(net.eval()(part).logits, said(net).logits[places])


@every
def test_asking_changes_nothing(net: Net) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert torch.equal(said(net).logits, said(net).logits)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@every
def test_a_pickled_copy_answers_alike(net: Net) -> None:
    copy, given = pickle.loads(pickle.dumps(net.eval())), batch(net)  # noqa: S301  # our own
    assert torch.equal(copy(given).logits, net(given).logits)


@every
def test_what_does_not_learn_stays_in_evaluation_mode(net: Net) -> None:
    """Whatever calls ``train()``: a part without a learning parameter has no noise and moves no buffer."""
    net.train()
    learns = any(p.requires_grad for p in net.parameters())
    for part in [net, *net.modules()]:
        frozen = getattr(part, "constant", False) or not learns
        if frozen and part is not net:
            assert not part.training


@every
def test_cached_outputs_cannot_be_told_from_live_ones(net: Net) -> None:
    taps = ("blocks.-1",) if hasattr(net, "backbone") else ()
    taps = ("model.layers.-1",) if networks.has_layers(net) else taps
    live, given = said(net, taps), batch(net)
    if live.unembedding is None:
        back = outputs_of(rows_of(live))
    else:
        back = token_outputs(token_rows(live, given), given, live.unembedding, project=True)
    assert torch.equal(back.logits, live.logits)
    assert back.features.keys() == live.features.keys()
    assert all(torch.equal(back.features[tap], live.features[tap]) for tap in live.features)


@every
def test_bf16(net: Net) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = said(net).logits
    torch.testing.assert_close(half.float(), said(net).logits, rtol=0.1, atol=0.1)


@every
def test_the_same_generator_builds_the_same(choice: Any) -> None:
    torch.manual_seed(1)
    first = build(choice, 3).state_dict()
    torch.manual_seed(2)
    second = build(choice, 3).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every
def test_saved_and_loaded_between_tasks(choice: Any) -> None:
    net, other = build(choice, 0), build(choice, 0)
    net.start_task(1, seeded(5))
    net.finish_task()
    load_variable_state(other, variable_state(net))
    assert torch.equal(said(net).logits, said(other).logits)


@every
def test_fields_are_the_whole_configuration(choice: Any, name: str) -> None:
    plain = config.plain_value(choice, "teacher")
    assert plain.pop("name") == name
    assert config.make(type(choice), plain, "teacher") == choice
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.weights = "other"


@pytest.mark.parametrize("name", registry.names("teachers"))
def test_docstring_is_complete(name: str) -> None:
    cls = registry.get("teachers", name)
    text = inspect.getdoc(cls) or ""
    assert text.splitlines()[0].endswith(".")
    assert [f.name for f in dataclasses.fields(cls) if f"{f.name}:" not in text] == []
