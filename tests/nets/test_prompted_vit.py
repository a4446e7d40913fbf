"""The frozen transformer that learns through prompts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from limbeck.contracts import Outputs
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.kd_prompts import KDPrompts
from limbeck.nets.prompts.apt import APT
from limbeck.nets.prompts.coda import CODA
from limbeck.nets.prompts.l2p import L2P

CODA2 = CODA(pool=6, length=4, blocks=(0, 1))
KDP = KDPrompts(length=4)


def grads(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)
    }


def test_backbone_is_frozen_whatever_calls_train(net: Any, batch: Any) -> None:
    student = net(CODA2, kd=KDP).train()
    assert not student.backbone.training and student.prompts.training
    assert not any(p.requires_grad for p in student.backbone.parameters())
    before = copy.deepcopy(student.backbone.state_dict())
    optimiser = torch.optim.Adam(p for g in student.parameter_groups() for p in g["params"])
    for _ in range(2):
        said = student(batch())
        optimiser.zero_grad()
        (said.logits.square().sum() + said.soft.square().sum()).backward()
        optimiser.step()
    assert all(torch.equal(before[n], t) for n, t in student.backbone.state_dict().items())
    assert all(p.grad is None for p in student.backbone.parameters())


def test_checkpoints_leave_the_backbone_out(net: Any) -> None:
    assert net().backbone.constant is True


def test_query_is_the_unprompted_class_token_and_needs_no_graph(net: Any, batch: Any) -> None:
    student, data = net(CODA2), batch()
    query = student.query(data.inputs)
    assert not query.requires_grad
    own = student(data)
    assert torch.equal(student(replace(data, query=query)).logits, own.logits)
    other = student(replace(data, query=query + 1.0))
    assert not torch.allclose(other.logits, own.logits)


def test_a_network_without_keys_asks_for_no_query(net: Any, batch: Any) -> None:
    for learner in (None, APT()):
        student = net(learner)
        assert student.query_dim is None
        assert student(batch()).logits.shape == (4, 6)
    assert net(CODA2).query_dim == 24


def test_foreign_queries_must_be_given_and_must_fit(net: Any, batch: Any) -> None:
    teacher = net(CODA2, query_dim=16)
    assert teacher(batch(query=torch.rand(4, 16))).logits.shape == (4, 6)
    with pytest.raises(ShapeError, match=r"give batch\.query"):
        teacher(batch())
    with pytest.raises(ShapeError, match="24 wide but the prompt keys are 16"):
        teacher(batch(query=torch.rand(4, 24)))


def test_linear_probe_learns_its_head_alone(net: Any) -> None:
    assert [group["name"] for group in net().parameter_groups()] == ["head"]


# KD prompts (CDL v2, v3, v4)


def test_class_loss_never_reaches_the_kd_head_and_the_reverse(net: Any, batch: Any) -> None:
    student = net(CODA2, kd=KDP).train()
    said = student(batch())
    own, soft = grads(said.logits.square().sum(), student), grads(said.soft.square().sum(), student)
    assert not own["kd_head.weight"].any() and own["head.weight"].any()
    assert not soft["head.weight"].any() and soft["kd_head.weight"].any()
    for name in ("kd_prompts.token", "kd_prompts.prompts", "prompts.prompts", "prompts.keys"):
        assert own[name].any() and soft[name].any(), name


def test_without_kd_layers_the_student_is_its_base_learner(net: Any, batch: Any) -> None:
    base, student = net(CODA2), net(CODA2, kd=KDPrompts(layers=0))
    assert student.kd_prompts is None and student.kd_head is None
    assert torch.equal(base(batch()).logits, student(batch()).logits)


def test_one_kd_layer_is_the_token_alone(net: Any, batch: Any) -> None:
    student = net(CODA2, kd=KDPrompts(layers=1, position="start", init="zeros"))
    assert student.kd_prompts.prompts is None and not student.kd_prompts.token.any()
    said = student(batch(), taps=("norm",))
    tokens = said.features["norm"]
    assert tokens.shape[1] == 18
    assert torch.allclose(student.kd_head(tokens[:, 0]), said.soft)
    assert torch.allclose(student.head(tokens[:, 1]), said.logits)


def test_kd_token_stands_last(net: Any, batch: Any) -> None:
    student = net(CODA2, kd=KDP)
    said = student(batch(), taps=("norm", "blocks.-1"))
    tokens = said.features["norm"]
    assert torch.allclose(student.kd_head(tokens[:, -1]), said.soft)
    assert torch.allclose(student.head(tokens[:, 0]), said.logits)
    assert said.features["blocks.-1"].shape == (4, 18, 24)


@pytest.mark.parametrize("learner", [CODA2, APT(), L2P(pool=4, length=2, top_k=2), None])
def test_strict_decoupling_leaves_the_class_path_to_the_base_learner(
    learner: Any, net: Any, batch: Any
) -> None:
    base = net(learner)
    torch.nn.init.normal_(base.head.weight, generator=torch.Generator().manual_seed(0))
    strict, loose = (net(learner, kd=KDPrompts(length=4, strict=on)) for on in (True, False))
    for student in (strict, loose):
        student.load_state_dict(base.state_dict(), strict=False)
    want = base(batch()).logits
    assert torch.allclose(strict(batch()).logits, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loose(batch()).logits, want, rtol=1e-4, atol=1e-5)
    reached = grads(strict.train()(batch()).logits.sum(), strict)
    assert not reached["kd_prompts.token"].any() and not reached["kd_prompts.prompts"].any()


def test_strict_decoupling_spares_blocks_without_kd_prompts(net: Any, batch: Any) -> None:
    base, strict = net(CODA2), net(CODA2, kd=KDPrompts(length=4, layers=1, strict=True))
    assert torch.allclose(base(batch()).logits, strict(batch()).logits, rtol=1e-4, atol=1e-5)


def test_kd_prompts_go_on_where_they_stood_at_a_new_task(net: Any) -> None:
    student = net(CODA2, kd=KDPrompts(length=4, later_lr=0.1))
    before = copy.deepcopy(student.kd_prompts.state_dict())
    scales = {g["name"]: g["lr_scale"] for g in student.parameter_groups()}
    assert scales["kd_prompts"] == 1.0
    student.finish_task()
    student.start_task(1, torch.Generator().manual_seed(9))
    assert all(torch.equal(before[n], t) for n, t in student.kd_prompts.state_dict().items())
    scales = {g["name"]: g["lr_scale"] for g in student.parameter_groups()}
    assert scales == {"prompts": 1.0, "kd_prompts": 0.1, "head": 1.0, "kd_head": 1.0}


def test_odd_or_too_many_kd_prompts_are_refused(net: Any) -> None:
    with pytest.raises(ConfigError, match=r"kd_prompts\.length is 5"):
        KDPrompts(length=5)
    with pytest.raises(ShapeError, match="layers is 4 but the student has only 3"):
        net(kd=KDPrompts(layers=4))


def test_kd_prompts_starts() -> None:
    bank = KDPrompts(length=4).build(24, 3, torch.Generator().manual_seed(0))
    assert bank is not None and bank.prompts is not None
    assert bank.prompts.min() >= 0 and bank.prompts.max() < 1 and bank.prompts.mean() > 0.3
    bank = KDPrompts(length=4, init="normal").build(24, 3, torch.Generator().manual_seed(0))
    assert bank is not None and bank.prompts is not None
    assert 0.01 < bank.prompts.std() < 0.03


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prediction_mixes_logits(share: float, net: Any) -> None:
    student = net(kd=KDP, share=share)
    said = Outputs(logits=torch.tensor([[1.0, 2.0]]), soft_logits=torch.tensor([[3.0, -1.0]]))
    assert torch.allclose(student.predict(said), torch.tensor([[1 + 2 * share, 2 - 3 * share]]))
    assert torch.equal(student.predict(Outputs(logits=said.logits)), said.logits)


# Taps


def test_taps_are_the_tokens_of_a_block(net: Any, vit: Any, batch: Any) -> None:
    bare, data = net(), batch()
    said = bare(data, taps=("blocks.0", "blocks.-1", "norm"))
    x = bare.backbone._pos_embed(bare.backbone.patch_embed(data.inputs))
    x = bare.backbone.blocks[0](x)
    assert torch.equal(said.features["blocks.0"], x)
    for block in bare.backbone.blocks[1:]:
        x = block(x)
    assert torch.equal(said.features["blocks.-1"], x)
    assert list(said.features) == ["blocks.0", "blocks.-1", "norm"]


def test_the_pass_stops_behind_the_last_tap(net: Any, batch: Any) -> None:
    student, ran = net(CODA2), []
    for number, block in enumerate(student.backbone.blocks):
        block.norm2.register_forward_hook(lambda *_, n=number: ran.append(n))
    query = torch.rand(4, 24)
    said = student(batch(query=query), taps=("blocks.0",), logits=False)
    assert ran == [0] and said.logits.shape == (4, 0)
    assert torch.equal(
        said.features["blocks.0"], student(batch(query=query), taps=("blocks.0",)).features["blocks.0"]
    )
    with pytest.raises(ShapeError, match=r"did you mean 'blocks\.\d'"):
        student(batch(), taps=("blocks.7",))
    with pytest.raises(ShapeError, match="tap 'norm' or"):
        student(batch(), taps=("blocks.0.attn",))


# Prepended prompts


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "kd", [None, KDP, KDPrompts(length=4, strict=True), KDPrompts(layers=1, position="start", init="zeros")]
)
@pytest.mark.parametrize("prompts", [CODA2, APT()])
def test_last_block_of_the_read_tokens_alone_equals_the_whole(
    prompts: Any, kd: Any, mode: bool, net: Any, batch: Any
) -> None:
    model = net(prompts, kd=kd).train(mode)
    for parameter in model.prompts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    short, whole = model(batch()), model(batch(), taps=("norm",))
    torch.testing.assert_close(short.logits, whole.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short.soft, whole.soft, rtol=1e-4, atol=1e-5)
    ours, theirs = (grads(said.logits.square().sum() + said.soft.sum(), model) for said in (short, whole))
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()) + 1e-6
        )


def test_prepended_prompts_lengthen_the_sequence_and_are_read(net: Any, batch: Any) -> None:
    student = net(L2P(pool=4, length=3, top_k=2))
    torch.nn.init.normal_(student.head.weight, generator=torch.Generator().manual_seed(0))
    said = student(batch(), taps=("norm",))
    tokens = said.features["norm"]
    assert tokens.shape[1] == 17 + 6
    assert torch.allclose(said.logits, student.head(tokens[:, :6].mean(1)))


def test_prepended_prompts_carry_no_position(net: Any, batch: Any) -> None:
    student, data, entered = net(L2P(pool=4, length=3, top_k=2)), batch(), []
    student.backbone.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    query = student.query(data.inputs)
    entered.clear()
    student(replace(data, query=query))
    chosen = student.prompts(query).prepend
    own = student.backbone._pos_embed(student.backbone.patch_embed(data.inputs))
    assert torch.equal(entered[0], torch.cat((chosen, own), 1))


# Outputs


def test_terms_only_in_training(net: Any, batch: Any) -> None:
    student = net(L2P(pool=4, length=2, top_k=2))
    assert set(student.train()(batch()).losses) == {"prompt"}
    assert not student.eval()(batch()).losses
    assert not net(CODA2).train()(batch()).losses


def test_prefix_prompts_are_told(net: Any, batch: Any) -> None:
    said = net(CODA2)(batch())
    assert set(said.prompts) == {0, 1}
    assert said.prompts[0][0].shape == (4, 2, 24)


def test_half_precision_chooses_in_full(net: Any, batch: Any) -> None:
    student = net(CODA(pool=6, length=4, blocks=(0, 1)), kd=KDP).train()
    query = torch.rand(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = student(batch(query=query))
    assert said.prompts[0][0].dtype == torch.float32
    full = student(batch(query=query))
    assert torch.allclose(said.logits.float(), full.logits, atol=0.1)
    said.logits.float().sum().backward()
    assert student.prompts.prompts.grad.isfinite().all()


def test_same_generator_same_network(net: Any, batch: Any) -> None:
    one, other = net(CODA2, kd=KDP), net(CODA2, kd=KDP)
    torch.manual_seed(123)
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
