"""Several teachers as one: mixtures, routing, members that learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.battery.networks import IMAGES, SPEC, batch, seeded

from limbeck import api, config
from limbeck.contracts import Net, Outputs
from limbeck.engine.capture import outputs_of, rows_of
from limbeck.errors import ConfigError, ShapeError
from limbeck.metrics import cost
from limbeck.nets.backbones import InputSpec
from limbeck.scenarios.pair import Pair
from limbeck.students.mlp import MLPStudent
from limbeck.teachers.dfpt import DFPT
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.trained import Trained
from limbeck.teachers.untrained import Untrained


def member(width: int = 8, **fields: Any) -> Trained:
    return Trained(network=MLPStudent(hidden=(width,), images=IMAGES), **fields)


def built(*members: Any, **fields: Any) -> Net:
    return Ensemble(members=members or (member(8), member(16)), **fields).build(SPEC, seeded())


def answers(net: Net) -> torch.Tensor:
    """Probabilities [M, B, C] of the members."""
    return torch.stack([one(batch()).logits.softmax(1) for one in net.members])


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_probabilities_are_mixed_not_logits(weights: tuple[float, ...] | None) -> None:
    net = built(weights=weights).eval()
    shares = torch.tensor(weights or (1.0, 1.0))
    mixed = torch.einsum("m,mbc->bc", shares / shares.sum(), answers(net))
    torch.testing.assert_close(net(batch()).logits.exp(), mixed)


def test_the_surest_member_answers() -> None:
    net = built(route="confident").eval()
    each = answers(net)
    surest = each.amax(2).argmax(0)
    assert 0 < surest.sum() < 5, "both members are asked"
    torch.testing.assert_close(net(batch()).logits.exp(), each[surest, torch.arange(5)])
    heavy = built(route="confident", weights=(1.0, 1e6)).eval()
    torch.testing.assert_close(heavy(batch()).logits.exp(), answers(heavy)[1])


def test_members_speak_for_themselves_also_from_a_cache() -> None:
    net = built().eval()
    out = net(batch(), taps=("0.hidden.0", "1.hidden.-1")).detach()
    for number, own in enumerate(answers(net)):
        torch.testing.assert_close(out.along(str(number)).logits.exp(), own)
    assert out.features["0.hidden.0"].shape == (5, 8) and out.features["1.hidden.-1"].shape == (5, 16)
    back = outputs_of(rows_of(out))
    assert torch.equal(back.along("1").logits, out.along("1").logits)
    with pytest.raises(ShapeError, match="begin it with a member's number, 0 to 1"):
        net(batch(), taps=("hidden.0",))


def test_each_member_learns_the_labels_by_itself() -> None:
    net = built(member(8), Untrained(network=MLPStudent(hidden=(8,), images=IMAGES)), member(16)).train()
    out = net(batch())
    assert list(out.losses) == ["member0", "member2"]
    assert not out.logits.requires_grad
    alone = torch.nn.functional.cross_entropy(net.members[2](batch()).logits, batch().labels)
    torch.testing.assert_close(out.losses["member2"], alone)
    out.losses["member2"].backward()
    assert all(p.grad is None for p in net.members[0].parameters())


def test_members_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="an ensemble needs at least 2"):
        Ensemble(members=(member(),))
    with pytest.raises(ConfigError, match="weights has 1 numbers but there are 2 members"):
        Ensemble(members=(member(), member()), weights=(1.0,))
    with pytest.raises(ConfigError, match="allowed are finite values above 0"):
        Ensemble(members=(member(), member()), weights=(1.0, 0.0))
    with pytest.raises(ConfigError, match="members learn from different data"):
        Ensemble(members=(member(data=1), member(data=2))).lessons()
    with pytest.raises(ConfigError, match="a dfpt teacher stands inside another teacher"):
        built(member(), DFPT(teacher=member(), stages=("hidden.0",), after_last=True))
    other = Trained(network=MLPStudent(images=InputSpec(channels=3, size=8, mean=(0.5,) * 3, std=(0.5,) * 3)))
    with pytest.raises(ConfigError, match="take members for one kind of image"):
        Ensemble(members=(member(), other)).input_spec()


def test_members_that_learn_nothing_have_no_say_in_the_data() -> None:
    still = Untrained(network=MLPStudent(hidden=(8,), images=IMAGES))
    mixed, resting = Ensemble(members=(still, member(data=1))), Ensemble(members=(still, still))
    assert mixed.lessons() == 1 and mixed.learns
    assert resting.lessons() is None and not resting.learns


def test_in_a_stream_the_members_answer_in_its_order_too() -> None:
    pair = object.__new__(Pair)
    pair.order = torch.tensor([2, 0, 1])
    logits = torch.arange(6.0).reshape(2, 3)
    found = pair._in_order(Outputs(logits, paths={"0": Outputs(logits + 6)}))
    assert torch.equal(found.logits, logits[:, [2, 0, 1]])
    assert torch.equal(found.along("0").logits, logits[:, [2, 0, 1]] + 6)


def test_a_run_measures_the_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    few = ("scenario.epochs=2", "scenario.teacher_epochs=2", "engine.threads=1")
    found = api.run(config.load("ensemble", few), out=tmp_path / "run", quiet=True).data
    assert set(found["paths"]) == {"0", "1", "2"}
    assert found["teacher"]["accuracy"] > 30
    asked = config.load("ensemble", (*few, "objective=[{name: kd, path: '1'}]"))
    one = api.run(asked, out=tmp_path / "one", quiet=True).data
    assert one["teacher"]["accuracy"] == found["teacher"]["accuracy"]
    assert one["student"]["nll"] != found["student"]["nll"]
