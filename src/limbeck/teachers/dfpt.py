"""DFPT-KD: a teacher with a second path that learns beside the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Teacher
from limbeck.nets.dual_path import DualPath, PromptPath, SecondPath


@dataclass(frozen=True, kw_only=True)
class DFPT(PromptPath, Teacher):
    """Any teacher with a second, prompted forward path that is trained beside the student.

    The teacher itself stays as it is. The path runs through the teacher's own frozen stages with a prompt
    block P and a fusion block F behind each of them, and learns from the labels, from the teacher (to stay
    right) and from the student (to stay within reach). Objectives with ``path: prompt`` match the path,
    those without the teacher: the student's side is in the recipe.

    Attributes:
        teacher: the teacher, any choice; where it learns, it does so before the path.
        stages: module paths of the stages, as for taps; None = ``layer1`` .., or what ``stages``, ``blocks``,
            ``layers`` or ``hidden`` hold.
        after_last: a block behind the last stage too; else between the stages only. Inferred.
        head: module path of the classifier, whose place the path's own head takes; None = the last linear
            layer.
        grid: height and width of the patches where stages give tokens; None = as the network says.
        r1: the prompt block works on C / r1 channels. The paper names r1, r2 and k1 .. k3 but their values
            could not be had.
        r2: one in r2 of these passes the k x k convolutions.
        kernels: their sizes, odd.
        norm: ``batch`` = batch norm inside the prompt blocks. Inferred.
        activation: of the prompt blocks. Inferred.
        init: ``random`` blocks and head, so that the path starts weak; ``identity``: it starts as the
            teacher. Inferred.
        w_ce: weight of the labels in the path's loss. All losses' forms and weights are inferred.
        w_teacher: weight of the teacher in it.
        w_student: weight of the student in it.
        temperature: T > 0 of both; each carries T².
        lr: the path's learning rate, in units of the student's.
        plus: DFPT-KD+: the path has a copy of the teacher's stages, which learns too.
        plus_lr: the copy's learning rate, in units of the student's. Inferred.
        plus_norm: whether the copy's batch norm trains or keeps the teacher's statistics. Inferred.
        per_task: in a stream, whether the path goes on from task to task or starts again.

    Raises:
        ConfigError: a field out of its range.

    Source: Li et al., DFPT-KD (arXiv 2506.18244); no code is public.
    Differs: the paper's text could not be had; what is marked as inferred is a choice made here.
    """

    teacher: Teacher

    @property
    def learns(self) -> bool:  # type: ignore[override]  # that of the teacher inside
        """Whether the teacher is trained on labels before it teaches."""
        return self.teacher.learns

    @property
    def observes(self) -> bool:  # type: ignore[override]
        """Whether the teacher looks at the student's data before it teaches."""
        return self.teacher.observes

    def lessons(self) -> Any:
        """See ``Teacher.lessons``."""
        return self.teacher.lessons()

    def input_spec(self) -> Any:
        """What images the teacher expects."""
        return self.teacher.input_spec()

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``; the teacher is built as it would be alone.

        Raises:
            ShapeError: no stages or no classifier are found, or their outputs cannot be prompted.
        """
        net: Net = self.teacher.build(spec, generator)
        return DualPath(net, SecondPath(net, self, spec, generator))
