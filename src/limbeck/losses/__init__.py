"""Pure losses: tensors in, tensor out. Each computes in at least float32 and detaches the teacher."""

from limbeck.losses.attention import attention, attention_transfer
from limbeck.losses.correlation import dist, pearson
from limbeck.losses.crd import likelihoods, noise_contrast, remembered
from limbeck.losses.divergences import (
    DIVERGENCES,
    JSD,
    AdaptiveKL,
    Divergence,
    ForwardKL,
    Pair,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    centred,
    pair_of,
    sequence_weights,
    token_divergence,
)
from limbeck.losses.dkd import decoupled_kl
from limbeck.losses.elastic import (
    budget_probabilities,
    embedding_importance,
    expected_cost,
    ffn_importance,
    gumbel_softmax,
    gumbel_temperature,
    head_importance,
    importance_ranks,
    layer_importance,
    mamba_importance,
    mamba_mask,
    mixed_mask,
    prefix_masks,
    router_logit_scale,
    router_loss,
)
from limbeck.losses.first import first_loss
from limbeck.losses.hints import hint_mse
from limbeck.losses.information import variational_information
from limbeck.losses.kl import kl_divergence
from limbeck.losses.labels import cross_entropy, masked_cross_entropy
from limbeck.losses.maps import at_one_size
from limbeck.losses.maximum_mean import neuron_selectivity
from limbeck.losses.mutual import mutual_mse
from limbeck.losses.on_policy import minillm_advantage, minillm_reward, on_policy_labels
from limbeck.losses.plackett_luce import fixed_places, plackett_luce, pld, teacher_places, teacher_ranking
from limbeck.losses.reduction import Reduction, full_precision, product, reduce
from limbeck.losses.relation_heads import head_products, relation_loss, relation_losses, token_relations
from limbeck.losses.relations import (
    angle_relations,
    angles,
    distance_relations,
    distances,
    similarities,
    similarity_relations,
)
from limbeck.losses.review import hcl, hcl_stage, token_review
from limbeck.losses.selective import select, selection_weights, selective_kl
from limbeck.losses.sequence_kl import sequence_kl
from limbeck.losses.sorted_tokens import sorted_l1, uld
from limbeck.losses.standard import standardise
from limbeck.losses.subclasses import (
    class_directions,
    fold,
    null_projector,
    positions,
    subclass_kl,
    subclass_log_probs,
)
from limbeck.losses.swing import swing_loss
from limbeck.losses.taid import TAID, TAIDState, intermediate, taid_update
from limbeck.losses.token_graph import context, contextual, global_graph, knn_affinity, local_graph, tokenise
from limbeck.losses.top_tokens import TopTokens, top_divergence
from limbeck.losses.two_heads import dual_head

__all__ = [
    "DIVERGENCES",
    "JSD",
    "TAID",
    "AdaptiveKL",
    "Divergence",
    "ForwardKL",
    "Pair",
    "Reduction",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TAIDState",
    "TopTokens",
    "TotalVariation",
    "angle_relations",
    "angles",
    "at_one_size",
    "attention",
    "attention_transfer",
    "budget_probabilities",
    "centred",
    "class_directions",
    "context",
    "contextual",
    "cross_entropy",
    "decoupled_kl",
    "dist",
    "distance_relations",
    "distances",
    "dual_head",
    "embedding_importance",
    "expected_cost",
    "ffn_importance",
    "first_loss",
    "fixed_places",
    "fold",
    "full_precision",
    "global_graph",
    "gumbel_softmax",
    "gumbel_temperature",
    "hcl",
    "hcl_stage",
    "head_importance",
    "head_products",
    "hint_mse",
    "importance_ranks",
    "intermediate",
    "kl_divergence",
    "knn_affinity",
    "layer_importance",
    "likelihoods",
    "local_graph",
    "mamba_importance",
    "mamba_mask",
    "masked_cross_entropy",
    "minillm_advantage",
    "minillm_reward",
    "mixed_mask",
    "mutual_mse",
    "neuron_selectivity",
    "noise_contrast",
    "null_projector",
    "on_policy_labels",
    "pair_of",
    "pearson",
    "plackett_luce",
    "pld",
    "positions",
    "prefix_masks",
    "product",
    "reduce",
    "relation_loss",
    "relation_losses",
    "remembered",
    "router_logit_scale",
    "router_loss",
    "select",
    "selection_weights",
    "selective_kl",
    "sequence_kl",
    "sequence_weights",
    "similarities",
    "similarity_relations",
    "sorted_l1",
    "standardise",
    "subclass_kl",
    "subclass_log_probs",
    "swing_loss",
    "taid_update",
    "teacher_places",
    "teacher_ranking",
    "token_divergence",
    "token_relations",
    "token_review",
    "tokenise",
    "top_divergence",
    "uld",
    "variational_information",
]
