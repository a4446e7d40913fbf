"""What must be true of texts that a network writes itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.contracts import Batch, Spec
from limbeck.data.texts import Corpus, Document, Reading
from limbeck.data.tokenizers import characters
from limbeck.data.tokens import UNCOUNTED, Rows, TokenBatches, rows_of
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine
from limbeck.errors import CheckpointError, ConfigError
from limbeck.losses.on_policy import DRAWN, adaptive_share
from limbeck.scenarios.replayed import Memory, Replayed
from limbeck.scenarios.written import Buffer, Texts, Writer, Writing, Written, check_prompts
from limbeck.students.llama import LlamaStudent

LENGTH, BATCH = 16, 4  # a row holds any of the texts
SPEC = Spec(classes=40, size=LENGTH, special={"eos": 0, "pad": 0})


def rows() -> Rows:
    documents = tuple(Document(f"{a} plus {b} is {a + b}.") for a in range(8) for b in range(5))
    tokenizer = characters([d.text for d in documents])
    return rows_of(
        Corpus("sums", documents, ("sums",), "", ""), tokenizer, Reading(length=LENGTH, pack=False)
    )


def model(seed: int = 0) -> nn.Module:
    net = LlamaStudent(layers=1, width=16, heads=2).build(SPEC, torch.Generator().manual_seed(seed))
    found: nn.Module = net.get_submodule("network")
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", Engine(device="cpu"), seed=3, quiet=True)


def written(run: Run, plan: Writing, network: nn.Module | None = None, *, spec: Spec = SPEC) -> Written:
    source = TokenBatches(rows(), batch_size=BATCH, seed=1)
    return Written(plan, source, source.rows, network or model(), run, spec=spec, batch_size=BATCH)


def same(one: Batch, other: Batch) -> bool:
    assert one.rows is not None and other.rows is not None
    pairs = ((one.inputs, other.inputs), (one.labels, other.labels), (one.rows, other.rows))
    return all(torch.equal(a, b) for a, b in pairs)


def test_prompts_stay_and_what_is_written_is_what_counts(run: Run) -> None:
    made = written(run, Writing(share=1, prompt=5))
    plain = TokenBatches(rows(), batch_size=BATCH, seed=1)
    for batch, before in zip(made.epoch(0), plain.epoch(0), strict=True):
        assert batch.rows is not None
        assert torch.equal(batch.inputs[:, :5], before.inputs[:, :5])
        places = batch.rows % LENGTH
        assert int(places.min()) == 4  # the last token of the prompt says the first that is written
        following = torch.full((batch.inputs.numel(),), UNCOUNTED)
        following[batch.rows] = batch.labels
        for read, said in zip(batch.inputs, following.reshape(batch.inputs.shape), strict=True):
            counted = int((said != UNCOUNTED).sum())
            assert torch.equal(said[4 : 3 + counted], read[5 : 4 + counted])
            assert 0 not in said[4 : 3 + counted].tolist()  # nothing counts behind the end of the text


def test_a_prompt_is_of_one_document_and_has_no_padding() -> None:
    documents = tuple(Document(text) for text in ("ab", "abcdefgh", "ba"))
    tokenizer = characters([d.text for d in documents])
    for pack, wanted in ((False, ["ab", "abcdef", "ba"]), (True, ["ab", "ba"])):
        corpus = Corpus("letters", documents, ("letters",), "", "")
        kept = rows_of(corpus, tokenizer, Reading(length=10, pack=pack))
        writer = Writer(model=None, length=10, prompt=6, eos=0, batch_size=1)
        assert [tokenizer.decode(writer.prompt_of(kept, row)) for row in range(len(kept))] == wanted


def test_what_only_the_network_has_room_for_is_not_written(run: Run) -> None:
    made = written(run, Writing(share=1, prompt=5), spec=replace(SPEC, classes=30))
    assert all(int(batch.labels.max()) < 30 for batch in made.epoch(0))
    assert any(int(batch.labels.max()) >= 30 for batch in written(run, Writing(share=1, prompt=5)).epoch(0))


def test_a_share_of_none_leaves_the_data_and_a_share_of_some_writes_some(run: Run) -> None:
    plain = list(TokenBatches(rows(), batch_size=BATCH, seed=1).epoch(0))
    alone = list(written(run, Writing(share=0, prompt=5)).epoch(0))
    assert all(same(a, b) for a, b in zip(alone, plain, strict=True))
    half = list(written(run, Writing(share=0.5, prompt=5)).epoch(0))
    assert 0 < sum(same(a, b) for a, b in zip(half, plain, strict=True)) < len(plain)


def test_the_weights_of_now_write_and_the_weights_of_then_where_a_lag_is_allowed(run: Run) -> None:
    network = model()
    for lag, changes in ((1, True), (3, False)):
        made, still = written(run, Writing(share=1, prompt=5, lag=lag), network), model()
        going, fixed = made.epoch(0), written(run, Writing(share=1, prompt=5, lag=lag), still).epoch(0)
        assert same(next(going), next(fixed))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
        assert same(next(going), next(fixed)) is not changes
        network.load_state_dict(still.state_dict())


def test_a_resumed_run_learns_from_the_texts_that_were_written_ahead(run: Run) -> None:
    plan = Writing(share=1, prompt=5, lag=4)
    made = written(run, plan)
    expected = list(islice(made.epoch(1), 4))
    again = written(run, plan, model(9))  # other weights: what stands in the buffers counts
    again.load_state_dict(made.state_dict())
    assert all(same(a, b) for a, b in zip(islice(again.epoch(1, 2), 2), expected[2:], strict=True))


def test_a_teachers_kept_texts_come_again_and_others_do_not(run: Run) -> None:
    kept = written(run, Writing(share=1, by="teacher", prompt=5, replays=2))
    first, second, third = ({int(i): b.inputs[n] for b in kept.epoch(e) for n, i in enumerate(b.index)}
                            for e in range(3))  # fmt: skip
    assert all(torch.equal(first[i], third[i]) for i in first)
    assert any(not torch.equal(first[i], second[i]) for i in first)
    again = written(
        run, Writing(share=1, by="teacher", prompt=5, replays=2), model(9)
    )  # as a resumed run has it
    fourth = {int(i): b.inputs[n] for b in again.epoch(3) for n, i in enumerate(b.index)}
    assert all(torch.equal(second[i], fourth[i]) for i in second)
    (damaged, *_) = sorted((run.folder / "checkpoints" / "written").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-9] + b" " + damaged.read_bytes()[-8:])
    with pytest.raises(CheckpointError, match=f"{damaged.name} is damaged"):
        written(run, Writing(share=1, by="teacher", prompt=5, replays=2))
    damaged.unlink()
    fresh = written(run, Writing(share=1, by="teacher", prompt=5))
    one, other = (
        {int(i): b.inputs[n] for b in fresh.epoch(e) for n, i in enumerate(b.index)} for e in (0, 2)
    )
    assert any(not torch.equal(one[i], other[i]) for i in one)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_written_tokens_carry_the_chance_that_they_were_drawn_with(run: Run, share: float) -> None:
    own, other = model(), model(1)
    source = TokenBatches(rows(), batch_size=BATCH, seed=1)
    plan = Writing(share=1, prompt=5, lag=2, teacher_mix=share)
    made = Written(plan, source, source.rows, own, run, spec=SPEC, batch_size=BATCH, teacher=other)
    for batch in islice(made.epoch(0), 4):
        with torch.no_grad():
            q, p = (
                net(batch.inputs).logits.log_softmax(-1).flatten(0, 1)[batch.rows] for net in (own, other)
            )
        law = ((1 - share) * q.exp() + share * p.exp()).log()
        wanted = law.gather(1, batch.labels[:, None]).squeeze(1)
        torch.testing.assert_close(batch.marks[DRAWN], wanted, rtol=1e-4, atol=1e-4)


def test_texts_of_several_steps_are_written_at_once_as_one_by_one(run: Run) -> None:
    """With weights that stand still a lag changes the draws, never the prompts or what counts."""
    ahead = list(islice(written(run, Writing(share=1, prompt=5, lag=3)).epoch(0), 3))
    alone = list(islice(written(run, Writing(share=1, prompt=5)).epoch(0), 3))
    assert same(ahead[0], alone[0])
    for one, other in zip(ahead, alone, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.inputs[:, :5], other.inputs[:, :5])


def test_the_share_rises_where_the_loss_has_risen_since_the_last_rise() -> None:
    losses = [2.0, 2.05, 2.1, 2.15, 2.0, 2.2, 2.4]
    found = [adaptive_share(losses[:n]) for n in range(1, 8)]
    assert found == pytest.approx([0, 0, 0.1, 0.1, 0.1, 0.2, 0.3])
    assert adaptive_share([0.0, 1.0, 2.0, 3.0], 0.7, rise=0.2, tolerance=0.5) == 1.0
    assert adaptive_share([0.0, float("nan")]) == 0.0


def test_the_oldest_texts_make_room() -> None:
    memory, texts = Memory(3, 4), Texts(2, 4)
    for number, full in enumerate((False, True, True)):
        texts.ids.fill_(number)
        texts.ids[1] += 10
        memory.add(texts, torch.tensor([number, 10 + number]))
        assert memory.full is full
    assert sorted(memory.origin.tolist()) == [2, 11, 12]
    assert torch.equal(memory.texts.ids[:, 0], memory.origin)
    drawn = [memory.drawn(2, torch.Generator().manual_seed(seed)).tolist() for seed in range(50)]
    assert {tuple(sorted(places)) for places in drawn} == {(0, 1), (0, 2), (1, 2)}


def test_texts_are_written_then_learnt_from_again(run: Run) -> None:
    """DistiLLM's rule: while the buffer has room all of φ is written, then φ (1 - t / T) of it."""
    plan = Writing(share=0, prompt=5, buffer=Buffer(capacity=2 * BATCH, rise=1.0))
    plain, losses = TokenBatches(rows(), batch_size=BATCH, seed=1), iter([1.0, 0.9, 1.1, 1.1])
    made = Replayed(
        plan, plain, plain.rows, model(), run, spec=SPEC, batch_size=BATCH, epochs=4,
        validate=lambda: next(losses),
    )  # fmt: skip
    kinds: list[list[str]] = []
    for epoch in range(4):
        kinds.append([])
        for batch, before in zip(made.epoch(epoch), plain.epoch(epoch), strict=True):
            if torch.equal(batch.inputs, before.inputs) and DRAWN not in batch.marks:
                kinds[-1].append("data")
                continue
            own = torch.equal(batch.index, before.index)
            kinds[-1].append("new" if own else "again")
            held = {tuple(row.tolist()) for row in made.memory.texts.ids}
            assert all(tuple(row.tolist()) in held for row in batch.inputs)
            assert torch.equal(batch.inputs[:, :5], made.rows.ids[batch.index][:, :5])
            assert batch.rows is not None and len(batch.marks[DRAWN]) == len(batch.labels)
    assert set(kinds[0] + kinds[1]) == {"data"}  # until the loss has risen
    assert kinds[2][:2] == ["new", "new"] and {"new", "again"} == set(kinds[2])
    assert kinds[3].count("again") > kinds[2].count("again")
    assert made.facts() == {
        "validation": [1.0, 0.9, 1.1, 1.1], "share": [0, 0, 1, 1],
        "written": BATCH * (kinds[2] + kinds[3]).count("new"),
    }  # fmt: skip


