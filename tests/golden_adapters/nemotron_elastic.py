"""Adapters of Nemotron Elastic: importance, masks, the router, budgets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from limbeck import losses
from limbeck.nets.elastic import Options, Router, active_rms_norm

ACTIVATIONS = {"relu^2": lambda x: F.relu(x).square(), "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def probabilities(case: Any) -> dict[str, Any]:
    weights = case["weights"].tolist()
    return {
        "out_stage1": losses.budget_probabilities([1.0] * len(weights)),
        "out_stage2": losses.budget_probabilities(weights),
    }


def ffn(case: Any) -> dict[str, Any]:
    act, eps = ACTIVATIONS[case.args["activation"]], case.args["norm_eps"]
    x, weight, w1, w2 = (case[name] for name in ("x", "norm_weight", "w1", "w2"))
    channels, neurons = case["emb_mask"], case["ffn_mask"]
    y = F.linear(act(F.linear(active_rms_norm(x, weight, eps, channels), w1)) * neurons, w2) * channels
    c, n = channels.bool(), neurons.bool()
    small = nn.RMSNorm(int(c.sum()), eps, dtype=x.dtype)
    nn.init._no_grad_fill_(small.weight, 1.0)
    sliced = F.linear(act(F.linear(small(x[..., c]) * weight[c], w1[n][:, c])), w2[c][:, n])
    return {"out_y": y, "out_y_sliced": sliced}


def layers(case: Any) -> dict[str, Any]:
    score = losses.layer_importance(case["full_logits"], case["ablated_logits"])
    return {"out_score": score, "out_rank": losses.importance_ranks(score)}


def mamba(case: Any) -> dict[str, Any]:
    args = case.args
    found = losses.mamba_importance(case["normed"], case["wx"], args["heads"], args["top_channels"])
    heads = losses.importance_ranks(found.heads, args["groups"])
    channels = losses.importance_ranks(found.channels)
    mask = losses.mamba_mask(heads, channels, args["groups"], args["keep_heads"], args["keep_channels"])
    return {
        "out_scores": found.scores,
        "out_channel_score": found.channels,
        "out_head_score": found.heads,
        "out_head_pos": heads,
        "out_channel_pos": channels,
        "out_mask": mask.double(),
    }


def router(case: Any) -> dict[str, Any]:
    args, w2 = case.args, case.leaf("w2")
    counts = tuple(args["options"])
    options = Options(hidden=counts, ffn=counts, heads=counts, layers=counts)
    width, budgets = case["w1"].shape
    module = Router(budgets, options, torch.Generator().manual_seed(0), width, args["leaky_slope"]).double()
    weights = {"0.weight": case["w1"], "0.bias": case["b1"], "2.weight": w2, "2.bias": case["b2"]}
    z = torch.func.functional_call(module.heads["ffn"], weights, (case["onehot"],))
    pi = losses.gumbel_softmax(z, case["gumbel_noise"], args["tau"])
    masks = losses.prefix_masks(case["rank_pos"], counts)
    cost = losses.expected_cost(pi, torch.tensor(counts, dtype=pi.dtype))
    loss = losses.router_loss(cost, args["target_cost"])
    return {
        "out_z": z,
        "out_pi": pi,
        "out_masks": masks.double(),
        "out_soft_mask": losses.mixed_mask(masks, z, pi, "soft"),
        "out_hard_mask_train": losses.mixed_mask(masks, z, pi, "hard"),
        "out_mask_inference": masks[pi.argmax()].double(),
        "out_choice": pi.argmax(),
        "out_router_loss": loss,
        **case.grads(loss, w2=w2),
    }


def widths(case: Any) -> dict[str, Any]:
    x, weight = case["x"], case["norm_weight"]
    normed = active_rms_norm(x, weight, case.args["norm_eps"], torch.ones_like(weight))
    channels, neurons = losses.embedding_importance(normed), losses.ffn_importance(normed, case["w1"])
    return {
        "out_normed": normed,
        "out_embedding": channels,
        "out_ffn": neurons,
        "out_embedding_rank": losses.importance_ranks(channels),
        "out_ffn_rank": losses.importance_ranks(neurons),
    }


ADAPTERS = {
    ("nemotron-elastic", "budget_probabilities"): probabilities,
    ("nemotron-elastic", "elastic_ffn"): ffn,
    ("nemotron-elastic", "layer_importance"): layers,
    ("nemotron-elastic", "mamba_group_mask"): mamba,
    ("nemotron-elastic", "router"): router,
    ("nemotron-elastic", "width_importance"): widths,
}
