"""What must be true of a super network and of the students cut out of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nets.small_transformers import bert, ids, llama
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import relation_loss
from limbeck.metrics.cost import parameters
from limbeck.nets.search_space import Architecture, SearchSpace, sandwich
from limbeck.nets.slices import without_weights
from limbeck.nets.supernet import Supernet, last_projections, projection_taps

LLAMAS = {
    "llama": lambda: llama(),
    "tied": lambda: llama(tie_word_embeddings=True),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: llama("Mistral"),
    "qwen2": lambda: llama("Qwen2"),
    "qwen3": lambda: llama("Qwen3", tie_word_embeddings=True),
}
NETWORKS = LLAMAS | {"bert": bert, "masked bert": lambda: bert("BertForMaskedLM")}
every = pytest.mark.parametrize("name", NETWORKS)
SOME = [Architecture(3, 20, 2.5, 2), Architecture(2, 24, 2.0, 1), Architecture(1, 16, 1.0, 4)]


def first(output: Any) -> Tensor:
    found: Tensor = output[0]
    return found


@every
def test_the_whole_network_is_reproduced_bit_for_bit(name: str) -> None:
    network, x = NETWORKS[name](), ids()
    layers = network.config.num_hidden_layers
    for whole in (None, Architecture(layers, 32, network.config.intermediate_size / 32, 4)):
        assert torch.equal(first(Supernet(network)(x, whole)), first(network(x)))


@every
@pytest.mark.parametrize("architecture", SOME, ids=str)
def test_a_student_gives_what_its_part_of_the_super_network_gives(
    name: str, architecture: Architecture, tmp_path: Path
) -> None:
    supernet, x = Supernet(NETWORKS[name]()), ids()
    student = supernet.student(architecture)
    assert parameters(student) == supernet.parameters_of(architecture)
    inside = first(supernet(x, architecture))
    torch.testing.assert_close(first(student(x)), inside, rtol=0, atol=1e-6)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    torch.testing.assert_close(first(loaded(x)), inside, rtol=0, atol=1e-6)


def test_a_small_llama_with_copied_slices_is_the_sub_network() -> None:
    network, x, d, f = llama(), ids(), 16, 40
    small = llama(
        hidden_size=d, intermediate_size=f, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    with torch.no_grad():
        for own, other in (
            (small.model.embed_tokens, network.model.embed_tokens),
            (small.lm_head, network.lm_head),
        ):
            own.weight.copy_(other.weight[:, :d])
        small.model.norm.weight.copy_(network.model.norm.weight[:d])
        for own, place in zip(small.model.layers, (0, 2), strict=True):
            other = network.model.layers[place]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                getattr(own, norm).weight.copy_(getattr(other, norm).weight[:d])
            own.self_attn.q_proj.weight.copy_(other.self_attn.q_proj.weight[:16, :d])
            own.self_attn.k_proj.weight.copy_(other.self_attn.k_proj.weight[:8, :d])
            own.self_attn.v_proj.weight.copy_(other.self_attn.v_proj.weight[:8, :d])
            own.self_attn.o_proj.weight.copy_(other.self_attn.o_proj.weight[:d, :16])
            own.mlp.gate_proj.weight.copy_(other.mlp.gate_proj.weight[:f, :d])
            own.mlp.up_proj.weight.copy_(other.mlp.up_proj.weight[:f, :d])
            own.mlp.down_proj.weight.copy_(other.mlp.down_proj.weight[:d, :f])
    found = Supernet(network)(x, Architecture(2, d, 2.5, 2)).logits
    torch.testing.assert_close(found, small(x).logits, rtol=0, atol=1e-6)


def test_a_bert_with_heads_of_their_own_size_written_out() -> None:
    """One layer of width 20 with 3 heads of 8: a form that transformers' BERT does not have."""
    network, x, d, heads = bert(num_hidden_layers=1), ids(), 20, 3
    rows, f = 8 * heads, 50
    w = network.state_dict()

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (d,), w[f"{name}.weight"][:d], w[f"{name}.bias"][:d], 1e-12)

    def linear(y: Tensor, name: str, out: int) -> Tensor:
        path = f"encoder.layer.0.{name}"
        return F.linear(y, w[f"{path}.weight"][:out, : y.shape[-1]], w[f"{path}.bias"][:out])

    y = w["embeddings.word_embeddings.weight"][x] + w["embeddings.position_embeddings.weight"][: x.shape[1]]
    y = norm((y + w["embeddings.token_type_embeddings.weight"][0])[..., :d], "embeddings.LayerNorm")
    q, k, v = (
        linear(y, f"attention.self.{n}", rows).reshape(2, 7, heads, 8).transpose(1, 2)
        for n in ("query", "key", "value")
    )
    context = ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).reshape(2, 7, rows)
    y = norm(y + linear(context, "attention.output.dense", d), "encoder.layer.0.attention.output.LayerNorm")
    z = linear(F.gelu(linear(y, "intermediate.dense", f)), "output.dense", d)
    expected = norm(y + z, "encoder.layer.0.output.LayerNorm")
    found = Supernet(network)(x, Architecture(1, d, 2.5, heads)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_students_load_through_the_auto_classes(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    odd = Architecture(2, 21, 2.0, 4)  # Llama's configuration refuses 21 channels for 4 heads
    student, x = Supernet(llama()).student(odd), ids()
    student.save_pretrained(tmp_path / "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert loaded.config.model_type == "mistral"
    assert torch.equal(loaded(x).logits, student(x).logits)
    encoder = Supernet(bert()).student(odd)
    encoder.save_pretrained(tmp_path / "bert")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bert")(x)[0], encoder(x)[0])


def test_a_student_of_a_student() -> None:
    small, x = Architecture(2, 20, 2.0, 3), ids()
    again = Supernet(Supernet(bert()).student(small))
    assert torch.equal(
        first(again(x, Architecture(1, 12, 2.0, 2))), first(Supernet(bert())(x, Architecture(1, 12, 2.0, 2)))
    )


@every
@pytest.mark.parametrize("architecture", SOME[:2], ids=str)
def test_gradients_touch_the_slice_alone(name: str, architecture: Architecture) -> None:
    supernet, x = Supernet(NETWORKS[name]()), ids()
    first(supernet(x, architecture)).square().sum().backward()
    student = supernet.student(architecture)
    grads = {n: p.grad for n, p in supernet.network.named_parameters() if p.grad is not None}
    assert sum(int((g != 0).sum()) for g in grads.values()) <= parameters(student)
    with torch.no_grad():  # what got no gradient may move
        for n, p in supernet.network.named_parameters():
            p.add_((grads[n] == 0).to(p) if n in grads else 1.0)
    torch.testing.assert_close(first(supernet(x, architecture)), first(student(x)), rtol=0, atol=1e-5)


def test_extraction_and_evaluation_change_nothing() -> None:
    supernet, x = Supernet(llama().train()), ids()
    before, state = torch.random.get_rng_state(), {k: v.clone() for k, v in supernet.state_dict().items()}
    with torch.no_grad():
        for architecture in SOME:
            supernet(x, architecture)
            assert not supernet.student(architecture).training
    assert supernet.network.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert supernet.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in supernet.state_dict().items())


def test_a_student_has_weights_of_its_own() -> None:
    supernet, x = Supernet(llama(tie_word_embeddings=True)), ids()
    student = supernet.student(SOME[0])
    said = student(x).logits
    with torch.no_grad():
        for parameter in supernet.network.parameters():
            parameter.zero_()
    assert torch.equal(student(x).logits, said)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_the_parameter_count_rises_on_every_axis() -> None:
    supernet = Supernet(llama())
    count = supernet.parameters_of(Architecture(2, 16, 2.0, 2))
    for larger in ((3, 16, 2.0, 2), (2, 20, 2.0, 2), (2, 16, 2.5, 2), (2, 16, 2.0, 4)):
        assert supernet.parameters_of(Architecture(*larger)) > count


@every
def test_projections_are_those_of_the_last_layer(name: str) -> None:
    supernet, x = Supernet(NETWORKS[name]()), ids()
    for architecture in (None, *SOME):
        network = supernet.network if architecture is None else supernet.student(architecture)
        found = supernet.projections(x, architecture)
        for own, other in zip(found, last_projections(network, x), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
        heads = 4 if architecture is None else architecture.heads
        assert found[0].shape == (2, 7, 8 * heads)
    last = len(supernet.cut(None).layers) - 1
    assert f".{last}." in projection_taps(supernet.network)[0]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_sandwich_step_lowers_the_relation_loss_of_every_sub_network(name: str) -> None:
    space = SearchSpace((1, 3), (16, 24), (2.0, 3.0), (2, 4))
    teacher, supernet, x = NETWORKS[name](), Supernet(NETWORKS[name]()), ids(0, 8, 9)
    with torch.no_grad():
        wanted = last_projections(teacher, x)
    optimiser = torch.optim.Adam(supernet.parameters(), lr=1e-3)

    def loss(architecture: Architecture) -> Tensor:
        return relation_loss(supernet.projections(x, architecture), wanted, 4, causal=name == "llama")

    with torch.no_grad():
        before = {a: float(loss(a)) for a in space.architectures()}
    for step in range(12):
        chosen = sandwich(space, 2, torch.Generator().manual_seed(step))
        torch.stack([loss(a) for a in chosen]).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        after = {a: float(loss(a)) for a in space.architectures()}
    assert all(after[a] < before[a] for a in before)


def test_grouped_queries_are_kept_by_whole_groups() -> None:
    supernet = Supernet(llama())
    assert [supernet.cut(Architecture(1, 16, 2.0, h)).key_heads for h in (1, 2, 4)] == [1, 1, 2]
    with pytest.raises(ConfigError, match="heads is 3 but the network's queries come in groups of 2"):
        supernet.cut(Architecture(1, 16, 2.0, 3))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (Architecture(5, 16, 2.0, 2), "layers is 5 but must be from 1 to the 4"),
        (Architecture(2, 33, 2.0, 2), "hidden is 33 but must be from 1 to the network's 32"),
        (Architecture(2, 32, 4.0, 2), "ffn is 128 but must be from 1 to the network's 96"),
        (Architecture(2, 16, 2.0, 6), "heads is 6 but must be from 1 to the network's 4"),
    ],
)
def test_a_sub_network_that_is_larger_than_the_network(architecture: Architecture, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Supernet(llama()).student(architecture)


def test_networks_that_cannot_be_cut() -> None:
    from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    with pytest.raises(ConfigError, match="belongs to no Llama-like or BERT-like network"):
        Supernet(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)))
    network = llama()
    network.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 90, bias=False)
    with pytest.raises(ShapeError, match="but its configuration says"):
        Supernet(network)
    biased = Supernet(llama(attention_bias=True))
    with pytest.raises(ConfigError, match="let the heads divide the width"):
        biased.student(Architecture(1, 21, 2.0, 4))
    with pytest.raises(ConfigError, match="belongs to no"):
        Supernet(BertForSequenceClassification(bert().config))
    assert without_weights(llama(), Supernet(llama()).cut(None)).device.type == "meta"
