"""Adapters of AutoDistil: slices, relations, the search space."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from limbeck import losses
from limbeck.errors import ConfigError
from limbeck.losses.relation_heads import head_products
from limbeck.nets.search_space import Architecture, by_cost, kept_layers, released_parameters, search
from limbeck.nets.slices import Cut, kind_and_config, taken, without_weights


def layers(case: Any) -> dict[str, Any]:
    total, targets = int(case["num_layers"]), case["targets"].tolist()
    rows = [kept_layers(total, kept) for kept in targets]
    width = case.expected["out_kept"].shape[1]
    return {"out_kept": np.array([[*row, *[-1] * (width - len(row))] for row in rows])}


def relation(case: Any) -> dict[str, Any]:
    """An additive mask cancels in the raw form; under softmax it takes out keys, but no queries."""
    names = ("sq", "sk", "sv")
    own = {name: case.leaf(name) for name in names}
    other = case["tq"], case["tk"], case["tv"]
    form, heads, betas = case.args["form"], case.args["heads"], case.args["beta"]
    batch, count = own["sq"].shape[:2]
    if "attention_mask" in case and form == "softmax":
        seen = (case["attention_mask"].reshape(batch, 1, count) > -1).expand(batch, count, count)
        how = {"mask": seen, "weights": seen.sum(-1) / count}  # the code's mean is over all keys
    else:
        how = {}
    arguments = tuple(own.values()), other, heads
    parts = losses.relation_losses(*arguments, form=form, **how)
    loss = losses.relation_loss(*arguments, betas=betas, form=form, **how)
    return {"out_loss": loss, "out_parts": torch.stack(parts), **case.grads(loss, **own)}


def best(case: Any) -> dict[str, Any]:
    try:
        found = search(case["losses"].tolist(), case["costs"].tolist(), case.args["limit"])
    except ConfigError:
        found = -1
    return {"out_index": np.array(found)}


def space(case: Any) -> dict[str, Any]:
    args = case.args
    multiples = {
        Architecture(round(n * args["L"]), round(d * args["H"]), r, round(h * args["A"])): (n, h, d, r)
        for n in case["depth_mult"].tolist()
        for h in case["head_mult"].tolist()
        for d in case["hidden_mult"].tolist()
        for r in case["mlp_ratio"].tolist()
    }

    def cost(architecture: Architecture) -> float:
        return released_parameters(
            architecture,
            most_heads=args["A"],
            vocabulary=args["vocab"],
            positions=args["max_pos"],
            types=args["type_vocab"],
        )

    ordered = by_cost(tuple(multiples), cost)
    return {
        "out_params_sorted": np.array([cost(a) for a in ordered]),
        "out_subnets_sorted": np.array([multiples[a] for a in ordered]),
    }


def bert(hidden: int, heads: int, neurons: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=2,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=neurons,
        max_position_embeddings=2,
    )
    with torch.device("meta"):
        return BertModel(config)


AXES = {"hid": "hidden", "inter": "ffn"}


def linear(case: Any) -> dict[str, Any]:
    args, weight = case.args, case["weight"]
    inner, outer = args["kind"]
    full = {inner: weight.shape[1], outer: weight.shape[0]}
    hidden = full["hid"] if "hid" in full else full["inter"] // 4
    architecture = Architecture(1, round(hidden * args["hidden_mult"]), args["mlp_ratio"], 1)
    cut = Cut((0,), architecture.hidden, architecture.ffn, 1, 1)
    network = bert(hidden, 1, full.get("inter", 4 * hidden))
    along = AXES.get(outer), AXES.get(inner)
    bias = taken(case["bias"], along[:1], cut, network) if "bias" in case else None
    return {"out_y": F.linear(case["x"], taken(weight, along, cut, network), bias)}


def attention(case: Any) -> dict[str, Any]:
    args = case.args
    hidden, heads = args["hidden_size"], args["heads"]
    cut = Cut((0,), round(hidden * args["hidden_mult"]), 1, *[round(heads * args["head_mult"])] * 2)
    network = bert(hidden, heads, 4 * hidden)
    small = without_weights(network, cut)
    module = small.get_submodule("encoder.layer.0.attention.self")
    assert kind_and_config(network, cut)[0] is type(small)
    weights: dict[str, Tensor] = {}
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        weights[f"{name}.weight"] = taken(case[f"w{letter}"], ("query", "hidden"), cut, network)
        weights[f"{name}.bias"] = taken(case[f"b{letter}"], ("query",), cut, network)
    x, mask = case["x"], case["attention_mask"]
    context, _ = functional_call(module.eval(), weights, (x,), {"attention_mask": mask})
    q, k, v = (F.linear(x, weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in ("query", "key", "value"))
    own = args["teacher_relation_heads"]
    return {
        "out_context": context,
        "out_scores": head_products(q, k, cut.heads) + mask,
        "out_qq": head_products(q, q, own) + mask,
        "out_kk": head_products(k, k, own) + mask,
        "out_vv": head_products(v, v, own) + mask,
    }


ADAPTERS = {
    ("autodistil", "kept_layers"): layers,
    ("autodistil", "relation_loss"): relation,
    ("autodistil", "search"): best,
    ("autodistil", "search_space_params"): space,
    ("autodistil", "sliced_linear"): linear,
    ("autodistil", "subnet_attention"): attention,
}
