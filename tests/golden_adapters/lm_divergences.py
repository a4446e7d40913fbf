"""Adapters of token divergences, top tokens, sorted tokens and on-policy data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import losses

NO_LABEL = -100
Adapter = Callable[[Any], dict[str, Any]]


def mean_of(divergence: Callable[[dict[str, Any]], losses.Divergence]) -> Adapter:
    """The mean of a divergence over the labels that count."""

    def adapter(case: Any) -> dict[str, Any]:
        student, mask = case.leaf("student_logits"), case["labels"] != NO_LABEL
        loss = losses.token_divergence(divergence(case.args), student, case["teacher_logits"], mask=mask)
        return {"out_loss": loss, **case.grads(loss, student_logits=student)}

    return adapter


def adaptive_kl(case: Any) -> dict[str, Any]:
    divergence = losses.AdaptiveKL(case.args["mu"])
    head = divergence.head_weight(losses.pair_of(case["student_logits"], case["teacher_logits"]))
    return {**mean_of(lambda _: divergence)(case), "out_head_weight": head, "out_tail_weight": 1 - head}


def gkd_jsd_loss(case: Any) -> dict[str, Any]:
    args, student, mask = case.args, case.leaf("student_logits"), case["labels"] != NO_LABEL
    items, how = args.get("num_items_in_batch"), args.get("reduction", "batchmean")
    loss = losses.token_divergence(
        losses.JSD(args["beta"]),
        student,
        case["teacher_logits"],
        args.get("temperature", 1.0),
        mask=mask,
        reduction="mean" if items is None and how == "batchmean" else "sum",
    )
    if items is not None:
        loss = loss / items
    elif how == "mean":  # over tokens and vocabulary
        loss = loss / (mask.sum() * student.shape[-1])
    elif how not in ("batchmean", "sum"):
        raise ValueError(f"reduction {how!r} is none of limbeck's")
    return {"out_loss": loss, **case.grads(loss, student_logits=student)}


def topk_forward_kl(case: Any) -> dict[str, Any]:
    args, student = case.args, case.leaf("student_logits")
    teacher = losses.TopTokens(case["teacher_topk_ids"], case["teacher_topk_logprobs"], args["add_tail"])
    loss = losses.top_divergence(
        losses.ForwardKL(), student, teacher, args["temperature"], mask=case["labels"] != NO_LABEL
    )
    return {"out_loss": loss, **case.grads(loss, student_logits=student)}


def answer(labels: Tensor) -> Tensor:
    """The positions that predict the answer, where labels stand at their own: the official code's span."""
    counts = labels != NO_LABEL
    first = torch.where(counts[:, 0], 0, (~counts).long().cumprod(1).sum(1) - 1)
    place = torch.arange(labels.shape[1])
    return (place >= first[:, None]) & (place < (first + counts.sum(1))[:, None])


def uld(case: Any) -> dict[str, Any]:
    args, student, labels = case.args, case.leaf("student_logits"), case["student_labels"]
    loss = args["distillation_weight"] * losses.uld(
        student,
        case["teacher_logits"],
        answer(labels),
        answer(case["teacher_labels"]),
        args["student_temperature"],
        args["teacher_temperature"],
    )
    if args["crossentropy_weight"]:
        hard = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss = loss + args["crossentropy_weight"] * hard
    return {"out_loss": loss, **case.grads(loss, student_logits=student)}


def on_policy_labels(case: Any) -> dict[str, Any]:
    generated = case["generated_sequences"]
    attention, labels = losses.on_policy_labels(
        case["prompt_attention_mask"], generated, case.args["eos_token_id"]
    )
    return {"out_input_ids": generated, "out_attention_mask": attention, "out_labels": labels}


def minillm_rkl_advantage(case: Any) -> dict[str, Any]:
    gamma, normalised = case.args["gamma"], case.args["length_normalization"]
    reward = losses.minillm_reward(case["student_logp"], case["teacher_logp"])
    mask = case["mask"]
    found = losses.minillm_advantage(reward, mask, gamma=gamma, length_normalised=normalised)
    if not normalised and gamma:  # the code discounts from the start of the text
        found = found * gamma ** torch.arange(found.shape[1])
    return {"out_advantage": found}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("lm-divergences", name): adapter
    for name, adapter in {
        "forward_kl": mean_of(lambda _: losses.ForwardKL(cross_entropy=True)),
        "reverse_kl": mean_of(lambda _: losses.ReverseKL()),
        "tv_distance": mean_of(lambda _: losses.TotalVariation()),
        "js_distance": mean_of(lambda args: losses.JSD(1 - args["lam"])),
        "skewed_forward_kl": mean_of(lambda args: losses.SkewForwardKL(args["lam"], cross_entropy=True)),
        "skewed_reverse_kl": mean_of(lambda args: losses.SkewReverseKL(args["lam"])),
        "adaptive_kl": adaptive_kl,
        "gkd_jsd_loss": gkd_jsd_loss,
        "topk_forward_kl": topk_forward_kl,
        "uld": uld,
        "on_policy_labels": on_policy_labels,
        "minillm_rkl_advantage": minillm_rkl_advantage,
    }.items()
}
