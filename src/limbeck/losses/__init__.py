"""Pure losses: tensors in, tensor out. Each computes in at least float32 and detaches the teacher."""

from limbeck.losses.dkd import decoupled_kl
from limbeck.losses.hints import hint_mse
from limbeck.losses.kl import kl_divergence
from limbeck.losses.labels import cross_entropy, masked_cross_entropy
from limbeck.losses.reduction import Reduction, full_precision, reduce
from limbeck.losses.review import hcl, hcl_stage, token_review

__all__ = [
    "Reduction",
    "cross_entropy",
    "decoupled_kl",
    "full_precision",
    "hcl",
    "hcl_stage",
    "hint_mse",
    "kl_divergence",
    "masked_cross_entropy",
    "reduce",
    "token_review",
]
