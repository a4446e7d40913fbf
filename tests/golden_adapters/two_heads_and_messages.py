"""Adapters of LELP, DHO and Talking Models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from limbeck import losses


def lelp(case: Any) -> dict[str, Any]:
    args, features, labels, weight = case.args, case["H"], case["y"], case["W"]
    classes, tau = len(weight), args["tau"]
    projector = losses.null_projector(weight) if args["null_space"] else torch.eye(len(features.mT)).double()
    mean, rows = losses.class_directions(features @ projector.mT, labels, classes, args["S"])
    rows = case["Q"] @ rows if args["rotation"] else rows
    z = losses.positions(features, projector, mean, rows)
    logits = features @ weight.mT + case["b"]
    soft = losses.subclass_log_probs(logits, z / args["beta"], tau)
    student = case.leaf("student_logits")
    told = losses.subclass_log_probs(logits, z / args["beta"]).flatten(1)
    kl = losses.subclass_kl(student, told, classes, tau)
    entropy = -(soft.exp() * soft).sum((1, 2)).mean()
    folded = losses.fold(student, classes)
    hard = losses.cross_entropy(folded, labels)
    return {
        "out_projector": projector,
        "out_mean": mean,
        "out_directions": rows,
        "out_z": z,
        "out_p_class": soft.exp().sum(2),
        "out_p_subclass": soft.exp(),
        "out_loss_kl": kl,
        "out_loss_ce": kl + tau**2 * entropy,
        "out_grad_student_logits_kl": case.grads(kl, x=student)["out_grad_x"],
        "out_class_logprob_folded": F.log_softmax(folded, dim=1),
        "out_loss_hard": hard,
        "out_grad_student_logits_hard": case.grads(hard, x=student)["out_grad_x"],
    }


ADAPTERS = {("lelp", "lelp"): lelp}
