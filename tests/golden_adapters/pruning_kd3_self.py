"""Adapters of data pruning, KD3 and self-distillation."""

from __future__ import annotations

from typing import Any

import torch

from limbeck import losses
from limbeck.losses import kd3
from limbeck.losses.contrastive import nt_xent
from limbeck.losses.pruned import pruned_kd_loss
from limbeck.metrics import kernel_ridge
from limbeck.metrics.kernel_ridge import Spectrum, rbf
from limbeck.metrics.pruning import el2n, forgetting, grand_last_layer, keep_indices
from limbeck.metrics.ridge_theory import ridge_theory


def scores_and_selection(case: Any) -> dict[str, Any]:
    y, scores = case["y"], el2n(case["probs"], case["y"])
    kept = {
        f"out_keep_{mode}_{100 * f:.0f}{name}": keep_indices(scores, f, mode, own)
        for mode in ("hard", "easy", "moderate")
        for f in case.args["fractions_kept"]
        for name, own in (("", None), ("_balanced", y))
    }
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


def alpha_schedule(case: Any) -> dict[str, Any]:
    until = case.args["max_epoch"]
    return {"out_alpha": [kd3.alpha_schedule(e, until) for e in case["epoch"].tolist()]}


def select_instances(case: Any) -> dict[str, Any]:
    keep, confidence, said, cutoff = kd3.select_instances(
        case["logits_student"], case["logits_teacher"], case.args["alpha"], case.args["p_cutoff"]
    )
    return {
        "out_keep": keep, "out_max_prob": confidence, "out_pseudo_label": said, "out_class_cutoff": cutoff,
    }  # fmt: skip


def weighted_feature_loss(case: Any) -> dict[str, Any]:
    own, logits = case.leaf("f_s"), (case["logits_student"], case["logits_teacher"])
    loss = kd3.weighted_feature_loss(own, case["f_t"], *logits)
    return {"out_weight": kd3.disagreement(*logits), "out_loss": loss, **case.grads(loss, f_s=own)}


def mix_distribution(case: Any) -> dict[str, Any]:
    return {"out_mixed": kd3.mix_distribution(case["x"], case["lam"], case["perm"])}


def contrastive_loss(case: Any) -> dict[str, Any]:
    one, other = case.leaf("x"), case.leaf("x_aug")
    loss = nt_xent(one, other, case.args["temperature"])
    return {"out_loss": loss, **case.grads(loss, x=one, x_aug=other)}


def krr_self_distill(case: Any) -> dict[str, Any]:
    ridge, gamma, alpha = (case.args[name] for name in ("lambda", "rbf_gamma", "alpha"))
    x, y, new, steps = case["x_train"], case["y_train"], case["x_test"], case.args["steps"]
    kernel, cross = rbf(x, x, gamma), rbf(new, x, gamma)
    spectrum = Spectrum.of(kernel)
    found = kernel_ridge.krr_self_distill(spectrum, y, ridge, alpha, steps)
    return {
        "out_K": kernel, "out_y_steps": found.fits, "out_pred_steps": cross @ found.duals,
        "out_pred_limit": cross @ kernel_ridge.limit_dual(spectrum, y, ridge, alpha),
        "out_eigvals": spectrum.values,
        "out_B_diag_steps": kernel_ridge.filters(spectrum.values, ridge, [alpha] * steps),
        "out_B_diag_limit": kernel_ridge.limit_filter(spectrum.values, ridge, alpha),
    }  # fmt: skip


def weighted_steps(case: Any) -> dict[str, Any]:
    ridge, gamma, alphas = (case.args[name] for name in ("lambda", "rbf_gamma", "alphas"))
    x, y, new, want = (case[name] for name in ("x_train", "y_train", "x_val", "y_val"))
    spectrum, cross = Spectrum.of(rbf(x, x, gamma)), rbf(new, x, gamma)
    found = kernel_ridge.weighted_steps(spectrum, y, ridge, alphas)
    diagonal = kernel_ridge.filters(spectrum.values, ridge, alphas)
    predictions = cross @ found.duals
    labels, fit = cross @ spectrum.dual(y, ridge), spectrum.fit(y, ridge)
    best, errors = [], []
    for _ in alphas[1:]:
        taught = cross @ spectrum.dual(fit, ridge)
        raw = kernel_ridge.optimal_alpha(labels, taught, want).raw
        best.append(raw)
        errors.append((raw * labels + (1 - raw) * taught - want).square().mean())
        fit = spectrum.fit(raw * y + (1 - raw) * fit, ridge)
    return {
        "out_targets": found.targets, "out_fits": found.fits, "out_preds": predictions,
        "out_B_diag": diagonal, "out_eigvals": spectrum.values,
        "out_fits_from_B": torch.stack([spectrum.filtered(b, y) for b in diagonal]),
        "out_optimal_alpha_greedy": best, "out_val_mse_greedy": errors,
        "out_val_mse_given_alphas": (predictions - want).square().mean((1, 2)),
    }  # fmt: skip


ADAPTERS = {
    ("self-distillation", "krr_self_distill"): krr_self_distill,
    ("self-distillation", "weighted_steps"): weighted_steps,
    ("kd3", "alpha_schedule"): alpha_schedule,
    ("kd3", "select_instances"): select_instances,
    ("kd3", "weighted_feature_loss"): weighted_feature_loss,
    ("kd3", "mix_distribution"): mix_distribution,
    ("kd3", "contrastive_loss"): contrastive_loss,
    ("data-pruning-kd", "scores_and_selection"): scores_and_selection,
    ("data-pruning-kd", "pruned_kd_loss"): pruned,
    ("data-pruning-kd", "ridge_theory"): ridge,
}
