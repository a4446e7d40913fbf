"""Adapters of losses, objectives and metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.metrics import continual
from limbeck.objectives.dkd import DKD
from limbeck.objectives.fitnets import FitNets
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.objectives.reviewkd import MapStep, ReviewKD


def batch_of(labels: Tensor) -> Batch:
    count = torch.arange(len(labels))
    return Batch(inputs=labels, labels=labels, index=count, view=torch.zeros_like(count))


def kd_loss(case: Any) -> dict[str, Any]:
    name = "logits_student" if "logits_student" in case else "student_logits"
    teacher = case["logits_teacher" if "logits_teacher" in case else "teacher_logits"]
    temperature = case.args.get("temperature", case.args.get("T"))
    student = case.leaf(name)
    loss = case.args.get("alpha", 1.0) * losses.kl_divergence(student, teacher, temperature)
    return {"out_loss": loss, **case.grads(loss, **{name: student})}


def dkd_loss(case: Any) -> dict[str, Any]:
    name = "logits_student" if "logits_student" in case else "student_logits"
    teacher = case["logits_teacher" if "logits_teacher" in case else "teacher_logits"]
    student = case.leaf(name)
    target, rest = losses.decoupled_kl(student, teacher, case["target"], case.args["temperature"])
    loss = case.args["alpha"] * target + case.args["beta"] * rest
    return {"out_loss": loss, "out_tckd": target, "out_nckd": rest, **case.grads(loss, **{name: student})}


def label_smoothing(case: Any) -> dict[str, Any]:
    logits = case.leaf("logits")
    loss = losses.cross_entropy(logits, case["target"], smoothing=case.args["epsilon"])
    return {"out_loss": loss, **case.grads(loss, logits=logits)}


def masked_cross_entropy(case: Any) -> dict[str, Any]:
    logits = case.leaf("logits")
    start, stop = case.args["last_valid_out_dim"], case.args["valid_out_dim"]
    loss = losses.masked_cross_entropy(logits, case["y"], start, stop)
    return {"out_loss": loss, **case.grads(loss, logits=logits)}


def fitnet_hint(case: Any) -> dict[str, Any]:
    f_s, f_t = case.leaf("f_s"), case["f_t"]
    objective = FitNets(weight=1.0, student_tap="s", teacher_tap="t")
    student, teacher = tapped(s=f_s), tapped(t=f_t)
    module = objective.build(student, teacher).double()
    convolution, norm = module.regress[0], module.regress[1]
    convolution.load_state_dict(case.weights("conv_"))
    norm.load_state_dict(case.weights("bn_"), strict=False)
    (loss,) = module(student, teacher, batch_of(torch.zeros(len(f_s))), Progress()).values()
    grads = case.grads(loss, f_s=f_s, conv_weight=convolution.weight)
    return {"out_regressed": module.regress(f_s), "out_loss": loss, **grads}


def fitnets_loss(case: Any) -> dict[str, Any]:
    own, other = case.leaf("student_tokens"), case["teacher_tokens"]
    objective = FitNets(weight=case.args["weight"], student_tap="s", teacher_tap="t")
    student, teacher = tapped(s=own), tapped(t=other)
    module = objective.build(student, teacher).double()
    module.regress.load_state_dict(case.weights("proj_"))
    (loss,) = module(student, teacher, batch_of(torch.zeros(len(own))), Progress()).values()
    return {"out_loss": loss, **case.grads(loss, student_tokens=own, proj_weight=module.regress.weight)}


def reviewkd_hcl(case: Any) -> dict[str, Any]:
    count = sum(name.startswith("f_s_") for name in case.inputs)
    own = [case.leaf(f"f_s_{i}") for i in range(count)]
    other = [case[f"f_t_{i}"] for i in range(count)]
    levels = case.args["levels"]
    loss = losses.hcl(own, other, levels)
    stages = torch.stack([losses.hcl_stage(s, t, levels) for s, t in zip(own, other, strict=True)])
    grads = case.grads(loss, **{f"f_s_{i}": x for i, x in enumerate(own)})
    return {"out_loss": loss, "out_per_stage": stages, **grads}


def reviewkd_abf(case: Any) -> dict[str, Any]:
    args, x = case.args, case.leaf("x")
    size = (args["out_shape"], args["out_shape"])
    step = MapStep(args["in"], args["mid"], args["out"], size, fuse=args["fuse"]).double()
    with torch.no_grad():
        step.narrow[0].weight.copy_(case["conv1_w"])
        step.widen[0].weight.copy_(case["conv2_w"])
        if isinstance(step.attention, nn.Conv2d):
            step.attention.weight.copy_(case["att_w"])
            step.attention.bias.copy_(case["att_b"])
    out, residual = step(x, case["y"] if args["fuse"] else None)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return {"out_output": out, "out_residual": residual, "out_grad_x_of_sum_sq_output": grad}


# The published names of a fusion step's parts, and ours.
FUSION_PARTS = {
    "proj1": "project",
    "norm1": "norm_in",
    "projz": "gate.0",
    "normz": "gate.1",
    "norm2": "norm_out",
    "proj2": "expand",
}


def reviewkd_loss(case: Any) -> dict[str, Any]:
    own, other = case.leaf("student_features"), case["teacher_features"]
    blocks = len(own)
    teacher_taps = tuple(f"t{i}" for i in range(blocks))
    objective = ReviewKD(
        weight=case.args["weight"],
        student_taps=tuple(f"s{i}" for i in range(blocks)),
        teacher_taps=teacher_taps,
        warmup_epochs=0,
    )
    student = tapped(**{f"s{i}": x.flatten(0, -3) for i, x in enumerate(own)})
    teacher = tapped(**{f"t{i}": x.flatten(0, -3) for i, x in enumerate(other[-blocks:])})
    module = objective.build(student, teacher).double()
    weights = dict(fusion_name(n, w) for n, w in case.weights("w_abfs_").items())
    # The published deepest step owns a second norm that it never applies; ours has none.
    module.fuse.load_state_dict({n: w for n, w in weights.items() if not n.startswith("steps.0.norm_out")})
    (loss,) = module(student, teacher, batch_of(torch.zeros(len(own))), Progress()).values()
    fused = torch.stack(module.fuse([student.features[tap] for tap in objective.student_taps]))
    shape = (blocks, *other.shape[1:])
    return {"out_loss": loss, "out_fused": fused.reshape(shape), **case.grads(loss, student_features=own)}


def fusion_name(published: str, weight: Tensor) -> tuple[str, Tensor]:
    step, part, kind = published.split("_")
    return f"steps.{step}.{FUSION_PARTS[part]}.{kind}", weight


def tapped(**features: Tensor) -> Outputs:
    return Outputs(logits=torch.zeros(1, 1), features=features)


def student_step(soft_objective: type) -> Any:
    """The published student step, as the sum of the objectives that the recipe lists."""

    def adapter(case: Any) -> dict[str, Any]:
        args = case.args
        start, stop, alpha = args["last_valid_out_dim"], args["valid_out_dim"], args["kd_alpha"]
        leaves = {name: case.leaf(name) for name in ("logits", "kd_logits") if name in case}
        student = Outputs(logits=leaves["logits"], soft_logits=leaves.get("kd_logits")).columns(start, stop)
        teacher = Outputs(logits=case["teacher_logits_current"])
        fields = {"beta": 4.0, "temperature": 4.0, "warmup_epochs": 0}
        soft = (
            DKD(weight=alpha, **fields) if soft_objective is DKD else KD(weight=alpha, temperature=args["T"])
        )
        batch, at = batch_of(case["y"] - start), Progress()
        hard = sum(Labels(weight=1 - alpha).terms(student, teacher, batch, at).values())
        soft_loss = sum(soft.build(student, teacher)(student, teacher, batch, at).values())
        total = hard + soft_loss + args["prompt_loss"] + args["feature_loss"]
        result = {"out_total_loss": total, "out_soft_loss": soft_loss, **case.grads(total, **leaves)}
        if "kd_logits" in leaves:
            mixed = (1 - alpha) * leaves["logits"] + alpha * leaves["kd_logits"]
            result["out_eval_logits"] = mixed[:, :stop]
        return result

    return adapter


def continual_metrics(case: Any) -> dict[str, Any]:
    matrix = case["acc"].numpy()
    return {
        "out_average_accuracy": continual.average_accuracy(matrix),
        "out_running_average": continual.running_average(matrix),
        **{f"out_forgetting_{d}": continual.forgetting(matrix, d) for d in continual.FORGETTING},
    }


def calc_forgetting(case: Any) -> dict[str, Any]:
    matrix = case["acc"].numpy()
    return {
        "out_forgetting": continual.forgetting(matrix, "coda"),
        "out_average_accuracy": continual.average_accuracy(matrix),
    }


ADAPTERS = {
    ("classic", "kd_loss"): kd_loss,
    ("classic", "dkd_loss"): dkd_loss,
    ("classic", "label_smoothing"): label_smoothing,
    ("classic", "fitnet_hint"): fitnet_hint,
    ("classic", "reviewkd_hcl"): reviewkd_hcl,
    ("classic", "reviewkd_abf"): reviewkd_abf,
    ("cdl", "kd_loss"): kd_loss,
    ("cdl", "dkd_loss"): dkd_loss,
    ("cdl", "fitnets_loss"): fitnets_loss,
    ("cdl", "reviewkd_loss"): reviewkd_loss,
    ("cdl", "student_step_kd_token"): student_step(KD),
    ("cdl", "student_step_kd"): student_step(KD),
    ("cdl", "student_step_fitnets"): student_step(KD),
    ("cdl", "student_step_dkd"): student_step(DKD),
    ("cdl", "continual_metrics"): continual_metrics,
    ("coda-prompt", "masked_cross_entropy"): masked_cross_entropy,
    ("coda-prompt", "calc_forgetting"): calc_forgetting,
}
