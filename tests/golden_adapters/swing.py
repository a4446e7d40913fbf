"""Adapters of swing distillation and of canary exposure."""

from __future__ import annotations

from typing import Any

from limbeck import losses
from limbeck.losses import swing
from limbeck.metrics import exposure as exposures


def token_temperature(case: Any) -> dict[str, Any]:
    return {
        "out_temperature": swing.token_temperature(case["score"], case.args["t_low"], case.args["t_high"])
    }


def swing_loss(case: Any) -> dict[str, Any]:
    student, teacher, score, args = (
        case.leaf("student_logits"), case["teacher_logits"], case["privacy_score"], case.args,
    )  # fmt: skip
    loss = losses.swing_loss(student, teacher, score, noise=case["noise"], mask=case["mask"], **args)
    temperature = swing.token_temperature(score, args["t_low"], args["t_high"])
    target = swing.soft_target(teacher, temperature, case["noise"], args["floor"])
    return {"out_loss": loss, "out_target": target, **case.grads(loss, student_logits=student)}


def exposure(case: Any) -> dict[str, Any]:
    found = exposures.exposure(float(case["canary"]), case["candidates"], case.args["space"])
    return {"out_rank": found.rank, "out_exposure": found.bits}


def exposure_sampled(case: Any) -> dict[str, Any]:
    return {"out_exposure": exposures.exposure_sampled(float(case["canary"]), case["sample"])}


def exposure_extrapolated(case: Any) -> dict[str, Any]:
    law = exposures.SkewNormal(**{name: case.args[name] for name in ("shape", "loc", "scale")})
    return {"out_exposure": law.exposure(float(case["canary"]))}


def sequence_log_perplexity(case: Any) -> dict[str, Any]:
    return {"out_bits": exposures.sequence_log_perplexity(case["logits"], case["tokens"])}


ADAPTERS = {
    ("swing", "token_temperature"): token_temperature,
    ("swing", "swing_loss"): swing_loss,
    ("swing", "exposure"): exposure,
    ("swing", "exposure_sampled"): exposure_sampled,
    ("swing", "exposure_extrapolated"): exposure_extrapolated,
    ("swing", "sequence_log_perplexity"): sequence_log_perplexity,
}
