"""Adapters of TGeo-KD and KD-AIF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.engine import curvature
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.selectors.influence import influence_of, influence_to_weight
from limbeck.selectors.tgeo import Controller, class_mean_teacher, geometry_state

LAYERS = {"0": "1", "2": "2", "4": "3"}  # of the MLP: our name and the published number


def batch_of(inputs: Tensor, labels: Tensor, weight: Tensor | None = None) -> Batch:
    index = torch.arange(len(labels))
    return Batch(inputs=inputs, labels=labels, index=index, view=0 * index, weight=weight)


def controller_of(case: Any) -> Controller:
    controller = Controller(case["ctl_w1"].shape[1]).double()
    state = {f"{own}.weight": case[f"ctl_w{number}"] for own, number in LAYERS.items()}
    controller.load_state_dict(state | {f"{own}.bias": case[f"ctl_b{n}"] for own, n in LAYERS.items()})
    return controller


def fused(student: Tensor, teacher: Tensor, labels: Tensor, alpha: Tensor, temperature: float) -> Tensor:
    """The fusion loss, as the sum of the two objectives that the recipe lists."""
    own, other = Outputs(logits=student), Outputs(logits=teacher)
    hard = Labels(weight=1).terms(own, other, batch_of(student, labels, 1 - alpha), Progress())
    soft = KD(weight=1, temperature=temperature).terms(
        own, other, batch_of(student, labels, alpha), Progress()
    )
    return hard["labels"] + soft["kd"]


def fusion(case: Any) -> dict[str, Any]:
    student, teacher, labels = case.leaf("logits_student"), case["logits_teacher"], case["target"]
    temperature, option = case.args["temperature"], case.args["option"]
    mean = class_mean_teacher(teacher.softmax(1), labels, teacher.shape[1])
    state = geometry_state(student, teacher, labels, mean, option)
    alpha = controller_of(case)(state).detach()
    loss = fused(student, teacher, labels, alpha, temperature)
    # The released script's cross entropy reads probabilities as if they were logits.
    kd = losses.kl_divergence(student, teacher, temperature, reduction="none")
    twice = losses.cross_entropy(student.softmax(1), labels, reduction="none")
    released = (alpha * kd + (1 - alpha) * twice).mean()
    return {
        "out_class_mean_teacher": mean[labels],
        "out_state": state,
        "out_alpha": alpha,
        "out_loss_kd_per_sample": kd / temperature**2,
        "out_loss_ce_per_sample": losses.cross_entropy(student, labels, reduction="none"),
        "out_loss": loss,
        **case.grads(loss, logits_student=student),
        "out_loss_official_double_softmax": released,
        "out_grad_official_double_softmax": case.grads(released, x=student)["out_grad_x"],
    }


def bilevel_step(case: Any) -> dict[str, Any]:
    x, labels, teacher, rate = case["x"], case["y"], case["logits_teacher"], case.args["inner_lr"]
    params, controller = {"W": case.leaf("W")}, controller_of(case)
    student = x @ params["W"]
    alpha = controller(geometry_state(student, teacher, labels, case["class_mean_teacher"]))
    inner = fused(student, teacher, labels, alpha, case.args["temperature"])
    after = curvature.unrolled_step(inner, params, rate)
    outer = losses.cross_entropy(case["x_val"] @ after["W"], case["y_val"])
    weights = {
        f"ctl_{kind}{number}": getattr(controller[int(own)], name)
        for own, number in LAYERS.items()
        for kind, name in (("w", "weight"), ("b", "bias"))
    }
    return {
        "out_alpha": alpha,
        "out_inner_grad_W": (params["W"] - after["W"]) / rate,
        "out_W_after": after["W"],
        "out_outer_loss": outer,
        **case.grads(outer, **weights),
    }


def linear(params: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Cross entropy [B] of a linear classifier."""
    logits = batch.inputs @ params["weight"].T + params["bias"]
    return losses.cross_entropy(logits, batch.labels, reduction="none")


def released_solution(
    params: Mapping[str, Tensor], training: Batch, held_out: Batch, damping: float, scale: float, depth: int
) -> Tensor:
    """The released recursion: neither the target nor the estimate is detached, so both are derived too."""
    leaves = list(params.values())
    target = torch.autograd.grad(linear(params, held_out).mean(), leaves, create_graph=True)
    found: Sequence[Tensor] = target
    for _ in range(depth):
        grads = torch.autograd.grad(linear(params, training).mean(), leaves, create_graph=True)
        slope = torch.stack([(g * h).sum() for g, h in zip(grads, found, strict=True)]).sum()
        products = torch.autograd.grad(slope, leaves, create_graph=True)
        found = [v + (1 - damping) * h - p / scale for v, h, p in zip(target, found, products, strict=True)]
    return curvature.flat(found).detach()


def influence_weighted_kd(case: Any) -> dict[str, Any]:
    args = case.args
    params = {name: case.leaf(name) for name in ("weight", "bias")}
    training, held_out = batch_of(case["x_train"], case["y_train"]), batch_of(case["x_val"], case["y_val"])
    data, count = [training], len(training.labels)

    def influence(solution: Tensor) -> Tensor:
        return -curvature.slopes(linear, params, data, solution) / count

    damp, scale = args["damp"], args["scale"]
    target = curvature.gradient(linear, params, [held_out])
    official = released_solution(params, training, held_out, damp, scale, args["recursion_depth_official"])
    clean = scale * curvature.lissa(
        lambda v: curvature.hessian_product(linear, params, data, v), target, damp * scale,
        scale=scale, steps=args["recursion_depth_clean"],
    )  # fmt: skip
    hessian = curvature.hessian(linear, params, data)
    exact, _ = influence_of(linear, params, data, [held_out], solver="exact", damping=args["exact_damping"])
    up, down = (
        influence_to_weight(influence(official), sign="released", clip=0),
        influence_to_weight(exact, clip=0),
    )
    student = case.leaf("logits_student")

    def loss(weights: Tensor) -> Tensor:
        square = args["temperature"] ** 2  # which the released loss leaves out
        soft = KD(weight=1 / square, temperature=args["temperature"])
        own, other = Outputs(logits=student), Outputs(logits=case["logits_teacher"])
        return soft.terms(own, other, batch_of(student, training.labels, weights), Progress())["kd"]

    return {
        **split("out_grad_val", target, params),
        **split("out_s_test_official", official, params),
        **split("out_s_test_clean", clean, params),
        "out_s_test_exact_flat": curvature.solve(hessian, target, args["exact_damping"]),
        "out_hessian": hessian,
        "out_influence_official": influence(official),
        "out_influence_clean": influence(clean),
        "out_influence_exact": exact,
        "out_sample_weight_official": up,
        "out_sample_weight_helpful_up": down,
        "out_loss_official_weights": loss(up),
        "out_grad_logits_student_official_weights": case.grads(loss(up), x=student)["out_grad_x"],
        "out_loss_helpful_up_weights": loss(down),
    }


def split(name: str, vector: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = curvature.split(vector, params)
    return {f"{name}_{key}": part for key, part in zip(params, parts, strict=True)}


ADAPTERS = {
    ("tgeo-kd", "fusion"): fusion,
    ("tgeo-kd", "bilevel_step"): bilevel_step,
    ("kd-aif", "influence_weighted_kd"): influence_weighted_kd,
}
