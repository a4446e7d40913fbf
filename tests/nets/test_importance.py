"""What must be true of importance measured on a transformer and of the order it is put into."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nets.small_transformers import bert, ids, llama
from torch import Tensor

from limbeck.errors import ConfigError, NonFiniteError
from limbeck.losses import layer_importance
from limbeck.nets.elastic import ElasticLM, Sizes
from limbeck.nets.importance import (
    Importance,
    only_layers,
    rank_layers,
    removal_scores,
    sort_by_importance,
    width_importance,
)
from limbeck.nets.taps import capture

NETWORKS = {
    "llama": lambda: llama(),
    "tied": lambda: llama(tie_word_embeddings=True),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen3": lambda: llama("Qwen3"),
}
every = pytest.mark.parametrize("name", NETWORKS)
TEXTS = [ids(0), ids(1)]


@every
def test_sorting_by_importance_changes_no_output(name: str) -> None:
    network, x = NETWORKS[name](), ids(7)
    found = sort_by_importance(network, width_importance(network, TEXTS))
    said = network(x).logits
    torch.testing.assert_close(found(x).logits, said, rtol=0, atol=1e-5 * float(said.detach().abs().max()))
    again = width_importance(found, TEXTS)
    assert (again.hidden.diff() <= 1e-3).all()
    assert (again.ffn.diff(dim=1) <= 1e-3).all()
    assert (again.heads.reshape(4, 2, 2).diff(dim=2) <= 1e-3).all()


def test_scores_are_sums_over_norms_tokens_and_texts() -> None:
    network = llama()
    taps = [
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in range(4) for n in ("input", "post_attention")),
    ]
    expected = torch.zeros(32)
    gated = torch.zeros(96)
    for text in TEXTS:
        with (
            torch.no_grad(),
            capture(network, [*taps, "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"]) as at,
        ):
            network(text)
        expected += torch.stack([at[tap].abs().sum((0, 1)) for tap in taps]).sum(0)
        neurons = F.silu(at["model.layers.2.mlp.gate_proj"]) * at["model.layers.2.mlp.up_proj"]
        gated += neurons.abs().sum((0, 1))
    found = width_importance(network, TEXTS)
    torch.testing.assert_close(found.hidden, expected)
    torch.testing.assert_close(found.ffn[2], gated)
    assert found.heads.shape == (4, 4)


def test_the_most_important_come_first() -> None:
    network = llama()
    scores = Importance(
        torch.arange(32.0), torch.arange(96.0).expand(4, 96), torch.tensor([[1.0, 2, 4, 3]] * 4)
    )
    found, old = sort_by_importance(network, scores), network.model.layers[1]
    new = found.model.layers[1]
    assert torch.equal(found.model.embed_tokens.weight, network.model.embed_tokens.weight.flip(1))
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight.flip(0, 1))
    heads = old.self_attn.q_proj.weight.flip(1).reshape(4, 8, 32)
    assert torch.equal(new.self_attn.q_proj.weight, heads[[1, 0, 2, 3]].reshape(32, 32))
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight.flip(1))


def test_calibration_runs_without_dropout_and_changes_nothing() -> None:
    network = llama(attention_dropout=0.5)
    plain, state = width_importance(network, TEXTS), {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    again = width_importance(network, TEXTS)
    ranks = rank_layers(network, TEXTS)
    assert network.training
    assert all(torch.equal(a, b) for a, b in zip(vars(plain).values(), vars(again).values(), strict=True))
    assert torch.equal(ranks, rank_layers(network.eval(), TEXTS))
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def idle(network: Any, layer: int) -> Any:
    """The network with a layer that adds nothing."""
    for part in (network.model.layers[layer].self_attn.o_proj, network.model.layers[layer].mlp.down_proj):
        torch.nn.init.zeros_(part.weight)
    return network


def test_a_layer_that_does_nothing_is_the_least_important() -> None:
    network = idle(llama(), 1)
    assert rank_layers(network, TEXTS)[1] == 3
    scores = removal_scores(network, TEXTS, (0, 1, 2, 3))
    assert scores[1] == 0
    assert (scores[[0, 2, 3]] > 0).all()


def test_scores_are_those_of_equation_5_and_the_first_to_go_is_the_least() -> None:
    network, both = llama(), torch.cat(TEXTS)
    with torch.no_grad():
        full = network(both).logits
        ablated = []
        for layer in range(4):
            with only_layers(network, tuple(i for i in range(4) if i != layer)):
                ablated.append(network(both).logits)
    scores = layer_importance(full, torch.stack(ablated))
    torch.testing.assert_close(removal_scores(network, TEXTS, (0, 1, 2, 3)).float(), scores)
    ranks = rank_layers(network, TEXTS)
    assert ranks[scores.argmin()] == 3
    assert sorted(ranks.tolist()) == [0, 1, 2, 3]


def test_later_rounds_measure_without_the_layers_that_went() -> None:
    network = llama()
    ranks = rank_layers(network, TEXTS)
    left = tuple(i for i in range(4) if ranks[i] < 3)
    second = removal_scores(network, TEXTS, left)
    assert ranks[left[int(second.argmin())]] == 2


def test_a_network_of_one_layer() -> None:
    network = llama(num_hidden_layers=1)
    assert rank_layers(network, TEXTS).tolist() == [0]
    assert width_importance(network, TEXTS).ffn.shape == (1, 96)


def test_what_does_not_count_changes_nothing() -> None:
    network, whole = llama(), ids(3, 2, 9)
    real = torch.arange(9).expand(2, 9) < 6
    padded, masks = [torch.where(real, whole, 0)], [real]
    found, alone = width_importance(network, padded, masks), width_importance(network, [whole[:, :6]])
    for name in ("hidden", "ffn", "heads"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))
    left = (0, 1, 2, 3)
    torch.testing.assert_close(
        removal_scores(network, padded, left, masks), removal_scores(network, [whole[:, :6]], left)
    )


def test_packed_documents_are_read_apart() -> None:
    network, one, two = llama(), ids(3, 1, 9), ids(4, 1, 9)
    apart = [torch.cat([torch.zeros(1, 9), torch.ones(1, 9)], 1).long()]
    packed, single = [torch.cat([one, two], 1)], [torch.cat([one, two])]
    found, alone = width_importance(network, packed, None, apart), width_importance(network, single)
    for name in ("hidden", "ffn", "heads"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))
    left = (0, 1, 2, 3)
    wanted = removal_scores(network, single, left)
    torch.testing.assert_close(removal_scores(network, packed, left, None, apart), wanted)
    assert (removal_scores(network, packed, left) - wanted).abs().max() > 1e-4


def test_a_bias_of_the_logits_counts_in_their_scale_alone() -> None:
    network: Any = llama()
    network.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, network.config.vocab_size))
    with torch.no_grad():
        full = network(TEXTS[0]).logits
        with only_layers(network, (0, 2, 3)):
            ablated = network(TEXTS[0]).logits
    wanted = layer_importance(full, ablated[None])
    torch.testing.assert_close(removal_scores(network, TEXTS[:1], (0, 1, 2, 3))[1:2].float(), wanted)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="at least one batch"):
        width_importance(llama(), [])
    with pytest.raises(ConfigError, match="BertModel is no model of the Llama family"):
        width_importance(bert(), TEXTS)
    network = llama()
    with torch.no_grad():
        network.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="an activation of the hidden axis"):
        width_importance(network, TEXTS)
    with pytest.raises(NonFiniteError, match="the logits are no finite numbers"):
        rank_layers(network, TEXTS)


def tokens(text: str, vocabulary: dict[str, Any]) -> list[int]:
    """The ids of a text: single characters, then the best pair of neighbours joined until none is left."""
    pieces = vocabulary["pieces"]
    found = [pieces.index(c) for c in " " + text]
    while True:
        pairs = [pieces[a] + pieces[b] for a, b in pairwise(found)]
        known = [(vocabulary["scores"][pieces.index(p)], -i) for i, p in enumerate(pairs) if p in pieces]
        if not known:
            return [1, *found]
        place = -max(known)[1]
        found[place : place + 2] = [pieces.index(pairs[place])]


def stories() -> tuple[Any, Tensor]:
    """A real Llama of 260 thousand parameters and four paragraphs of what it was trained on."""
    import transformers
    from safetensors.torch import load_file

    folder = next((Path(f) for f in os.environ.get("LIMBECK_DATA", "").split(os.pathsep) if f), None)
    if folder is None or not (folder / "stories260k.safetensors").exists():
        pytest.skip("LIMBECK_DATA names no folder with stories260k.safetensors")
    config = json.loads((folder / "stories260k.config.json").read_text())
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    network.load_state_dict(load_file(folder / "stories260k.safetensors"), strict=False)
    network.tie_weights()
    vocabulary = json.loads((folder / "stories260k.tok512.json").read_text())
    with gzip.open(folder / "tinystories_sample.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(20_000)
    some = [line[:300] for line in text.splitlines() if len(line) > 300 and line.isascii()]
    return network.eval(), torch.tensor([tokens(line, vocabulary)[:80] for line in some[:4]])


def test_a_real_model() -> None:
    network, texts = stories()
    batches = [texts[:2], texts[2:]]

    def loss(model: Any) -> float:
        with torch.no_grad():
            logits = model(texts).logits
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten()))

    ranks = rank_layers(network, batches)
    by_rank = []
    for rank in range(5):
        with only_layers(network, tuple(layer for layer in range(5) if ranks[layer] != rank)):
            by_rank.append(loss(network))
    assert loss(network) < by_rank[4] < by_rank[0] == max(by_rank)
    found = sort_by_importance(network, width_importance(network, batches))
    assert loss(found) == pytest.approx(loss(network), abs=1e-4)
    ordered, as_it_was = ElasticLM(found, ranks), ElasticLM(network, ranks)
    for sizes in (Sizes(48, 172, 8, 5), Sizes(64, 128, 8, 5), Sizes(64, 172, 4, 5)):
        assert loss(ordered.slice_model(sizes)) < loss(as_it_was.slice_model(sizes))
