"""Adapters of data pruning, KD3 and self-distillation."""

from __future__ import annotations

from typing import Any

from limbeck import losses
from limbeck.losses.pruned import pruned_kd_loss
from limbeck.metrics.pruning import el2n, forgetting, grand_last_layer, keep_indices
from limbeck.metrics.ridge_theory import ridge_theory


def scores_and_selection(case: Any) -> dict[str, Any]:
    y, scores = case["y"], el2n(case["probs"], case["y"])
    kept = {
        f"out_keep_{mode}_{100 * f:.0f}{'_balanced' if own is not None else ''}": keep_indices(scores, f, mode, own)
        for mode in ("hard", "easy", "moderate") for f in case.args["fractions_kept"] for own in (None, y)
    }  # fmt: skip
    return {
        "out_el2n": scores,
        "out_grand_last_layer": grand_last_layer(case["probs"], case["features"], y),
        "out_forgetting": forgetting(case["correct"]),
        **kept,
    }


def pruned(case: Any) -> dict[str, Any]:
    student, teacher, target = case.leaf("logits_student"), case["logits_teacher"], case["target"]
    loss = pruned_kd_loss(student, teacher, target, case.args["alpha"], case.args["temperature"])
    return {
        "out_loss": loss,
        "out_ce": losses.cross_entropy(student, target),
        "out_kd": losses.kl_divergence(student, teacher, case.args["temperature"]),
        **case.grads(loss, logits_student=student),
    }


def ridge(case: Any) -> dict[str, Any]:
    found = ridge_theory(
        case["X_teacher"].numpy(), case["kept"].numpy(), case["theta"].numpy(), case["alphas"].numpy(),
        case.args["lambda"], case.args["gamma2"],
    )  # fmt: skip
    return {
        "out_bias2": found.bias2, "out_variance": found.variance, "out_mse": found.error,
        "out_alpha_star": found.alpha_star, "out_mse_star": found.error_star,
        "out_mse_teacher": found.error_teacher,
    }  # fmt: skip


ADAPTERS = {
    ("data-pruning-kd", "scores_and_selection"): scores_and_selection,
    ("data-pruning-kd", "pruned_kd_loss"): pruned,
    ("data-pruning-kd", "ridge_theory"): ridge,
}
