"""Adapters of the measures of teacher hacking."""

from __future__ import annotations

from typing import Any

from limbeck.metrics import hacking


def sequence_distance(case: Any) -> dict[str, Any]:
    reference, student, kind = case["ref_logits"], case.leaf("student_logits"), case.args["kind"]
    loss = hacking.sequence_distance(reference, student, case["mask"], kind)
    per_token = hacking.distances(reference, student, kind)
    return {"out_per_token": per_token, "out_distance": loss, **case.grads(loss, student_logits=student)}


def chain_kl(case: Any) -> dict[str, Any]:
    chains = (case.inputs[name] for name in ("p_init", "p_trans", "q_init", "q_trans"))
    return {"out_kl": hacking.chain_kl(*chains, case.args["length"])}


def hacking_report(case: Any) -> dict[str, Any]:
    proxy, golden = (case.inputs[name].tolist() for name in ("proxy", "golden"))
    found = hacking.hacking_report(proxy, golden, case.args["tol"])
    return {
        "out_golden_argmin": found.argmin,
        "out_golden_rise": found.rise,
        "out_hacked": found.hacked,
    }


def power_law(case: Any) -> dict[str, Any]:
    found = hacking.power_law(case.inputs["steps"].tolist(), case.inputs["values"].tolist())
    return {
        "out_slope": found.slope,
        "out_intercept": found.intercept,
        "out_r2": found.r2,
        "out_max_residual": found.max_residual,
    }


ADAPTERS = {
    ("teacher-hacking", "sequence_distance"): sequence_distance,
    ("teacher-hacking", "chain_kl"): chain_kl,
    ("teacher-hacking", "hacking_report"): hacking_report,
    ("teacher-hacking", "power_law"): power_law,
}
