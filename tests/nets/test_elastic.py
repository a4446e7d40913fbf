"""What must be true of nested networks, of the masks that stand for them, and of the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nets.small_transformers import bert, ids, llama
from torch import Tensor

from limbeck.contracts import Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import gumbel_temperature, kl_divergence, router_logit_scale, router_loss
from limbeck.metrics.cost import parameters
from limbeck.nets.elastic import (
    AXES,
    ElasticLM,
    Masks,
    Options,
    Router,
    Sizes,
    active_rms_norm,
    expected_parameters,
    gumbel_noise,
    masked,
    route,
    routed_masks,
)
from limbeck.nets.taps import capture

NETWORKS = {
    "llama": lambda: llama(),
    "tied": lambda: llama(tie_word_embeddings=True),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: llama("Mistral"),
    "qwen2": lambda: llama("Qwen2"),
    "qwen3": lambda: llama("Qwen3"),
}
every = pytest.mark.parametrize("name", NETWORKS)
RANKS = torch.tensor([1, 3, 0, 2])
SMALL, MIDDLE = Sizes(hidden=20, ffn=40, heads=2, layers=2), Sizes(hidden=24, ffn=64, heads=4, layers=3)
OPTIONS = Options(hidden=(16, 24, 32), ffn=(32, 64, 96), heads=(2, 4), layers=(1, 2, 3, 4))


def elastic(name: str = "llama") -> ElasticLM:
    return ElasticLM(NETWORKS[name](), RANKS)


def close(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.detach().abs().max()))


def under(network: Any, masks: Masks, x: Tensor) -> Tensor:
    with masked(network, masks):
        logits: Tensor = network(x).logits
    return logits


@every
def test_the_full_budget_is_the_parent_exactly(name: str) -> None:
    parent, x = elastic(name), ids()
    said = parent.network(x).logits
    assert torch.equal(parent(x).logits, said)
    assert torch.equal(parent(x, parent.full).logits, said)
    assert torch.equal(under(parent.network, parent.masks(parent.full), x), said)
    assert torch.equal(parent.network(x).logits, said)  # no mask is left behind
    assert kl_divergence(parent(x).logits, said) == 0


@every
@pytest.mark.parametrize("sizes", [SMALL, MIDDLE, Sizes(32, 96, 4, 1), Sizes(2, 1, 2, 4)], ids=str)
def test_masked_sliced_and_stored_networks_are_one(name: str, sizes: Sizes, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    parent, x = elastic(name), ids()
    said = parent(x, sizes).logits
    close(under(parent.network, parent.masks(sizes), x), said)
    small = parent.slice_model(sizes)
    assert parameters(small) == parent.parameters_of(sizes)
    small.save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, said)


def test_layers_of_low_rank_are_kept_in_their_order() -> None:
    parent = elastic()
    assert [parent.cut(Sizes(32, 96, 4, n)).layers for n in (1, 2, 3, 4)] == [
        (2,),
        (0, 2),
        (0, 2, 3),
        (0, 1, 2, 3),
    ]
    assert parent.masks(SMALL).layers.tolist() == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match="layers is 5 but must be from 1 to 4"):
        parent.cut(Sizes(32, 96, 4, 5))


def test_inactive_channels_are_0_after_every_layer_and_left_out_layers_are_the_identity() -> None:
    parent, x = elastic(), ids()
    layers = [f"model.layers.{i}" for i in range(4)]
    with capture(parent.network, ["model.embed_tokens", *layers, "model.norm"]) as at:
        under(parent.network, parent.masks(SMALL), x)
    for tap in layers:
        assert at[tap][..., 20:].abs().max() == 0
        assert at[tap][..., :20].abs().min() > 0
    assert torch.equal(at["model.layers.1"], at["model.layers.0"])
    assert torch.equal(at["model.layers.3"], at["model.layers.2"])


def test_each_text_may_have_masks_of_its_own() -> None:
    parent, x = elastic(), ids()
    one, other = parent.masks(SMALL), parent.masks(MIDDLE)
    both = Masks(**{a: torch.stack([getattr(one, a), getattr(other, a)]) for a in AXES})
    found = under(parent.network, both, x)
    close(found[:1], parent(x[:1], SMALL).logits)
    close(found[1:], parent(x[1:], MIDDLE).logits)


def test_norms_run_over_active_channels() -> None:
    x, weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8)
    found = active_rms_norm(x, weight, 1e-5, torch.tensor([1.0] * 5 + [0.0] * 3))
    torch.testing.assert_close(found[:, :5], F.rms_norm(x[:, :5], (5,), weight[:5], 1e-5))
    assert found[:, 5:].abs().max() == 0


@every
def test_gradients_of_a_small_budget_stay_in_its_slice(name: str) -> None:
    parent, x = elastic(name), ids()
    sliced = torch.autograd.grad(
        parent(x, SMALL).logits.square().mean(), list(parent.parameters()), allow_unused=True
    )
    by_mask = torch.autograd.grad(
        under(parent.network, parent.masks(SMALL), x).square().mean(), list(parent.parameters())
    )
    size = 0
    for parameter, own, other in zip(parent.parameters(), sliced, by_mask, strict=True):
        own = torch.zeros_like(parameter) if own is None else own
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-6)
        size += int((own != 0).sum())
    assert 0 < size <= parent.parameters_of(SMALL)


def test_masks_are_nested_on_every_axis() -> None:
    for axis, masks in elastic().option_masks(OPTIONS).items():
        assert (masks[:-1] <= masks[1:]).all()
        assert masks.sum(1).tolist() == list(getattr(OPTIONS, axis))


def test_extraction_touches_no_training_state_and_stores_one_parent() -> None:
    parent = elastic().train()
    router = Router(3, OPTIONS, torch.Generator().manual_seed(0))
    keys, count = parent.state_dict().keys(), parameters(parent)
    draws = torch.random.get_rng_state()
    small = parent.slice_model(SMALL)
    with torch.no_grad():
        small.model.embed_tokens.weight.zero_()
    assert parent.network.training
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert parent.state_dict().keys() == keys
    assert count == parameters(parent.network) == parent.parameters_of(parent.full)
    assert parent.network.model.embed_tokens.weight.abs().min() > 0
    assert parameters(router) == 4 * (3 * 256 + 256) + 257 * (3 + 3 + 2 + 4)


def test_the_router_learns_through_soft_masks_and_hard_ones() -> None:
    parent, x = elastic(), ids()
    router = Router(3, OPTIONS, torch.Generator().manual_seed(0), width=8)
    budgets = torch.eye(3)[[0, 2]]
    choices, logits = parent.option_masks(OPTIONS), router(budgets)
    noise = gumbel_noise(logits, torch.Generator().manual_seed(1))
    probabilities = route(logits, noise, temperature=0.7, scale=2.0)
    for mode in ("soft", "hard"):
        masks = routed_masks(choices, logits, probabilities, mode)  # type: ignore[arg-type]
        said = under(parent.network, masks, x)
        grads = torch.autograd.grad(said.square().mean(), list(router.parameters()), retain_graph=True)
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in grads)


def test_the_same_seed_gives_the_same_noise_and_choice() -> None:
    router = Router(2, OPTIONS, torch.Generator().manual_seed(0))
    again = Router(2, OPTIONS, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), again.parameters(), strict=True))
    logits = router(torch.eye(2))
    one, other, third = (gumbel_noise(logits, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert all(torch.equal(one[a], other[a]) and not torch.equal(one[a], third[a]) for a in AXES)
    many = gumbel_noise({"x": torch.zeros(20_000)}, torch.Generator().manual_seed(0))["x"]
    assert float(many.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(many.var()) == pytest.approx(1.645, abs=0.06)
    budget = torch.tensor([1.0, 0.0])
    assert router.choose(budget) == again.choose(budget)


def test_expected_parameters_of_a_certain_choice_are_its_parameters() -> None:
    parent = elastic("tied")
    places = {"hidden": 1, "ffn": 0, "heads": 1, "layers": 2}
    sure = {a: F.one_hot(torch.tensor(p), len(getattr(OPTIONS, a))).double() for a, p in places.items()}
    sizes = Sizes(**{a: getattr(OPTIONS, a)[p] for a, p in places.items()})
    share = parent.parameters_of(sizes) / parameters(parent)
    assert float(expected_parameters(parent, OPTIONS, sure)) == pytest.approx(share)


def test_expected_parameters_are_the_mean_over_all_choices() -> None:
    parent = elastic()
    generator = torch.Generator().manual_seed(0)
    p = {a: torch.rand(len(getattr(OPTIONS, a)), generator=generator, dtype=torch.float64) for a in AXES}
    p = {a: v / v.sum() for a, v in p.items()}
    mean = 0.0
    for d, pd in zip(OPTIONS.hidden, p["hidden"], strict=True):
        for f, pf in zip(OPTIONS.ffn, p["ffn"], strict=True):
            for h, ph in zip(OPTIONS.heads, p["heads"], strict=True):
                for n, pn in zip(OPTIONS.layers, p["layers"], strict=True):
                    mean += float(pd * pf * ph * pn) * parent.parameters_of(Sizes(d, f, h, n))
    assert float(expected_parameters(parent, OPTIONS, p)) == pytest.approx(mean / parameters(parent))


def test_a_router_finds_sizes_for_its_budgets() -> None:
    parent, targets = elastic(), torch.tensor([0.3, 0.6, 1.0])
    router, generator = Router(3, OPTIONS, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    optimiser, steps = torch.optim.Adam(router.parameters(), lr=1e-2), 150
    for step in range(steps):
        at = Progress(step=step, steps=steps)
        logits = router(torch.eye(3))
        noise = gumbel_noise(logits, generator)
        found = route(logits, noise, gumbel_temperature(at), router_logit_scale(at))
        optimiser.zero_grad()
        router_loss(expected_parameters(parent, OPTIONS, found), targets).sum().backward()
        optimiser.step()
    for budget, target in zip(torch.eye(3), targets.tolist(), strict=True):
        sizes = router.choose(budget)
        assert parent.parameters_of(sizes) / parameters(parent) == pytest.approx(target, abs=0.08)


def test_one_layer_and_one_option_for_each_axis() -> None:
    parent = ElasticLM(llama(num_hidden_layers=1), torch.tensor([0]))
    options = Options((16,), (32,), (2,), (1,))
    router = Router(1, options, torch.Generator().manual_seed(0))
    assert router.choose(torch.ones(1)) == Sizes(16, 32, 2, 1)
    logits = router(torch.ones(1))
    masks = routed_masks(parent.option_masks(options), logits, route(logits, logits, 1.0))
    close(under(parent.network, masks, ids()), parent(ids(), Sizes(16, 32, 2, 1)).logits)


def test_bad_input() -> None:
    parent = elastic()
    with pytest.raises(ConfigError, match="heads is 3 but must be a multiple of the 2 key heads"):
        parent.option_masks(Options((16,), (32,), (3,), (1,)))
    with pytest.raises(ConfigError, match="heads is 3 but must be a multiple of the 2 key heads"):
        parent.slice_model(Sizes(16, 32, 3, 1))
    with pytest.raises(ConfigError, match="count is 97 but must be from 1 to 96"):
        parent.option_masks(Options((16,), (97,), (2,), (1,)))
    with pytest.raises(ConfigError, match="hidden is 0 but must be from 1"):
        parent.slice_model(Sizes(0, 32, 2, 1))
    with pytest.raises(ConfigError, match=r"layer_ranks is \[0, 0, 1, 2\] but must hold 0 to 3 once each"):
        ElasticLM(llama(), torch.tensor([0, 0, 1, 2]))
    with pytest.raises(ConfigError, match="BertModel is no model of the Llama family"):
        ElasticLM(bert(), torch.arange(3))
    network = llama()
    network.model.layers[1].input_layernorm.register_forward_hook(
        lambda _m, _g, output: 2 * output, prepend=True
    )
    with pytest.raises(ShapeError, match="LlamaForCausalLM gives something else under a mask of ones"):
        ElasticLM(network, RANKS)
    with pytest.raises(ShapeError, match="GemmaRMSNorm is no norm of the Llama family"):
        ElasticLM(llama("Gemma"), RANKS)
