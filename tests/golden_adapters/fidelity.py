"""Adapters of the study of fidelity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limbeck import losses
from limbeck.metrics import accuracy, fidelity, overlap, statistics


def answer_agreement(case: Any) -> dict[str, Any]:
    student, teacher, gold = case["student"], case["teacher"], case["gold"]
    return {
        "out_agreement": fidelity.answer_agreement(student, teacher) / 100,
        "out_table": fidelity.agreement_table(student, teacher, gold) / 100,
        "out_student_accuracy": accuracy.accuracy(student, gold) / 100,
        "out_teacher_accuracy": accuracy.accuracy(teacher, gold) / 100,
    }


def token_fidelity(case: Any) -> dict[str, Any]:
    student, teacher, mask = case["student_logits"], case["teacher_logits"], case["mask"]
    return {
        "out_agreement": fidelity.agreement(student, teacher, mask) / 100,
        "out_predictive_kl": fidelity.predictive_kl(student, teacher, mask),
    }


def bleu(case: Any) -> dict[str, Any]:
    pad, n_max = case.args["pad"], case.args["n_max"]
    own, other = ([[w for w in text if w != pad] for text in case.inputs[name].tolist()]
                  for name in ("candidates", "references"))  # fmt: skip
    each = [overlap.sentence_bleu(c, r, n_max) for c, r in zip(own, other, strict=True)]
    return {"out_corpus": overlap.corpus_bleu(own, other, n_max), "out_sentence": each}


def sequence_kl(direction: Any) -> Any:
    def adapter(case: Any) -> dict[str, Any]:
        student, teacher, mask = case.leaf("student_logits"), case["teacher_logits"], case["pad_mask"]
        loss = losses.sequence_kl(student, teacher, mask, case.args["temperature"], direction)
        return {"out_loss": loss, **case.grads(loss, student_logits=student)}

    return adapter


def mismatched_jsd(case: Any) -> dict[str, Any]:
    """The study's own formula, for its released figures only: the package has the correct divergence.

    Its mixture gives beta to the student, its sum to the teacher.
    """
    student, beta, temperature = case.leaf("student_logits"), case.args["beta"], case.args["temperature"]
    mask = case["labels"] != -100
    log_q = (student / temperature).log_softmax(-1)[mask]
    log_p = (case["teacher_logits"] / temperature).log_softmax(-1)[mask]
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    loss = loss.sum() / mask.sum()
    return {"out_loss": loss, **case.grads(loss, student_logits=student)}


def kl(log_one: Tensor, log_other: Tensor) -> Tensor:
    return (log_one.exp() * (log_one - log_other)).sum(-1)


def tests_of(case: Any) -> dict[str, Any]:
    gain, size, group = (case.inputs[name] for name in ("improvement", "size", "group"))
    t, f, rho = (
        statistics.t_above_zero(gain), statistics.anova(gain, group), statistics.spearman(gain, size),
    )  # fmt: skip
    return {
        "out_t": t.statistic, "out_t_p_greater": t.p, "out_anova_f": f.statistic, "out_anova_p": f.p,
        "out_spearman": rho.statistic, "out_spearman_p": rho.p,
    }  # fmt: skip


ADAPTERS = {
    ("fidelity", "answer_agreement"): answer_agreement,
    ("fidelity", "token_fidelity"): token_fidelity,
    ("fidelity", "bleu"): bleu,
    ("fidelity", "seq_forward_kl"): sequence_kl("forward"),
    ("fidelity", "seq_reverse_kl"): sequence_kl("reverse"),
    ("fidelity", "mismatched_jsd"): mismatched_jsd,
    ("fidelity", "statistics"): tests_of,
}
