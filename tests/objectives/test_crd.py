"""What must be true of contrastive representation distillation: memory, negatives, constants, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small
from torch import Tensor

from limbeck import api, config
from limbeck.contracts import Batch, Facts, Outputs, Progress
from limbeck.engine.run import Run
from limbeck.errors import ConfigError, GuardError, ShapeError
from limbeck.metrics import cost
from limbeck.objectives.crd import CRD

SAMPLES, CLASSES = 40, 4
LABELS = torch.arange(SAMPLES) % CLASSES
FIELDS: dict[str, Any] = {"negatives": 16, "width": 8, "student_tap": "f", "teacher_tap": "f"}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module_of(index: Tensor | None = None, labels: Tensor = LABELS, seed: int = 3, **fields: Any) -> Any:
    torch.manual_seed(0)
    own, other = tapped(draw(0, 4, 5)), tapped(draw(1, 4, 6))
    module: Any = CRD(**FIELDS | fields).build(own, other, Facts(samples=SAMPLES, seed=seed))
    module.start(torch.arange(SAMPLES) if index is None else index, labels, torch.Generator())
    return module


def tapped(feature: Tensor) -> Outputs:
    return Outputs(logits=torch.zeros(len(feature), CLASSES), features={"f": feature})


def batch_of(index: Tensor, **fields: Any) -> Batch:
    return Batch(inputs=index, labels=LABELS[index], index=index, view=0 * index, **fields)


def step(module: Any, index: Tensor, number: int = 0, seed: int = 5) -> Tensor:
    own, other = tapped(draw(seed, len(index), 5)), tapped(draw(seed + 1, len(index), 6))
    (loss,) = module(own, other, batch_of(index), Progress(step=number)).values()
    return loss


INDEX = torch.tensor([7, 2, 30, 11])


def test_rows_of_the_batch_are_remembered_and_no_others() -> None:
    module = module_of()
    before = {name: getattr(module, name).clone() for name in ("student_memory", "teacher_memory")}
    step(module, INDEX)
    for name, old in before.items():
        new = getattr(module, name)
        changed = (new != old).any(1)
        assert changed.nonzero().flatten().tolist() == sorted(INDEX.tolist())
        torch.testing.assert_close(new[INDEX].norm(dim=1), torch.ones(4))


def test_the_memory_starts_at_about_length_one() -> None:
    memory = module_of(width=512).student_memory
    assert not torch.equal(memory, module_of(width=512, seed=4).student_memory)
    assert memory.abs().max() <= (3 / 512) ** 0.5
    assert memory.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)


def test_no_gradient_reaches_the_memory_and_all_reaches_the_embeddings() -> None:
    module = module_of()
    step(module, INDEX).backward()
    assert not any(buffer.requires_grad for buffer in module.buffers())
    assert {name for name, _ in module.named_parameters()} == {
        "embed_student.weight", "embed_student.bias", "embed_teacher.weight", "embed_teacher.bias",
    }  # fmt: skip
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_the_constants_stand_from_the_first_call_on() -> None:
    module = module_of()
    assert (module.constants == 0).all()
    step(module, INDEX)
    first = module.constants.clone()
    assert (first > 0).all()
    step(module, INDEX, 1, seed=9)
    assert torch.equal(module.constants, first)


def test_negatives_are_of_other_classes_and_of_the_stage_alone() -> None:
    part = torch.arange(4, 28)
    module = module_of(part, negatives=500)
    chosen = module.chosen(batch_of(part), Progress())
    assert torch.equal(chosen[:, 0], part)
    for row in chosen:
        own = LABELS[row[0]]
        assert (LABELS[row[1:]] != own).all()
        assert set(row[1:].tolist()) == {i for i in part.tolist() if LABELS[i] != own}


def test_every_negative_is_as_likely_as_any_other() -> None:
    labels = torch.cat([torch.zeros(10), torch.ones(25), torch.full((5,), 3)]).long()
    module = module_of(labels=labels, negatives=30_000)
    drawn = module.chosen(batch_of(torch.tensor([12])), Progress())[0, 1:]
    counts = drawn.bincount(minlength=SAMPLES)
    assert (counts[10:35] == 0).all()
    assert (counts[labels != 1] - 2000).abs().max() < 5 * 2000**0.5


def test_draws_follow_from_seed_task_and_step() -> None:
    module, batch = module_of(), batch_of(INDEX)
    first = module.chosen(batch, Progress(step=4, task=1))
    assert torch.equal(first, module_of().chosen(batch, Progress(step=4, task=1)))
    for other in (Progress(step=5, task=1), Progress(step=4, task=2)):
        assert not torch.equal(first, module.chosen(batch, other))
    assert not torch.equal(first, module_of(seed=4).chosen(batch, Progress(step=4, task=1)))


def test_labels_of_the_batch_are_not_read() -> None:
    """In a stream they count from the first class of the task."""
    module, local = module_of(), batch_of(INDEX)
    shifted = Batch(inputs=INDEX, labels=0 * INDEX, index=INDEX, view=0 * INDEX)
    assert torch.equal(module.chosen(local, Progress()), module.chosen(shifted, Progress()))


def test_it_goes_on_from_its_state() -> None:
    module = module_of()
    step(module, INDEX)
    other = module_of()
    assert not torch.equal(other.student_memory, module.student_memory)
    other.load_state_dict(module.state_dict())
    assert torch.equal(step(module, INDEX + 1, 1), step(other, INDEX + 1, 1))
    assert torch.equal(module.teacher_memory, other.teacher_memory)


def test_the_next_stage_keeps_the_memory_and_has_other_negatives() -> None:
    module = module_of(torch.arange(20))
    step(module, INDEX[:2])
    kept, constants = module.student_memory.clone(), module.constants.clone()
    module.start(torch.arange(20, 40), LABELS, torch.Generator())
    assert torch.equal(module.student_memory, kept)
    assert torch.equal(module.constants, constants)
    assert (module.chosen(batch_of(INDEX[2:3]), Progress())[:, 1:] >= 20).all()


def test_agreeing_embeddings_cost_less() -> None:
    """Trained on one batch, both sides tell each sample from those of other classes."""
    module = module_of(negatives=64)
    own, other = tapped(draw(0, 8, 5)), tapped(draw(1, 8, 6))
    batch = batch_of(torch.arange(8))
    optimizer, values = torch.optim.Adam(module.parameters(), lr=0.02), []
    for number in range(60):
        (loss,) = module(own, other, batch, Progress(step=number)).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1}, "weight is -1"),
        ({"negatives": 0}, "negatives is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"momentum": 1}, "momentum is 1"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CRD(**fields)


def test_what_it_cannot_do_it_says() -> None:
    given = tapped(draw(0, 4, 5))
    with pytest.raises(ShapeError, match="it was told of none"):
        CRD(**FIELDS).build(given, given)
    with pytest.raises(ConfigError, match="all 10 have class 2"):
        module_of(torch.arange(2, SAMPLES, CLASSES))
    with pytest.raises(ConfigError, match="without hidden labels"):
        module_of().chosen(batch_of(INDEX, labelled=INDEX > 7), Progress())
    fresh: Any = CRD(**FIELDS).build(given, tapped(draw(1, 4, 6)), Facts(samples=SAMPLES))
    with pytest.raises(GuardError, match="not told which samples"):
        step(fresh, INDEX)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("quick")
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    asked = config.load(
        "kd",
        [
            "objective=[{name: labels}, {name: crd, student_tap: hidden.0, teacher_tap: hidden.0, width: 16, "
            "negatives: 32}]",
            "scenario.epochs=4", "scenario.teacher_epochs=1", "teacher.network.hidden=[16]",
            "teacher.data=null",
            "engine.threads=1", "engine.checkpoint_seconds=0", "engine.reuse_teachers=false",
        ],
    )  # fmt: skip
    api.run(asked, out=tmp_path / "whole", quiet=True)
    steps, diagnoses = 0, Run.diagnoses

    def deadly(run: Run, at: Progress) -> bool:
        nonlocal steps
        steps += 1
        if steps == 2 + 6:  # the teacher takes two
            raise Killed
        return diagnoses(run, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "diagnoses", deadly)
        api.run(asked, out=tmp_path / "run", quiet=True)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("quick")
def test_it_runs_in_a_stream_of_tokens(tmp_path: Path) -> None:
    objective = "objective=[{name: labels}, {name: crd, negatives: 32, width: 16}]"
    asked = small.recipe(tmp_path, objective, "student.kd_prompts=null", "scenario.epochs=1")
    found = api.run(asked, out=tmp_path / "run", quiet=True).data
    assert 0 <= found["student"]["average_accuracy"] <= 100