def test_what_cannot_be_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="capacity is 0"):
        Buffer(capacity=0)
    with pytest.raises(ConfigError, match="rise is -1"):
        Buffer(rise=-1)
    with pytest.raises(ConfigError, match="tolerance is inf"):
        Buffer(tolerance=float("inf"))
    with pytest.raises(ConfigError, match="buffer keeps a student's texts"):
        Writing(buffer=Buffer(), by="teacher")
    with pytest.raises(ConfigError, match="buffer keeps a student's texts"):
        Writing(buffer=Buffer(), lag=2)
    with pytest.raises(ConfigError, match="share is 2"):
        Writing(share=2)
    with pytest.raises(ConfigError, match="lag is 0"):
        Writing(lag=0)
    with pytest.raises(ConfigError, match="by is student: set replays to null"):
        Writing(replays=2)
    with pytest.raises(ConfigError, match="teacher_mix is 1: allowed are shares from 0, below 1"):
        Writing(teacher_mix=1)
    with pytest.raises(ConfigError, match="by is teacher: set teacher_mix to 0"):
        Writing(by="teacher", teacher_mix=0.2)
    with pytest.raises(ConfigError, match="temperature is -1"):
        Writing(temperature=-1)
    with pytest.raises(ConfigError, match="prompt is 16 but rows have 16 tokens"):
        check_prompts(16, rows())
