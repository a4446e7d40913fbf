"""What must be true of DHO: labels and teacher have a head each, and their probabilities are mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.battery.networks import IMAGES, SPEC, batch, seeded
from torch import Tensor

from limbeck import api, config, losses
from limbeck.contracts import Batch, Net, Outputs, Progress
from limbeck.errors import CheckpointError, ConfigError, NonFiniteError, ShapeError
from limbeck.metrics import cost
from limbeck.metrics.conflict import gradient_conflict
from limbeck.nets.two_heads import CE_WEIGHTS, TEMPERATURES, mixed_log_probs, search_mix, tip_adapter_logits
from limbeck.objectives.dho import DHO
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.students.dual_head import DualHead
from limbeck.students.mlp import MLPStudent
from limbeck.teachers.trained import Trained

KNOWN = torch.tensor([True, True, False, False, False])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def seen(known: Tensor = KNOWN) -> Batch:
    return replace(batch(count=len(known)), labelled=known)


def student(**fields: Any) -> Net:
    return DualHead(network=MLPStudent(hidden=(8,), images=IMAGES), **fields).build(SPEC, seeded())


def heads(seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw(seed, 5, 6).requires_grad_(), draw(seed + 1, 5, 6).requires_grad_()


def terms(student: Outputs, teacher: Tensor, known: Tensor = KNOWN, **fields: Any) -> dict[str, Tensor]:
    return DHO(**fields).terms(student, Outputs(teacher), seen(known), Progress())


def total(found: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(found.values())).sum()


@pytest.mark.parametrize(("balance", "silent", "heard"), [(1.0, 1, 0), (0.0, 0, 1)])
def test_a_head_whose_signal_has_no_share_gets_no_gradient(balance: float, silent: int, heard: int) -> None:
    both = heads()
    total(terms(Outputs(*both), draw(9, 5, 6), balance=balance)).backward()
    assert both[silent].grad.abs().max() == 0
    assert both[heard].grad.abs().max() > 0


def test_unlabelled_samples_never_touch_the_head_of_the_labels() -> None:
    ce, kd = heads()
    total(terms(Outputs(ce, kd), draw(9, 5, 6))).backward()
    assert ce.grad[~KNOWN].abs().max() == 0
    assert ce.grad[KNOWN].abs().min() > 0
    assert kd.grad.abs().min() > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.5, 8))
def test_one_head_gives_labels_and_kd(seed: int, balance: float, temperature: float) -> None:
    (one, _), teacher = heads(seed), draw(seed + 2, 5, 6)
    found = terms(Outputs(one, one), teacher, balance=balance, temperature=temperature)
    alone = terms(Outputs(one), teacher, balance=balance, temperature=temperature)
    kd = KD(weight=1 - balance, temperature=temperature)
    parts = [
        kd.terms(Outputs(one[rows]), Outputs(teacher[rows]), batch(), Progress())["kd"]
        for rows in (KNOWN, ~KNOWN)
    ]
    labels = Labels(weight=balance).terms(Outputs(one), Outputs(one), seen(), Progress())["labels"]
    torch.testing.assert_close(total(found), labels + sum(parts))
    assert all(torch.equal(found[name], alone[name]) for name in found)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = draw(9, 5, 6).requires_grad_()
    total(terms(Outputs(*heads()), teacher)).backward()
    assert teacher.grad is None


def test_labelled_and_unlabelled_samples_have_means_of_their_own() -> None:
    (ce, kd), teacher = heads(), draw(9, 5, 6)
    twice = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4])
    plain = total(terms(Outputs(ce, kd), teacher))
    again = total(terms(Outputs(ce[twice], kd[twice]), teacher[twice], KNOWN[twice]))
    torch.testing.assert_close(again, plain)
    moved = torch.tensor([True, True, True, False, False])
    assert not torch.isclose(
        *(
            total(terms(Outputs(ce, kd), teacher, known, balance=0.0)) for known in (KNOWN, moved)
        )  # the labels apart
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.25, 8))
def test_mixtures_are_distributions(seed: int, weight: float, temperature: float) -> None:
    ce, kd = draw(seed, 5, 6), draw(seed + 1, 5, 6)
    mixed = mixed_log_probs(ce, kd, weight, temperature)
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(5).double())
    torch.testing.assert_close(
        mixed.exp(), weight * ce.softmax(1) + (1 - weight) * (kd / temperature).softmax(1)
    )


def test_ends_of_the_mixture() -> None:
    ce, kd = draw(0, 5, 6), draw(1, 5, 6)
    torch.testing.assert_close(mixed_log_probs(ce, kd, 1.0, 3.0), ce.log_softmax(1))
    torch.testing.assert_close(mixed_log_probs(ce, kd, 0.0, 1.0), kd.log_softmax(1))
    flat = mixed_log_probs(ce, kd, 0.0, 1e9).exp()
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 6))
    assert torch.isfinite(mixed_log_probs(1e4 * ce, kd, 1.0, 1.0)).all()


def test_constants_added_to_a_samples_logits_change_nothing() -> None:
    (ce, kd), teacher, shift = heads(), draw(9, 5, 6), draw(10, 5, 1)
    plain = total(terms(Outputs(ce, kd), teacher))
    torch.testing.assert_close(total(terms(Outputs(ce + shift, kd - shift), teacher + 2 * shift)), plain)
    torch.testing.assert_close(
        mixed_log_probs(ce + shift, kd - shift, 0.3, 2.0), mixed_log_probs(ce, kd, 0.3, 2.0)
    )


def test_an_even_teacher_evens_the_student() -> None:
    ce, kd = heads()
    total(terms(Outputs(ce, kd), torch.zeros(5, 6).double())).backward()
    shares = (kd / 2).softmax(1)
    assert ((shares > 1 / 6) == (kd.grad > 0)).all()


def test_the_search_beats_its_corners_and_keeps_the_first_of_equals() -> None:
    ce, kd, labels = draw(0, 60, 6), draw(1, 60, 6), torch.arange(60) % 6
    accuracy, weight, temperature = search_mix(ce, kd, labels)
    corners = [100 * (logits.argmax(1) == labels).double().mean() for logits in (ce, kd)]
    assert accuracy >= max(corners)
    assert search_mix(ce, kd, labels) == (accuracy, weight, temperature)
    sure = torch.eye(6)[labels]
    assert search_mix(sure, sure, labels) == (100, CE_WEIGHTS[0], TEMPERATURES[0])
    assert search_mix(-sure, -sure, labels) == (0, 0, 1)


@pytest.mark.parametrize("known", [torch.ones(5).bool(), torch.zeros(5).bool()])
def test_an_empty_part_is_zero(known: Tensor) -> None:
    found = terms(Outputs(*heads()), draw(9, 5, 6), known)
    empty = ("unlabelled",) if known[0] else ("labels", "labelled")
    assert all((found[name] == 0) == (name in empty) for name in found)


def test_a_teacher_that_is_no_number_spoils_the_sum_in_sight() -> None:
    teacher = draw(9, 5, 6)
    teacher[4] = torch.nan
    found = terms(Outputs(*heads()), teacher)
    assert found["unlabelled"].isnan() and not found["labelled"].isnan()


def test_two_heads_conflict_less() -> None:
    features, ce, kd, same = draw(0, 8, 5).requires_grad_(), draw(1, 5, 6), draw(2, 5, 6), draw(3, 8, 6)
    labels = torch.arange(8) % 6
    loss = losses.cross_entropy(features @ ce, labels)
    soft = losses.kl_divergence(features @ kd, same)
    assert -1 <= gradient_conflict(features, loss, soft) <= 1
    assert gradient_conflict(features, loss, 3 * loss).item() == pytest.approx(1)
    assert gradient_conflict(features, loss, -loss).item() == pytest.approx(-1)


def test_both_heads_read_the_same_features_and_start_apart() -> None:
    net = student()
    out = net(batch())
    feature = net.inner.network.hidden(net.inner.network.flatten(batch().inputs))
    assert torch.equal(out.logits, net.inner.network.head(feature))
    assert torch.equal(out.soft, net.kd_head(feature))
    assert not torch.equal(net.kd_head.weight, net.inner.network.head.weight)


def test_tuning_is_kept_with_the_weights() -> None:
    net = student()
    outputs = [net(batch(count=30)).detach()]
    labels = outputs[0].soft.argmax(1)
    chosen = net.tune(outputs, labels)
    assert chosen == {"ce_weight": 0.0, "temperature": 0.5}
    net.tuned(chosen)
    again = student()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.predict(outputs[0]).argmax(1), labels)
    assert student(search=False).tune(outputs, labels) == {}


def test_heads_start_at_text_embeddings(tmp_path: Path) -> None:
    text = torch.randn(8, 6, generator=seeded(3))
    save_file({"text_weights": text}, tmp_path / "text.safetensors")
    net = student(text_weights=str(tmp_path / "text.safetensors"))
    out = net(batch())
    feature = net.inner.network.hidden(net.inner.network.flatten(batch().inputs))
    torch.testing.assert_close(out.logits, feature @ text)
    torch.testing.assert_close(out.soft, 100 * torch.nn.functional.normalize(feature, dim=1) @ text)
    save_file({"text_weights": text.mT.contiguous()}, tmp_path / "wide.safetensors")
    with pytest.raises(ShapeError, match="the width of text_weights"):
        student(text_weights=str(tmp_path / "wide.safetensors"))
    save_file({"weights": text}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="save the tensor text_weights"):
        student(text_weights=str(tmp_path / "other.safetensors"))


def test_a_cached_sample_speaks_for_its_class() -> None:
    text, features = torch.eye(4)[:, :2], torch.eye(4)
    keys, values = features[2:3], torch.tensor([[0.0, 1.0]])
    plain = tip_adapter_logits(features, text, keys, values, 0.0, 5.0)
    torch.testing.assert_close(plain, 100 * features @ text)
    told = tip_adapter_logits(features, text, keys, values, 3.0, 5.0) - plain
    assert told[2, 1] == 3 and told[0, 1] < 0.1 and told[:, 0].abs().max() == 0


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="balance is 2 but must lie in"):
        DHO(balance=2)
    with pytest.raises(ConfigError, match="ce_weight is -1"):
        student(ce_weight=-1)
    with pytest.raises(ConfigError, match="temperature is 0"):
        student(temperature=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


FEW = ("scenario.epochs=1", "scenario.teacher_epochs=1", "engine.threads=1")


@pytest.mark.usefixtures("quick")
def test_a_run_says_what_was_chosen_and_the_student_comes_back_with_it(tmp_path: Path) -> None:
    found = api.run(config.load("dho", FEW), out=tmp_path / "run", quiet=True).data
    assert found["tuned"]["ce_weight"] in CE_WEIGHTS and found["tuned"]["temperature"] in TEMPERATURES
    assert found["protocol"]["labelled_samples"] <= 40
    back = api.load_student(tmp_path / "run")
    assert back.ce_weight.item() == pytest.approx(found["tuned"]["ce_weight"])


@pytest.mark.usefixtures("quick")
def test_the_student_comes_back_without_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.run(config.load("dho", FEW), out=tmp_path / "run", quiet=True)

    def gone(*_: Any) -> Net:
        raise CheckpointError("the teacher is not there any more")

    monkeypatch.setattr(Trained, "build", gone)
    assert not api.load_student(tmp_path / "run").training


@pytest.mark.usefixtures("quick")
def test_a_run_names_the_sample_on_which_the_teacher_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses.dual_head
    monkeypatch.setattr(losses, "dual_head", lambda a, b, t, *rest, **kw: plain(a, b, t / 0, *rest, **kw))
    with pytest.raises(NonFiniteError, match=r"dho\.labelled"):
        api.run(config.load("dho", FEW), out=tmp_path / "run", quiet=True)
