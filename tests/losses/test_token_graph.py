"""What must be true of the graphs of tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses import context, contextual, global_graph, knn_affinity, local_graph, tokenise

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patches_stand_row_by_row_and_channel_by_channel() -> None:
    feature = torch.arange(2 * 5 * 4, dtype=torch.float64).reshape(1, 2, 5, 4)
    tokens = tokenise(feature, 2)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 22, 23, 26, 27]
    assert torch.equal(tokenise(feature), feature.flatten(2).mT)


@given(seeds, st.integers(1, 12), st.floats(0.3, 3))
def test_each_column_has_k_edges_and_the_diagonal_none(seed: int, neighbours: int, sigma: float) -> None:
    graph = knn_affinity(draw(seed, 8, 3), neighbours, sigma)
    assert (graph > 0).sum(0).tolist() == [min(neighbours, 7)] * 8
    assert graph.max() <= 1
    assert graph.diagonal().abs().max() == 0


@given(seeds)
def test_rotation_and_translation_change_no_edge(seed: int) -> None:
    tokens = draw(seed, 8, 3)
    rotation, _ = torch.linalg.qr(draw(seed + 1, 3, 3))
    torch.testing.assert_close(
        knn_affinity(tokens @ rotation + draw(seed + 2, 3), 3), knn_affinity(tokens, 3)
    )


def test_all_neighbours_make_it_symmetric_and_a_wide_kernel_makes_it_0_and_1() -> None:
    tokens = draw(0, 8, 3)
    full = knn_affinity(tokens, 7)
    torch.testing.assert_close(full, full.mT)
    graph = knn_affinity(tokens, 3, 1e12)
    torch.testing.assert_close(graph, (knn_affinity(tokens, 3) > 0).double())


def test_the_same_features_have_no_local_or_contextual_difference() -> None:
    tokens = draw(0, 2, 4, 3)
    graph = knn_affinity(tokens.flatten(0, 1), 3)
    assert local_graph(graph, graph) == local_graph(graph, graph, student_first=False) == 0
    assert contextual(tokens, tokens) == 0
    assert global_graph(tokens[0], tokens[0], 0.5) > 0


def test_the_two_orders_of_the_divergence() -> None:
    own, other = knn_affinity(draw(0, 6, 3), 2), knn_affinity(draw(1, 6, 3), 2)
    p, q = own.softmax(-1), other.softmax(-1)
    for first, expected in ((True, p * (p / q).log()), (False, q * (q / p).log())):
        found = local_graph(own, other, student_first=first, reduction="sum")
        torch.testing.assert_close(found, expected.sum())


def test_nodes_may_be_permuted_together_but_not_apart() -> None:
    own, other, order = draw(0, 8, 3), draw(1, 8, 3), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    plain = local_graph(knn_affinity(own, 3), knn_affinity(other, 3))
    torch.testing.assert_close(local_graph(knn_affinity(own[order], 3), knn_affinity(other[order], 3)), plain)
    torch.testing.assert_close(global_graph(own[order], other[order], 0.5), global_graph(own, other, 0.5))
    assert abs(global_graph(own, other[order], 0.5) - global_graph(own, other, 0.5)) > 0.01


def test_one_node_and_one_token_give_zero() -> None:
    one = draw(0, 1, 3)
    assert global_graph(one, draw(1, 1, 3), 0.1) == 0
    assert knn_affinity(one, 8).tolist() == [[0]]
    assert local_graph(knn_affinity(one, 8), knn_affinity(one, 8)) == 0
    assert contextual(draw(0, 2, 1, 3), draw(1, 2, 1, 5)) == 0


def test_equal_and_empty_tokens_give_no_nan() -> None:
    for tokens in (torch.ones(5, 3), torch.zeros(5, 3)):
        leaf = tokens.clone().requires_grad_()
        graph = knn_affinity(F.normalize(leaf, dim=-1), 2)
        loss = local_graph(graph, graph.detach()) + global_graph(leaf, tokens, 0.1)
        (loss + contextual(leaf[None], tokens[None])).backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()


def test_an_infinite_temperature_tells_no_tokens_apart() -> None:
    loss = global_graph(draw(0, 6, 3), draw(1, 6, 3), 1e9, reduction="sum")
    torch.testing.assert_close(loss.item(), 6 * math.log(6))


def test_the_context_compares_networks_of_any_width() -> None:
    own, other = draw(0, 2, 4, 3).requires_grad_(), draw(1, 2, 4, 7)
    torch.testing.assert_close(context(other).sum(-1), torch.ones(2, 4, dtype=torch.float64))
    contextual(own, other).backward()
    assert own.grad.abs().min() > 0
    with pytest.raises(ShapeError, match=r"\[2, 4\].*\[2, 3\]"):
        contextual(own, other[:, :3])


def test_weights_count_nodes_and_images() -> None:
    own, other = draw(0, 4, 2, 3), draw(1, 4, 2, 5)
    weights = torch.tensor([2.0, 0, 1, 1], dtype=torch.float64)
    items = torch.stack([contextual(own[i : i + 1], other[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(contextual(own, other, weights=weights), (weights * items).mean())
    near, far = own[:, 0], other[:, 0, :3]
    items = global_graph(near, far, 0.5, reduction="none")
    torch.testing.assert_close(global_graph(near, far, 0.5, weights=weights), (weights * items).mean())
