"""What must be true of self-attention relations as an objective: on texts, packed or padded, of any width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.battery.networks import LLAMA, TEXT, seeded
from torch import nn

from limbeck.contracts import Batch, Facts, Outputs, Progress
from limbeck.data.tokens import Rows, batch_of
from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import relation_loss
from limbeck.objectives.relations import Relations
from limbeck.students.llama import LlamaStudent

AT = Progress()
TEACHER = LlamaStudent(layers=2, width=24, heads=2).build(TEXT, seeded(1)).eval()
STUDENT = LLAMA.build(TEXT, seeded(2)).eval()
RELATIONS = Relations()


def texts(segments: torch.Tensor | None = None, *, padding: int = 0) -> Batch:
    """Three texts of which the last ``padding`` tokens do not count."""
    ids = torch.randint(TEXT.classes, (3, TEXT.size), generator=seeded(7))
    said = ids.roll(-1, 1)
    said[:, TEXT.size - padding :] = -100
    index = torch.arange(3)
    return batch_of(Rows("made up", ids, said, segments, index, ("all",)), index)


def said(net: nn.Module, batch: Batch) -> Outputs:
    outputs: Outputs = net(batch, RELATIONS.student_taps)
    return outputs


def loss(batch: Batch, objective: Relations = RELATIONS, net: nn.Module = STUDENT) -> float:
    own, other = said(net, batch), said(TEACHER, batch)
    module = objective.build(own, other, Facts(teacher=TEACHER))
    assert not list(module.parameters())
    return float(module(own, other, batch, AT)["relations"].detach())


def test_it_is_the_function_on_the_last_layers_projections() -> None:
    batch = texts()
    own, other = (
        tuple(said(net, batch).features[tap] for tap in RELATIONS.student_taps) for net in (STUDENT, TEACHER)
    )
    assert own[0].shape[-1] != other[0].shape[-1]
    assert loss(batch) == pytest.approx(float(relation_loss(own, other, 2, causal=True).detach()), rel=1e-6)


def test_a_student_that_is_the_teacher_has_no_loss() -> None:
    assert loss(texts(), net=TEACHER) == 0 < loss(texts())


def test_no_label_is_read() -> None:
    batch = texts()
    assert loss(batch) == loss(replace(batch, labels=torch.zeros_like(batch.labels)))


def test_padding_changes_nothing() -> None:
    """Neither what stands there nor, but for the shorter text, how much of it there is."""
    padded = texts(padding=2)
    other = padded.inputs.clone()
    other[:, -2:] = 0
    assert loss(padded) == pytest.approx(loss(replace(padded, inputs=other)), rel=1e-6)
    short = batch_of(
        Rows(
            "short", padded.inputs[:, :-2], texts().inputs.roll(-1, 1)[:, :-2], None, padded.index, ("all",)
        ),
        padded.index,
    )
    assert loss(padded) == pytest.approx(loss(short), rel=1e-5)


def test_documents_in_a_row_are_not_related() -> None:
    segments = (torch.arange(TEXT.size) > 3).long().expand(3, -1)
    batch = texts(segments)
    own, other = said(STUDENT, batch), said(TEACHER, batch)
    parts = []
    for part in (slice(0, 4), slice(4, TEXT.size)):
        q, tq = (tuple(o.features[tap][:, part] for tap in RELATIONS.student_taps) for o in (own, other))
        found = relation_loss(q, tq, 2, causal=True)
        parts.append(float(found) * (part.stop - part.start) ** 2)
    whole = float(
        RELATIONS.build(own, other, Facts(teacher=TEACHER))(own, other, batch, AT)["relations"].detach()
    )
    assert whole == pytest.approx(sum(parts) / TEXT.size**2, rel=1e-5)


def test_weights_scale_the_tokens_that_ask() -> None:
    batch = texts(padding=1)
    ones = torch.ones(len(batch.labels))
    assert loss(replace(batch, weight=ones)) == pytest.approx(loss(batch), rel=1e-6)
    assert loss(replace(batch, weight=0 * ones)) == 0
    some = (torch.arange(len(ones)) % 2).float()
    halves = [loss(replace(batch, weight=w)) for w in (some, 1 - some)]
    assert min(halves) > 0
    assert sum(halves) == pytest.approx(loss(batch), rel=1e-5)


def test_each_projection_has_its_weight() -> None:
    each = [loss(texts(), Relations(betas=tuple(float(i == j) for j in range(3)))) for i in range(3)]
    assert sum(each) == pytest.approx(loss(texts()), rel=1e-5)
    assert loss(texts(), Relations(weight=2)) == pytest.approx(2 * loss(texts()), rel=1e-6)


def test_the_raw_form_and_other_heads_differ() -> None:
    assert len({loss(texts(), o) for o in (RELATIONS, Relations(form="raw"), Relations(heads=3))}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1}, "weight is -1 but must be a finite number of at least 0"),
        ({"betas": (1.0, -1.0, 1.0)}, "betas is -1.0 but must be a finite number of at least 0"),
        ({"heads": 0}, "heads is 0 but must be at least 1, or null for the teacher's own"),
    ],
)
def test_fields_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Relations(**fields)


def test_networks_without_such_projections() -> None:
    with pytest.raises(ShapeError, match="a projection has 12 features but must have at least heads = 13"):
        loss(texts(), Relations(heads=13))
    with pytest.raises(
        ConfigError, match="the teacher does not tell how many attention heads it has: set obj"
    ):
        RELATIONS.build(said(STUDENT, texts()), said(TEACHER, texts()), Facts(teacher=None))
    elsewhere = Relations(student_taps=("model.layers.-1.self_attn.q",) * 3)
    with pytest.raises(ShapeError, match=r"no tap .* in LlamaForCausalLM: did you mean .*q_proj"):
        STUDENT(texts(), elsewhere.needs().student)
