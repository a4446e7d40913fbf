"""Adapters of AdaSPEC and of speculative decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck import losses
from limbeck.losses.selective import gap_threshold, token_kl
from limbeck.metrics import speculative


def selective_kl(case: Any) -> dict[str, Any]:
    draft, labels, items = case.leaf("draft_logits"), case["labels"][:, 1:], case.args["num_items_in_batch"]
    target, reference = case["target_logits"][:, :-1], case["ref_logits"][:, :-1]
    own, mask, k = draft[:, :-1], labels != -100, case.args["k"]
    if items is None:
        loss = losses.selective_kl(own, target, reference, k, mask=mask)
    else:
        total = losses.selective_kl(own, target, reference, k, mask=mask, normalise="all", reduction="sum")
        loss = total / items
    kl, lag = token_kl(own, target)[mask], token_kl(reference, target)[mask]
    return {
        "out_loss": loss, "out_kl_draft": kl, "out_kl_ref": lag, "out_delta": kl - lag,
        "out_selected": losses.select(kl - lag, k), "out_threshold": gap_threshold(kl - lag, k),
        **case.grads(loss, draft_logits=draft),
    }  # fmt: skip


def speculative_verify(case: Any) -> dict[str, Any]:
    names = ("draft_probs", "target_probs", "draft_tokens", "u_accept", "u_final")
    found = speculative.speculative_verify(*(case[name] for name in names))
    return {f"out_{name}": value for name, value in found._asdict().items()}


def greedy_verify(case: Any) -> dict[str, Any]:
    accepted, token = speculative.greedy_verify(case["draft_tokens"], case["target_logits"])
    return {"out_n_accepted": accepted, "out_next_token": token}


def acceptance_probability(case: Any) -> dict[str, Any]:
    found = speculative.acceptance_probability(case["p"], case["q"])
    return {"out_acceptance": found, "out_total_variation": 1 - found}


def acceptance_rate(case: Any) -> dict[str, Any]:
    found = speculative.acceptance_rate(case["accepted_per_block"], case.args["gamma"])
    return {"out_alpha": found.alpha, "out_accept": found.accepted, "out_reject": found.rejected}


def block_efficiency(case: Any) -> dict[str, Any]:
    gamma, c = case.args["gamma"], case.args["c"]
    return {
        "out_tau": each(case["alpha"], lambda a: speculative.block_efficiency(a, gamma)),
        "out_speedup": each(case["alpha"], lambda a: speculative.speedup(a, gamma, c)),
    }


def each(values: Tensor, function: Any) -> Tensor:
    return torch.tensor([function(a) for a in values.tolist()], dtype=torch.float64)


ADAPTERS = {
    ("adaspec", "selective_kl"): selective_kl,
    ("adaspec", "speculative_verify"): speculative_verify,
    ("adaspec", "greedy_verify"): greedy_verify,
    ("adaspec", "acceptance_probability"): acceptance_probability,
    ("adaspec", "acceptance_rate"): acceptance_rate,
    ("adaspec", "block_efficiency"): block_efficiency,
}
