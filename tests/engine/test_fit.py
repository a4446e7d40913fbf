from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.engine.toy import (
    INPUTS,
    SAMPLES,
    SGD,
    Source,
    Step,
    checkpoints,
    log,
    run,
    turn,
    unchanged,
)
from torch import Tensor, nn

from limbeck.contracts import Batch, Progress
from limbeck.engine.fit import Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.state import read_state
from limbeck.errors import CheckpointError, DataError, GuardError, NonFiniteError

EPOCHS = 3


def trained(folder: Path, module: nn.Module, source: Source | None = None, **settings: object) -> nn.Module:
    with run(folder, **settings) as at:
        at.modules = nn.ModuleDict({"student": module})
        fit(at, "train", [turn(module)], source or Source(), EPOCHS)
    return module


def test_the_loop_is_the_hand_written_one(tmp_path: Path) -> None:
    """Same order, same noise, same optimiser: the same weights, bit for bit."""
    found = trained(tmp_path, Step())
    module, source = Step(), Source()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(run(tmp_path / "other").derive("torch", "train"))
    for epoch in range(EPOCHS):
        for batch in source.epoch(epoch):
            optimizer.zero_grad()
            sum(module(batch, Progress()).values()).backward()
            optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, found.state_dict()[name])


def test_every_step_knows_where_it_stands(tmp_path: Path) -> None:
    seen: list[Progress] = []

    class Watching(Step):
        def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
            seen.append(at)
            return super().forward(batch, at)

    trained(tmp_path, Watching())
    assert [at.step for at in seen] == list(range(12))
    assert [at.epoch for at in seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert {(at.steps, at.epochs) for at in seen} == {(12, EPOCHS)}


def test_the_log_has_every_term_by_its_name(tmp_path: Path) -> None:
    trained(tmp_path, Step(), log_every=5)
    steps = log(tmp_path, "step")
    assert [line["step"] for line in steps] == [4, 9, 11]
    for line in steps:
        assert set(line["terms"]) == {"labels", "size"}
        assert line["loss"] == pytest.approx(sum(line["terms"].values()))
        assert line["lr"] == 0.1
        assert line["stage"] == "train"


# Gradient shares


def test_shares_of_the_gradient_are_logged(tmp_path: Path) -> None:
    trained(tmp_path, Step(), diagnose_every=4)
    lines = log(tmp_path, "gradient_share")
    assert [line["step"] for line in lines] == [1, 5, 9]
    assert all(sum(line["shares"].values()) == pytest.approx(1) for line in lines)
    assert log(tmp_path, "warning") == []


def test_a_term_without_weight_is_reported(tmp_path: Path) -> None:
    trained(tmp_path, Step(small=1e-6), diagnose_every=100)
    (line,) = log(tmp_path, "warning")
    assert line["text"].endswith("train, student, step 1: under 1 % of the gradient: size")


def test_measuring_shares_changes_nothing(tmp_path: Path) -> None:
    with_shares = trained(tmp_path / "with", Step(), diagnose_every=2)
    without = trained(tmp_path / "without", Step(), diagnose_every=0)
    assert all(map(torch.equal, with_shares.state_dict().values(), without.state_dict().values()))
    assert log(tmp_path / "without", "gradient_share") == []


# What is not a number


@pytest.mark.parametrize("step", [0, 6])
def test_a_term_that_is_no_number_stops_the_run_before_the_update(tmp_path: Path, step: int) -> None:
    module, clean = Step(spoilt=(step,)), Step()
    with pytest.raises(NonFiniteError) as caught:
        trained(tmp_path, module)
    text = str(caught.value)
    assert text.startswith(f"train, epoch {step // 4}, step {step}: loss term 'size' is nan")
    assert re.search(r"\(samples \d, \d\); inputs and outputs are finite: lower optim\.lr", text)
    assert "\n" not in text
    state = read_state(checkpoints(tmp_path)[-1].with_suffix(""))
    assert (state["epoch"], state["batch"], state["step"]) == (step // 4, step % 4, step)
    with pytest.raises(Killed):
        trained(tmp_path / "clean", Stopping(clean, step))
    for name, value in module.state_dict().items():
        assert torch.equal(value, clean.state_dict()[name])
        assert torch.equal(value, state["modules"][f"student.{name}"])


class Killed(BaseException):
    """Ends all as a kill does."""


class Stopping(nn.Module):
    """Takes ``steps`` steps, then ends everything."""

    def __init__(self, step: Step, steps: int) -> None:
        super().__init__()
        self.step, self.steps = step, steps

    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        if at.step == self.steps:
            raise Killed
        terms: dict[str, Tensor] = self.step(batch, at)
        return terms


def test_a_run_goes_on_after_the_fault_is_mended(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        trained(tmp_path / "spoilt", Step(spoilt=(6,)))
    mended = trained(tmp_path / "spoilt", Step(), resume=True)
    clean = trained(tmp_path / "clean", Step())
    assert all(map(torch.equal, mended.state_dict().values(), clean.state_dict().values()))


class Reading(Source):
    """A source that cannot be read at a step, or a network that fails there."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for place, batch in enumerate(super().epoch(epoch, start), start):
            if (epoch, place) == (1, 2):
                raise self.error
            yield batch


@pytest.mark.parametrize("error", [DataError("sample 7 cannot be read"), RuntimeError("out of memory")])
def test_a_batch_that_cannot_be_had_leaves_a_checkpoint_from_before_it(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        trained(tmp_path / "run", Step(), Reading(error))
    if isinstance(error, DataError):
        assert str(caught.value) == "train, epoch 1, step 6: sample 7 cannot be read"
    (kept,) = checkpoints(tmp_path / "run")
    assert read_state(kept.with_suffix(""))["step"] == 6
    mended = trained(tmp_path / "run", Step(), resume=True)
    clean = trained(tmp_path / "clean", Step())
    assert all(map(torch.equal, mended.state_dict().values(), clean.state_dict().values()))


def test_a_fault_within_the_update_writes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.SGD.step, iter(range(99))

    def half(self: torch.optim.SGD) -> None:
        step(self)
        if next(calls) == 6:
            raise RuntimeError("halfway")

    monkeypatch.setattr(torch.optim.SGD, "step", half)
    with pytest.raises(RuntimeError, match="halfway"):
        trained(tmp_path, Step())
    assert checkpoints(tmp_path) == []


def test_buffers_of_the_spoilt_step_are_taken_back(tmp_path: Path) -> None:
    class Normed(Step):
        def __init__(self) -> None:
            super().__init__(spoilt=(6,))
            self.norm = nn.BatchNorm1d(3, affine=False)

        def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
            self.norm(batch.inputs)
            return super().forward(batch, at)

    with pytest.raises(NonFiniteError):
        trained(tmp_path, Normed())
    state = read_state(checkpoints(tmp_path)[-1].with_suffix(""))
    assert state["modules"]["student.norm.num_batches_tracked"] == 6


def test_bad_data_are_named_by_their_sample(tmp_path: Path) -> None:
    inputs = INPUTS.clone()
    inputs[5, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="the input data is not finite, first at sample 5: mend that"):
        trained(tmp_path, Step(), Source(inputs))


def test_a_fault_in_a_later_turn_keeps_the_checkpoint_from_before(tmp_path: Path) -> None:
    """When the first turn has stepped already, the state is no longer that of before the step."""
    first, second = Step(), Step(spoilt=(6,))
    with run(tmp_path) as at:
        at.modules = nn.ModuleDict({"first": first, "second": second})
        turns = [Turn("first", first, SGD, {}), Turn("second", second, SGD, {})]
        with pytest.raises(NonFiniteError, match="step 6: loss term 'size' is nan"):
            fit(at, "train", turns, Source(), EPOCHS)
    assert checkpoints(tmp_path) == []


# Frozen parts, orphans


class Teaching(Step):
    """A step whose frozen teacher is tampered with."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.teacher = nn.BatchNorm1d(2).requires_grad_(False)
        self.what = what

    @torch.no_grad()
    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        if at.step == 7 and self.what:
            getattr(self.teacher, self.what).add_(1)
        with torch.enable_grad():
            return super().forward(batch, at)


@pytest.mark.parametrize("what", ["weight", "running_mean"])
def test_a_frozen_part_that_moves_fails_the_run(tmp_path: Path, what: str) -> None:
    module = Teaching(what)
    with run(tmp_path) as at:
        at.modules = nn.ModuleDict({"student": module})
        with pytest.raises(GuardError, match=f"frozen teacher changed at '{what}'"):
            fit(at, "train", [turn(module, teacher=module.teacher)], Source(), EPOCHS)
    assert checkpoints(tmp_path) == []


def test_a_frozen_part_that_stands_still_passes(tmp_path: Path) -> None:
    module = Teaching("")
    with run(tmp_path) as at, unchanged(module.teacher):
        at.modules = nn.ModuleDict({"student": module})
        fit(at, "train", [turn(module, teacher=module.teacher)], Source(), EPOCHS)


def test_a_parameter_that_nothing_optimises_is_named(tmp_path: Path) -> None:
    module = Step()
    forgetful = turn(module)
    forgetful.optimizer.param_groups[0]["params"].pop()
    with run(tmp_path) as at:
        at.modules = nn.ModuleDict({"student": module})
        with unchanged(module), pytest.raises(GuardError, match=r"student\.bias receives a gradient but no"):
            fit(at, "train", [forgetful], Source(), EPOCHS)


def test_a_parameter_that_no_term_reaches_is_named(tmp_path: Path) -> None:
    module = Step()
    module.spare = nn.Parameter(torch.zeros(2))
    with unchanged(module), pytest.raises(GuardError, match="spare is optimised but no loss term reaches it"):
        trained(tmp_path, module)


# Settings


def test_bf16_computes_in_half_and_keeps_full_weights(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watching(Step):
        def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
            seen.append(self.student(batch.inputs).dtype)
            return super().forward(batch, at)

    module = trained(tmp_path, Watching(), precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    exact = trained(tmp_path / "exact", Step())
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=0.05, atol=0.05)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    module = Step(small=1000.0)
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    optim = Optim(name="sgd", lr=0.5, momentum=0, clip=0.01, schedule="constant")
    with run(tmp_path) as at:
        at.modules = nn.ModuleDict({"student": module})
        fit(at, "train", [turn(module, optim)], Source(), 1)
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert 0 < (after - before).norm() <= 4 * 0.5 * 0.01 * 1.001


# Checkpoints


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, Step(), checkpoint_seconds=0, keep_checkpoints=3)
    assert [path.stem for path in checkpoints(tmp_path)] == ["000011", "000012", "000013"]
    left = {path.suffix for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", [".json", ".safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, Stopping(Step(), 7), checkpoint_seconds=0)
    newest = checkpoints(tmp_path)[-1].with_suffix(kind)
    newest.write_bytes(newest.read_bytes()[:-9])
    at = run(tmp_path, resume=True)
    assert at.pending is not None
    assert at.pending["step"] == 6
    module = Stopping(Step(), 99)
    with at:
        at.meter.console.quiet = False
        at.modules = nn.ModuleDict({"student": module})
        fit(at, "train", [turn(module)], Source(), EPOCHS)
    clean = trained(tmp_path / "clean", Step())
    assert all(map(torch.equal, module.state_dict().values(), clean.state_dict().values()))


def test_the_damaged_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, Step(), checkpoint_seconds=0)
    checkpoints(tmp_path)[-1].write_text("{")
    from limbeck.engine.run import Run
    from limbeck.engine.settings import Engine

    Run(tmp_path, Engine(), 0, resume=True)
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: .*000013\.json is damaged: its .*; the one before it is used\n", said)


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    trained(tmp_path, Step(), checkpoint_seconds=0)
    for path in checkpoints(tmp_path):
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged: start the run anew"):
        run(tmp_path, resume=True)


def test_what_a_killed_write_left_is_swept_away(tmp_path: Path) -> None:
    trained(tmp_path, Step())
    half = tmp_path / "checkpoints" / ".000002.safetensors.123.tmp"
    half.write_bytes(b"half")
    run(tmp_path, resume=True)
    assert not half.exists()


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from limbeck.engine import state

    with pytest.raises(Killed):
        trained(tmp_path, Stopping(Step(), 5), checkpoint_seconds=0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"000006\.safetensors: the disk is full.*; the one before is kept"
    ):
        trained(tmp_path, Stopping(Step(), 9), resume=True, checkpoint_seconds=0)
    monkeypatch.undo()
    module = trained(tmp_path, Stopping(Step(), 99), resume=True)
    clean = trained(tmp_path / "clean", Step())
    assert all(map(torch.equal, module.state_dict().values(), clean.state_dict().values()))


def test_a_full_disk_while_logging_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.engine.run.claim", lambda _: Path("/dev/full").open("a+b"))  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: the disk is full"):
        trained(tmp_path, Step())


def test_the_checkpoint_of_another_procedure_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, Step())
    module = Step()
    with run(tmp_path, resume=True) as at:
        at.modules = nn.ModuleDict({"student": module})
        with pytest.raises(CheckpointError, match="stands in stage 'train' but the run asks for 'other'"):
            fit(at, "other", [turn(module)], Source(), EPOCHS)


# Facts that are computed once


def test_facts_are_kept(tmp_path: Path) -> None:
    with run(tmp_path) as at:
        assert at.once("evaluation", lambda: {"accuracy": [1.5]}) == {"accuracy": [1.5]}
    trained(tmp_path / "x", Step())
    with run(tmp_path, resume=True) as at:
        assert at.once("evaluation", lambda: 1 / 0) == {"accuracy": [1.5]}


def test_facts_survive_in_the_checkpoint(tmp_path: Path) -> None:
    with run(tmp_path) as at:
        module = Step()
        at.modules = nn.ModuleDict({"student": module})
        at.once("before", lambda: 1)
        fit(at, "train", [turn(module)], Source(), 1)
    (tmp_path / "checkpoints" / "facts.json").write_text("{")
    with run(tmp_path, resume=True) as at:
        assert at.once("before", lambda: 2) == 1


def test_all_samples_are_seen_in_every_epoch() -> None:
    """Of the toy itself: what the tests above stand on."""
    for epoch in range(2):
        index = torch.cat([batch.index for batch in Source().epoch(epoch)])
        assert sorted(index.tolist()) == list(range(SAMPLES))
