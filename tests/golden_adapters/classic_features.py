"""Adapters of the classic losses on features and relations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Facts, Outputs, Progress
from limbeck.objectives.at import AT
from limbeck.objectives.crd import CRD
from limbeck.objectives.nst import NST
from limbeck.objectives.rkd import RKD
from limbeck.objectives.sp import SP
from limbeck.objectives.vid import VID


def batch_of(index: Tensor) -> Batch:
    return Batch(inputs=index, labels=index, index=index, view=0 * index)


def tapped(**features: Tensor) -> Outputs:
    return Outputs(logits=torch.zeros(1, 1), features=features)


def terms(objective: Any, own: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    student, teacher = tapped(**own), tapped(**other)
    index = torch.arange(len(next(iter(own.values()))))
    found: dict[str, Tensor] = objective.build(student, teacher)(
        student, teacher, batch_of(index), Progress()
    )
    return found


def at_loss(case: Any) -> dict[str, Any]:
    count = sum(name.startswith("f_s_") for name in case.inputs)
    own = {f"s{i}": case.leaf(f"f_s_{i}") for i in range(count)}
    other = {f"t{i}": case[f"f_t_{i}"] for i in range(count)}
    power = float(case.args["p"])
    objective = AT(weight=1, power=power, student_taps=tuple(own), teacher_taps=tuple(other))
    (loss,) = terms(objective, own, other).values()
    pairs = zip(own.values(), other.values(), strict=True)
    stages = torch.stack([losses.attention_transfer(s, t, power) for s, t in pairs])
    grads = case.grads(loss, **{f"f_s_{i}": x for i, x in enumerate(own.values())})
    return {"out_loss": loss, "out_per_stage": stages, **grads}


def sp_loss(case: Any) -> dict[str, Any]:
    own = case.leaf("f_s")
    (loss,) = terms(SP(weight=1, student_tap="s", teacher_tap="t"), {"s": own}, {"t": case["f_t"]}).values()
    return {"out_loss": loss, **case.grads(loss, f_s=own)}


def rkd_loss(case: Any) -> dict[str, Any]:
    own, weights = case.leaf("f_s"), (case.args["distance_weight"], case.args["angle_weight"])
    objective = RKD(distance=weights[0], angle=weights[1], student_tap="s", teacher_tap="t")
    found = terms(objective, {"s": own}, {"t": case["f_t"]})
    loss = found["distance"] + found["angle"]
    return {
        "out_loss": loss,
        "out_distance": found["distance"] / weights[0],
        "out_angle": found["angle"] / weights[1],
        **case.grads(loss, f_s=own),
    }


def nst_loss(case: Any) -> dict[str, Any]:
    own = case.leaf("f_s")
    objective = NST(weight=1, student_taps=("s",), teacher_taps=("t",))
    (loss,) = terms(objective, {"s": own}, {"t": case["f_t"]}).values()
    return {"out_loss": loss, **case.grads(loss, f_s=own)}


def vid_loss(case: Any) -> dict[str, Any]:
    own = case.leaf("f_s")
    student, teacher = tapped(s=own), tapped(t=case["f_t"])
    module = VID(student_taps=("s",), teacher_taps=("t",)).build(student, teacher).double()
    (stage,) = module.stages
    with torch.no_grad():
        for place, name in ((0, "w1"), (2, "w2"), (4, "w3")):
            stage.mean[place].weight.copy_(case[name].reshape(stage.mean[place].weight.shape))
        start = stage.spread.clone()
        stage.spread.copy_(case["log_scale"])
    (loss,) = module(student, teacher, batch_of(torch.arange(len(own))), Progress()).values()
    torch.testing.assert_close(start, torch.full_like(start, case.args["init_log_scale"]), rtol=1e-6, atol=0)
    return {"out_loss": loss, **case.grads(loss, f_s=own, log_scale=stage.spread)}


def crd_step(case: Any) -> dict[str, Any]:
    args = case.args
    objective = CRD(negatives=args["K"], width=args["feat_dim"], temperature=args["T"])
    dry = tapped(**{"blocks.-1": torch.zeros(2, 3)})
    module = objective.build(dry, dry, Facts(samples=args["n_data"])).double()
    module.student_memory.copy_(case["memory_v1"])
    module.teacher_memory.copy_(case["memory_v2"])
    result: dict[str, Any] = {}
    for step in ("a", "b"):
        raw = case.leaf(f"embed_s_{step}"), case.leaf(f"embed_t_{step}")
        own, other = (F.normalize(x, dim=1) for x in raw)
        index, chosen = case[f"idx_{step}"], case[f"contrast_idx_{step}"]
        fits = module.fits(own, other, chosen)
        loss = torch.stack([losses.noise_contrast(fit, args["n_data"]) for fit in fits]).sum()
        result |= {f"out_v{i}_{step}": fit.unsqueeze(2) for i, fit in enumerate(fits, 1)}
        result |= {f"out_loss_{step}": loss}
        result |= case.grads(loss, **{f"embed_s_{step}": raw[0], f"embed_t_{step}": raw[1]})
        module.remember(own, other, index)
        result |= {f"out_memory_v1_after_{step}": module.student_memory.clone()}
        result |= {f"out_memory_v2_after_{step}": module.teacher_memory.clone()}
    result |= {"out_Z_v1": module.constants[0], "out_Z_v2": module.constants[1]}
    return result


ADAPTERS = {
    ("classic", "at_loss"): at_loss,
    ("classic", "sp_loss"): sp_loss,
    ("classic", "rkd_loss"): rkd_loss,
    ("classic", "nst_loss"): nst_loss,
    ("classic", "vid_loss"): vid_loss,
    ("classic", "crd_step"): crd_step,
}
