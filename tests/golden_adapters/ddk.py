"""Adapters of DDK."""

from __future__ import annotations

from typing import Any

import torch

from limbeck import losses
from limbeck.data import domains as sampling
from limbeck.losses.divergences import ForwardKL, ReverseKL, token_divergence
from limbeck.metrics import domains

DIRECTIONS = {"forward": ForwardKL(), "reverse": ReverseKL()}


def domain_perplexity(case: Any) -> dict[str, Any]:
    return {"out_ppl": domains.domain_perplexity(case["nll_sum"], case["token_count"])}


def initial_factor(case: Any) -> dict[str, Any]:
    return {"out_r": domains.initial_factor(case["ppl_student"], case["ppl_teacher"])}


def update_factor(case: Any) -> dict[str, Any]:
    found = domains.update_factor(case["r"], case["ppl_student"], case["ppl_teacher"], case.args["alpha"])
    return {"out_r_next": found}


def factor_trajectory(case: Any) -> dict[str, Any]:
    student, teacher = case["ppl_student"], case["ppl_teacher"]
    shares = [domains.initial_factor(student[0], teacher)]
    for now in student[1:]:
        shares.append(domains.update_factor(shares[-1], now, teacher, case.args["alpha"]))
    return {"out_r": torch.stack(shares)}


def ddk_loss(case: Any) -> dict[str, Any]:
    """The two terms that the recipe lists, added."""
    student, teacher, labels, args = (
        case.leaf("student_logits"),
        case["teacher_logits"],
        case["labels"],
        case.args,
    )
    mask = labels != -100
    hard = losses.cross_entropy(student, labels.clamp(min=0), mask=mask)
    soft = token_divergence(DIRECTIONS[args["direction"]], student, teacher, args["T"], mask=mask)
    loss = hard + args["gamma"] * soft
    return {"out_loss": loss, "out_ce": hard, "out_kl": soft, **case.grads(loss, student_logits=student)}


def cyclic_indices(case: Any) -> dict[str, Any]:
    return {"out_index": sampling.cyclic_indices(case.inputs["draws"], case.inputs["sizes"].tolist())}


ADAPTERS = {
    ("ddk", "domain_perplexity"): domain_perplexity,
    ("ddk", "initial_factor"): initial_factor,
    ("ddk", "update_factor"): update_factor,
    ("ddk", "factor_trajectory"): factor_trajectory,
    ("ddk", "ddk_loss"): ddk_loss,
    ("ddk", "cyclic_indices"): cyclic_indices,
}
