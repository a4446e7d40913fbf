"""Adapters of DFPT-KD: its blocks, the two paths through a toy teacher, both sides' losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Outputs, Progress, Spec
from limbeck.nets.dual_path import PromptPath, SecondPath
from limbeck.nets.prompt_blocks import FusionBlock, PartialConv, PromptBlock
from limbeck.nets.taps import Tapped
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels


def load(block: PromptBlock, case: Any, behind: str = "") -> PromptBlock:
    """The weights of a prompt block, whose names end with ``behind``."""
    points = [part for part in block if isinstance(part, nn.Conv2d)]
    partial = [part for part in block if isinstance(part, PartialConv)]
    names = ["w_down", *(f"w_point_{n}" for n in range(len(partial))), "w_up"]
    if behind:
        names = [f"w_down{behind}", *(f"w_point{behind}" for _ in partial), f"w_up{behind}"]
    for part, name in zip(points, names, strict=True):
        part.load_state_dict({"weight": case[name]})
    for number, part in enumerate(partial):
        part.conv.load_state_dict({"weight": case[f"w_partial{behind or f'_{number}'}"]})
    return block


def prompt_block(case: Any) -> dict[str, Any]:
    args, x = case.args, case.leaf("x")
    block = PromptBlock(
        x.shape[1], args["r1"], args["r2"], args["kernels"], norm=args["norm"] or "none",
        activation=args["activation"],
    )  # fmt: skip
    prompt = load(block.double(), case)(x)
    return {"out_prompt": prompt, **case.grads((case["w"] * prompt).sum(), x=x)}


def fusion_block(case: Any) -> dict[str, Any]:
    prompt = case.leaf("prompt")
    block = FusionBlock(prompt.shape[1]).double()
    block.conv.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    y = block(case["x"], prompt)
    return {"out_y": y, **case.grads((case["w"] * y).sum(), prompt=prompt)}


class Toy(nn.Module):
    """Stages of a 1 x 1 convolution and ReLU, mean over the pixels, a head without bias."""

    def __init__(self, stages: list[Tensor], head: Tensor) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(w.shape[1], w.shape[0], 1, bias=False), nn.ReLU()) for w in stages)
        )
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False)
        self.load_state_dict(
            {f"stages.{n}.0.weight": w for n, w in enumerate(stages)} | {"head.weight": head}
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(x).mean((2, 3)))
        return logits


def dual_path(case: Any) -> dict[str, Any]:
    args, x, head = case.args, case["x"], case["head_original"]
    stages = [case[f"stage_{n}"] for n in range(args["stages"])]
    net = Tapped(Toy(stages, head).double()).requires_grad_(False).eval()
    config = PromptPath(r1=args["r1"], r2=args["r2"], kernels=tuple(args["kernels"]))
    spec = Spec(classes=len(head), channels=x.shape[1], size=x.shape[2])
    path = SecondPath(net, config, spec, torch.Generator()).double()
    block: Any = path.blocks[0]
    load(block.prompt, case, "_0")
    block.fuse.conv.load_state_dict({"weight": case["fuse_w_0"], "bias": case["fuse_b_0"]})
    path.head.load_state_dict({"weight": case["head_prompt"]})
    ids = torch.arange(len(x))
    batch = Batch(inputs=x, labels=ids, index=ids, view=ids)
    said = path(batch, net(batch))
    return {"out_logits_original": said.logits, "out_logits_prompt": said.along("prompt").logits}


def both_losses(case: Any) -> dict[str, Any]:
    args, ids = case.args, torch.arange(len(case["y"]))
    batch = Batch(inputs=case["z_teacher"], labels=case["y"], index=ids, view=ids)
    z_prompt, z_student = case.leaf("z_prompt"), case.leaf("z_student")
    said = Outputs(case["z_teacher"], paths={"prompt": Outputs(z_prompt)})
    student, at = Outputs(z_student), Progress()
    config = PromptPath(
        w_ce=args["prompt_ce"], w_teacher=args["prompt_from_teacher"],
        w_student=args["prompt_from_student"], temperature=args["T"],
    )  # fmt: skip
    spec = Spec(classes=5, channels=1, size=2)
    toy = Tapped(Toy([torch.ones(1, 1, 1, 1)] * 2, torch.ones(5, 1))).eval()
    path = SecondPath(toy, config, spec, torch.Generator())
    loss_prompt = sum(path.terms(said, student.detach(), batch, at).values())
    objectives = [
        Labels(weight=args["student_ce"]),
        KD(weight=args["student_from_teacher"], temperature=args["T"]),
        KD(weight=args["student_from_prompt"], temperature=args["T"], path="prompt"),
    ]
    told = said.detach()
    parts = [o.terms(student, told.along(o.path), batch, at) for o in objectives]
    loss_student = sum(value for part in parts for value in part.values())
    assert isinstance(loss_prompt, Tensor) and isinstance(loss_student, Tensor)
    return {
        "out_loss_prompt": loss_prompt, "out_loss_student": loss_student,
        **case.grads(loss_prompt, z_prompt=z_prompt), **case.grads(loss_student, z_student=z_student),
    }  # fmt: skip


ADAPTERS = {
    ("dfpt-kd", "prompt_block"): prompt_block,
    ("dfpt-kd", "fusion_block"): fusion_block,
    ("dfpt-kd", "dual_path_forward"): dual_path,
    ("dfpt-kd", "dfpt_losses"): both_losses,
}
