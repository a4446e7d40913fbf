"""Adapters of LELP, DHO and Talking Models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from limbeck import losses
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.metrics.conflict import gradient_conflict
from limbeck.nets.conversation import Conversation
from limbeck.nets.two_heads import cosine_logits, mixed_log_probs, search_mix, text_head, tip_adapter_logits
from limbeck.objectives.dho import DHO


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


def dho_loss(case: Any) -> dict[str, Any]:
    own = case.leaf("labeled_ce_logits"), case.leaf("labeled_kd_logits"), case.leaf("unlabeled_kd_logits")
    ce, kd, kd_rest = own
    known = torch.arange(len(kd) + len(kd_rest)) < len(kd)
    student = Outputs(torch.cat([ce, torch.zeros_like(kd_rest)]), torch.cat([kd, kd_rest]))
    teacher = Outputs(torch.cat([case["teacher_labeled_logits"], case["teacher_unlabeled_logits"]]))
    labels = torch.cat([case["labels"], torch.zeros(len(kd_rest), dtype=torch.int64)])
    batch = Batch(inputs=labels, labels=labels, index=labels, view=labels, labelled=known)
    lam, temperature = case.args["lam"], case.args["temperature"]
    loss = sum(DHO(balance=lam, temperature=temperature).terms(student, teacher, batch, Progress()).values())
    parts = losses.dual_head(student.logits, student.soft, teacher.logits, labels, known, temperature)
    names = ("labeled_ce_logits", "labeled_kd_logits", "unlabeled_kd_logits")
    grads = case.grads(loss, **dict(zip(names, own, strict=True)))
    named = dict(zip(("out_ce", "out_kd_labeled", "out_kd_unlabeled"), parts, strict=True))
    return {"out_loss": loss, **named, **grads}


def search_alpha_beta(case: Any) -> dict[str, Any]:
    heads, labels = (case["ce_logits"], case["kd_logits"]), case["labels"]
    accuracy, weight, temperature = search_mix(*heads, labels)
    fixed = mixed_log_probs(*heads, 0.5, 1.0).argmax(1)
    return {
        "out_best_acc": accuracy,
        "out_best_alpha": weight,
        "out_best_beta": temperature,
        "out_acc_alpha05_beta1": 100 * (fixed == labels).double().mean(),
    }


def clip_student_heads(case: Any) -> dict[str, Any]:
    features, text = case.leaf("features"), case["text_weights"]
    ce = text_head(text)(features)
    kd = cosine_logits(features, text_head(text), case.args["kd_scale"])
    loss = ((ce + 0.01 * kd) * case["weight"]).sum()
    return {"out_ce_logits": ce, "out_kd_logits": kd, **case.grads(loss, features=features)}


def tip_adapter(case: Any) -> dict[str, Any]:
    cache = case["adapter_weight"], case["cache_values"]
    args = case.args["alpha"], case.args["beta"]
    return {"out_logits": tip_adapter_logits(case["features"], case["text_weights"], *cache, *args)}


def conflict(case: Any) -> dict[str, Any]:
    features, temperature = case.leaf("features"), case.args["temperature"]
    ce, kd = features @ case["ce_weight"].mT, features @ case["kd_weight"].mT
    labels = losses.cross_entropy(ce, case["labels"])
    soft, single = (losses.kl_divergence(z, case["teacher_logits"], temperature) for z in (kd, ce))
    return {
        "out_grad_ce": case.grads(labels, x=features)["out_grad_x"],
        "out_grad_kd": case.grads(soft, x=features)["out_grad_x"],
        "out_cosine_dual": gradient_conflict(features, labels, soft),
        "out_cosine_single": gradient_conflict(features, labels, single),
    }


def interaction_losses(case: Any) -> dict[str, Any]:
    args, x, labels = case.args, case["x"], case["y"]
    leaves = {name: case.leaf(name) for name in ("Sl", "Sm", "Sh", "Es_low", "Es_high", "Dt", "Et", "Ds")}
    m = leaves
    low = torch.relu(x @ m["Sl"])
    high = torch.relu(low @ m["Sm"])
    logits = high @ m["Sh"]
    shapes = [[width] for width in (low.shape[1], high.shape[1], *case["Tm"].shape)]
    talk = Conversation(*shapes, width=m["Dt"].shape[0], rounds=args["rounds"]).double()
    names = {"encode": "Es_low", "encode_again": "Es_high", "teacher_decode": "Dt", "teacher_encode": "Et"}
    for name, matrix in {**names, "decode": "Ds"}.items():
        if getattr(talk, name) is not None:
            linear = BiasFree(m[matrix])
            setattr(talk, name, linear)
    rounds = talk(low, lambda w: torch.tanh(w @ case["Tm"]), lambda v: v @ m["Sh"])
    task = losses.cross_entropy(logits, labels)
    interact = torch.stack([losses.cross_entropy(r.logits, labels) for r in rounds])
    message = torch.stack([losses.mutual_mse(r.question, r.answer) for r in rounds])
    state = torch.stack([losses.mutual_mse(r.state, high) for r in rounds])
    weights = args["w_interact"], args["w_message"], args["w_state"]
    total = task + sum(w * t.sum() for w, t in zip(weights, (interact, message, state), strict=True))
    return {
        "out_logits": logits,
        "out_task": task,
        "out_interact": interact,
        "out_message": message,
        "out_state": state,
        "out_last_response_state": rounds[-1].state,
        "out_total": total,
        **case.grads(total, **leaves),
    }


class BiasFree(torch.nn.Module):
    """x @ matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = (matrix,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix[0]


ADAPTERS = {
    ("talking-models", "interaction_losses"): interaction_losses,
    ("lelp", "lelp"): lelp,
    ("dho", "dho_loss"): dho_loss,
    ("dho", "search_alpha_beta"): search_alpha_beta,
    ("dho", "clip_student_heads"): clip_student_heads,
    ("dho", "tip_adapter_logits"): tip_adapter,
    ("dho", "gradient_conflict"): conflict,
}
