"""Adapters of FIRST."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limbeck import losses
from limbeck.losses import first
from limbeck.metrics import calibration

# The vectors' names of the three ways to scale.
SCALINGS = {"linear": "linear", "scaled": "probability", "prob_softmax": "probability", "power": "power"}


def scaled(probs: Tensor, mode: str, c: float | None, eps: float) -> Tensor:
    return first.recalibrate(probs, SCALINGS[mode], 1.0 if c is None else c, eps)


def select_topk(case: Any) -> dict[str, Any]:
    ids, probs = first.top_probabilities(case["teacher_logits"], case.args["k"])
    return {"out_ids": ids, "out_probs": probs, "out_coverage": probs.sum(-1)}


def recalibrate(case: Any) -> dict[str, Any]:
    probs, args = case["probs"], case.args
    return {
        "out_linear": first.linear_normalise(probs, args["eps"]),
        "out_smoothed": first.label_smooth(probs, args["delta"], keep_order=False),
        "out_scaled": scaled(probs, "scaled", args["c"], args["eps"]),
    }


def target_with_rest(case: Any) -> dict[str, Any]:
    args = case.args
    found = first.target_with_rest(case["probs"], SCALINGS[args["mode"]], args["c"] or 1.0, args["eps"])
    return {"out_target": found}


def first_loss(case: Any) -> dict[str, Any]:
    student, probs, mask, args = case.leaf("student_logits"), case["teacher_probs"], case["mask"], case.args
    kept = first.with_rest(probs) if args["other_token"] else probs
    target = scaled(kept, args["target_mode"], args["c"], args["eps"])
    sequences = {"batch": ("sum", len(student)), "token": ("mean", 1)}
    reduction, divisor = sequences[args["reduction"]]
    loss = losses.first_loss(
        student, case["teacher_ids"], target, eps=args["eps"], mask=mask, reduction=reduction
    )
    loss = loss / divisor
    return {"out_loss": loss, "out_target": target, **case.grads(loss, student_logits=student)}


def choose_temperature(case: Any) -> dict[str, Any]:
    grid = case["grid"].tolist()
    chosen = calibration.choose_temperature(
        case["probs"], case["answer_pos"], grid, scaling="probability", bins=case.args["bins"]
    )
    return {"out_c": chosen.c, "out_ece": chosen.errors}


def ece_trust(case: Any) -> dict[str, Any]:
    confidence, correct, bins = case["confidence"], case["correct"], case.args["bins"]
    return {
        "out_ece": calibration.confidence_error(confidence, correct, bins),
        "out_accuracy": correct.mean(),
        "out_trust": calibration.trust(confidence, correct, bins),
    }


ADAPTERS = {
    ("first", "select_topk"): select_topk,
    ("first", "recalibrate"): recalibrate,
    ("first", "target_with_rest"): target_with_rest,
    ("first", "first_loss"): first_loss,
    ("first", "choose_temperature"): choose_temperature,
    ("first", "ece_trust"): ece_trust,
}
