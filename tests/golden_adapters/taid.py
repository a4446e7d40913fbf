"""Adapters of TAID: its loss and the rule that moves its target."""

from __future__ import annotations

from typing import Any

import torch

from limbeck import losses


def taid_loss(case: Any) -> dict[str, Any]:
    student, teacher, t = case.leaf("student_logits"), case["teacher_logits"], case.args["t"]
    loss = losses.token_divergence(losses.TAID(t), student, teacher, mask=case["mask"])
    grads = case.grads(loss, student_logits=student)
    return {"out_loss": loss, "out_p_t": losses.intermediate(student, teacher, t), **grads}


def taid_update(case: Any) -> dict[str, Any]:
    args = case.args
    state, seen = losses.TAIDState.begin(args["t_start"]), []
    for loss, step in zip(case["losses"], case["global_steps"].tolist(), strict=True):
        state = losses.taid_update(
            state,
            loss,
            step,
            args["num_train_steps"],
            t_start=args["t_start"],
            t_end=args["t_end"],
            alpha=args["alpha"],
            beta=args["beta"],
            adaptive=not args.get("disable_adaptive", False),
        )
        seen.append(state)
    return {
        "out_t": torch.stack([s.t for s in seen]),
        "out_momentum": torch.stack([s.momentum for s in seen]),
        "out_prev_loss": torch.stack([s.previous for s in seen]),
        "out_delta_t": torch.stack([s.step for s in seen]),
    }


ADAPTERS = {("taid", "taid_loss"): taid_loss, ("taid", "taid_update"): taid_update}
