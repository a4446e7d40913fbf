"""Adapters of correlations, standardised logits, rankings and token graphs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from limbeck import losses


def dist_loss(case: Any) -> dict[str, Any]:
    student, args = case.leaf("logits_student"), case.args
    inter, intra = losses.dist(student, case["logits_teacher"], args["tau"])
    loss = args["beta"] * inter + args["gamma"] * intra
    grads = case.grads(loss, logits_student=student)
    return {"out_loss": loss, "out_inter": inter, "out_intra": intra, **grads}


def logit_std_kd_loss(case: Any) -> dict[str, Any]:
    student = case.leaf("logits_student")
    own, other = losses.standardise(student), losses.standardise(case["logits_teacher"])
    loss = losses.kl_divergence(own, other, case.args["temperature"])
    grads = case.grads(loss, logits_student=student)
    return {"out_z_student": own, "out_z_teacher": other, "out_loss": loss, **grads}


def pld_loss(case: Any) -> dict[str, Any]:
    student, teacher, labels = case.leaf("logits_student"), case["logits_teacher"], case["target"]
    temperature = case.args["temperature"]
    ranking = losses.teacher_ranking(teacher, labels)
    loss = losses.pld(student, teacher, labels, temperature)
    return {
        "out_loss": loss,
        "out_per_sample": losses.pld(student, teacher, labels, temperature, reduction="none"),
        "out_permutation": ranking,
        "out_weights": losses.teacher_places(teacher, ranking, temperature),
        **case.grads(loss, logits_student=student),
    }


# The reference's names of the weights by place, and ours.
PLACES = {"ce": "first", "listmle": "uniform", "plistmle": "position"}


def position_weighted_pl(case: Any) -> dict[str, Any]:
    student = case.leaf("logits_student")
    ranking = losses.teacher_ranking(case["logits_teacher"], case["target"])
    places = losses.fixed_places(PLACES[case.args["kind"]], student.shape[1])
    loss = losses.plackett_luce(student, ranking, places)
    grads = case.grads(loss, logits_student=student)
    return {"out_loss": loss, "out_permutation": ranking, "out_weights": places, **grads}


def tokenize(case: Any) -> dict[str, Any]:
    return {"out_tokens": losses.tokenise(case["feat"], case.args["patch"])}


def local_graph_loss(case: Any) -> dict[str, Any]:
    k, sigma, leaf = case.args["k"], case.args["sigma"], case.leaf("tokens_s")
    own, other = losses.knn_affinity(leaf, k, sigma), losses.knn_affinity(case["tokens_t"], k, sigma)
    result: dict[str, Any] = {
        "out_A_s": own, "out_A_t": other, "out_mask_s": own > 0, "out_mask_t": other > 0,
    }  # fmt: skip
    for order, student_first in (("student_teacher", True), ("teacher_student", False)):
        loss = losses.local_graph(own, other, student_first=student_first, reduction="sum")
        (grad,) = case.grads(loss, tokens_s=leaf).values()
        result |= {f"out_loss_{order}": loss, f"out_grad_tokens_s_{order}": grad}
    return result


def global_loss(case: Any) -> dict[str, Any]:
    own = case.leaf("tokens_s")
    near, far = F.linear(own, case["proj_s"]), F.linear(case["tokens_t"], case["proj_t"])
    loss = losses.global_graph(near, far, case.args["tau"], reduction="sum")
    return {"out_loss": loss, **case.grads(loss, tokens_s=own)}


def contextual_loss(case: Any) -> dict[str, Any]:
    own, other = case.leaf("tokens_s"), case["tokens_t"]
    loss = losses.contextual(own, other)
    contexts = {"out_CS_s": losses.context(own), "out_CS_t": losses.context(other)}
    return {"out_loss": loss, **contexts, **case.grads(loss, tokens_s=own)}


ADAPTERS = {
    ("classic", "dist_loss"): dist_loss,
    ("classic", "logit_std_kd_loss"): logit_std_kd_loss,
    ("pld", "pld_loss"): pld_loss,
    ("pld", "position_weighted_pl"): position_weighted_pl,
    ("trg", "tokenize"): tokenize,
    ("trg", "local_graph_loss"): local_graph_loss,
    ("trg", "global_loss"): global_loss,
    ("trg", "contextual_loss"): contextual_loss,
}
