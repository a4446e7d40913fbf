"""Adapters of prompts, attention and prompted transformers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch
from limbeck.nets.backbones import VisionTransformer
from limbeck.nets.kd_prompts import KDPrompts
from limbeck.nets.prefix import Attention, halves, prefix_attention
from limbeck.nets.prompt_map import mapping_query, prompt_map
from limbeck.nets.prompted_vit import PromptedViT
from limbeck.nets.prompts import PromptSet
from limbeck.nets.prompts.coda import CODA, coda_prompt, gram_schmidt_expand, ortho
from limbeck.nets.prompts.dualprompt import DualPrompt, e_prompt, match_loss
from limbeck.nets.prompts.l2p import key_loss, prefix_prompts, prepended_prompts, reduce_sim, select


def attention_of(case: Any) -> Attention:
    width = case["x"].shape[-1]
    attn = Attention(width, num_heads=case.args["num_heads"], qkv_bias=True).double().eval()
    names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    attn.load_state_dict({name.replace("_", "."): case[name] for name in names})
    return attn.requires_grad_(False)


def prefix(case: Any) -> dict[str, Any]:
    attn = attention_of(case)
    names = [n for n in ("prompt_k", "prompt_v", "kd_k", "kd_v") if n in case]
    leaves = {name: case.leaf(name) for name in names}
    rows = list(leaves.values())
    y = prefix_attention(attn, case["x"], list(zip(rows[::2], rows[1::2], strict=True)))
    out = {"out_y": y, **case.grads((case["w"] * y).sum(), **leaves)}
    if "kd_k" not in case:
        out["out_y_no_prompt"] = prefix_attention(attn, case["x"])
    return out


def coda(case: Any) -> dict[str, Any]:
    args = case.args
    leaves = {name: case.leaf(name) for name in "KAP"}
    keys, values, loss = coda_prompt(
        case["query"],
        *leaves.values(),
        task=args["task_count"],
        group=args["pool_size"] // args["n_tasks"],
        ortho_weight=args["ortho_mu"],
        train=args["train"],
    )
    assert loss is not None
    total = (case["w_k"] * keys).sum() + (case["w_v"] * values).sum() + loss
    return {"out_Ek": keys, "out_Ev": values, "out_loss": loss, **case.grads(total, **leaves)}


def penalty(case: Any) -> dict[str, Any]:
    t = case.leaf("t")
    return {"out_loss": ortho(t), **case.grads(ortho(t), t=t)}


def expand(case: Any) -> dict[str, Any]:
    return {"out_pool": gram_schmidt_expand(case["pool"], case["draws"], case.args["task_count"])}


def l2p_select(case: Any) -> dict[str, Any]:
    args, key, prompt = case.args, case.leaf("key"), case.leaf("prompt")
    idx, near = select(case["cls_features"], key, args["top_k"], batchwise=args["batchwise_prompt"])
    found, total = prepended_prompts(prompt, idx), reduce_sim(near, idx)
    return {
        "out_idx": idx,
        "out_sim": near,
        "out_reduce_sim": total,
        "out_batched_prompt": found,
        "out_x_prepended": torch.cat((found, case["x_embed"]), dim=1),
        "out_grad_key_of_minus_reduce_sim": torch.autograd.grad(key_loss(near, idx), key)[0],
        **case.grads((case["w"] * found).sum(), prompt=prompt),
    }


def l2p_prefix(case: Any) -> dict[str, Any]:
    key = case.leaf("K")
    idx, near = select(case["query"], key, case.args["top_k"])
    keys, values = prefix_prompts(case["P"], idx)
    out = {"out_prompt_k": keys, "out_prompt_v": values, "out_cos_sim": near, "out_idx": idx}
    if case.args["train"]:
        own, every = key_loss(near, idx), key_loss(near, idx, pairs="all")
        out |= {"out_loss_cdl": own, "out_grad_K_cdl": case.grads(own, K=key)["out_grad_K"]}
        out |= {"out_loss_coda": every, "out_grad_K_coda": case.grads(every, K=key)["out_grad_K"]}
    return out


def dualprompt(case: Any) -> dict[str, Any]:
    return dualprompt_general(case) if "G" in case else dualprompt_expert(case)


def dualprompt_general(case: Any) -> dict[str, Any]:
    args, query = case.args, case["query"]
    config = DualPrompt.from_totals(g_total=args["g_length"], g_blocks=(args["layer"],), e_blocks=())
    net = config.build(query.shape[1], query.shape[1], args["layer"] + 1, 1, torch.Generator()).double()
    net.load_state_dict({"general": torch.stack(halves(case["G"]))[None]}, strict=False)
    found: PromptSet = net.train(args["train"])(query)
    keys, values = found.prefix[args["layer"]]
    assert found.loss is None
    return {"out_prompt_k": keys, "out_prompt_v": values, "out_loss_sum": 0.0, "out_loss_mean": 0.0}


def dualprompt_expert(case: Any) -> dict[str, Any]:
    args, key, prompt = case.args, case.leaf("K"), case.leaf("P")
    layout = torch.stack(halves(prompt))[None]
    task = args["task_id"] if args["train"] else None
    found = e_prompt(case["query"], key, layout, top_k=args["top_k"], task=task)
    keys, values = found.prompts[0]
    out = {
        "out_prompt_k": keys,
        "out_prompt_v": values,
        "out_cos_sim": found.similarity[0],
        "out_selected": found.chosen[0],
        "out_loss_sum": torch.zeros(()),
        "out_loss_mean": torch.zeros(()),
    }
    if args["train"]:
        total = match_loss(found, "sum")
        out |= {"out_loss_sum": total, "out_loss_mean": match_loss(found)}
        loss = (case["w_k"] * keys).sum() + (case["w_v"] * values).sum() + total
        out |= case.grads(loss, K=key, P=prompt)
    return out


def eprompt_pool(case: Any) -> dict[str, Any]:
    prompts, args = case["prompt"], case.args
    found = e_prompt(
        case["cls_features"], case["key"], prompts.flatten(-2), top_k=args["top_k"], task=args["task_mask"]
    )
    return {
        "out_idx": found.chosen[0],
        "out_sim": found.similarity[0],
        "out_reduce_sim": found.reduce_sim,
        "out_batched_prompt": found.prompts.unflatten(-1, prompts.shape[-2:]),
    }


def kd_split(case: Any) -> dict[str, Any]:
    args, token = case.args, case["kd_p_0"]
    config = KDPrompts(length=args["kd_prompt_length"], layers=args["kd_layers"])
    bank = config.build(token.shape[1], args["kd_layers"], torch.Generator())
    assert bank is not None
    bank.double().load_state_dict(kd_state(case))
    out: dict[str, Any] = {"out_kd_token": bank.tokens(args["batch"])}
    for block, (keys, values) in bank.prefixes().items():
        out[f"out_kd_k_{block}"] = keys.expand(args["batch"], -1, -1)
        out[f"out_kd_v_{block}"] = values.expand(args["batch"], -1, -1)
    return out


def kd_state(case: Any) -> dict[str, Tensor]:
    rows = [case[f"kd_p_{block}"] for block in range(1, case.args["kd_layers"])]
    return {"token": case["kd_p_0"], "prompts": torch.stack(rows)}


def mapping(case: Any) -> dict[str, Any]:
    args, leaves = case.args, {name: case.leaf(name) for name in "KAP"}
    live = args["pool_size"] // args["n_tasks"]  # the rows that the authors' code ever reads
    teacher = case["teacher_prompt_k"], case["teacher_prompt_v"]
    keys, values = prompt_map(*teacher, *(bank[:live] for bank in leaves.values()))
    loss = (case["w_k"] * keys).sum() + (case["w_v"] * values).sum()
    return {
        "out_query": mapping_query(*teacher),
        "out_mapped_k": keys,
        "out_mapped_v": values,
        **case.grads(loss, **leaves),
    }


def student_net(case: Any) -> PromptedViT:
    args, tokens = case.args, case["patch_tokens"].shape[1]
    width, depth, generator = args["embed_dim"], args["depth"], torch.Generator()
    vit = VisionTransformer(
        img_size=(tokens, 1),
        patch_size=1,
        embed_dim=width,
        depth=depth,
        num_heads=args["num_heads"],
        num_classes=0,
    )
    vit.patch_embed = nn.Identity()
    weights = {re.sub(r"_(\d+)_", r".\1.", n): w for n, w in case.weights("vit_").items()}
    for part in ("norm1", "norm2", "norm", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        flat = part.replace(".", "_")
        weights = {re.sub(rf"(^|\.){flat}_(weight|bias)$", rf"\1{part}.\2", n): w for n, w in weights.items()}
    config = CODA(pool=args["pool_size"], length=args["prompt_length"], blocks=tuple(args["e_layers"]))
    prompts = config.build(width, width, depth, args["n_tasks"], generator)
    bank = KDPrompts(length=args["kd_prompt_length"], layers=args["kd_layers"]).build(width, depth, generator)
    classes = len(case["last_bias"])
    net = PromptedViT(
        vit, prompts, classes, generator=generator, kd_prompts=bank, share=args["kd_alpha"]
    ).double()
    vit.load_state_dict(weights)
    banks = {
        name: torch.stack([case[f"coda_e_{letter}_{block}"] for block in args["e_layers"]])
        for name, letter in (("keys", "k"), ("attention", "a"), ("prompts", "p"))
    }
    prompts.load_state_dict({"task_count": torch.tensor(args["task_count"]), **banks})
    assert bank is not None and net.kd_head is not None
    bank.load_state_dict(kd_state(case))
    net.head.load_state_dict({"weight": case["last_weight"], "bias": case["last_bias"]})
    net.kd_head.load_state_dict({"weight": case["kd_last_weight"], "bias": case["kd_last_bias"]})
    return net.train(args["train"])


def kdp_student(case: Any) -> dict[str, Any]:
    net, images = student_net(case), case["patch_tokens"]
    ids = torch.arange(len(images))
    batch = Batch(inputs=images, labels=ids, index=ids, view=ids, query=case["query"])
    said = net(batch, taps=("norm",))
    loss = (case["w_ori"] * said.logits).sum() + (case["w_kd"] * said.soft).sum()
    kd: Any = net.kd_prompts
    token, rows, task_rows = torch.autograd.grad(loss, [kd.token, kd.prompts, net.prompts.prompts])
    return {
        "out_tokens": said.features["norm"],
        "out_ori_logits": said.logits,
        "out_kd_logits": said.soft,
        "out_eval_logits": net.predict(said),
        "out_grad_kd_p_0": token,
        **{f"out_grad_kd_p_{block}": grad for block, grad in enumerate(rows, start=1)},
        **{f"out_grad_coda_p_{b}": g for b, g in zip(case.args["e_layers"], task_rows, strict=True)},
    }


ADAPTERS = {
    ("cdl", "attention_with_kd_prompts"): prefix,
    ("cdl", "kd_prompt_split"): kd_split,
    ("cdl", "kdp_student_forward"): kdp_student,
    ("cdl", "prompt_mapping_v1"): mapping,
    ("coda-prompt", "coda_prompt_forward"): coda,
    ("coda-prompt", "gram_schmidt_expand"): expand,
    ("coda-prompt", "ortho_penalty"): penalty,
    ("coda-prompt", "prefix_attention"): prefix,
    ("dualprompt", "dualprompt_forward"): dualprompt,
    ("dualprompt", "eprompt_pool"): eprompt_pool,
    ("l2p", "l2p_pool_select"): l2p_select,
    ("l2p", "l2p_prefix_forward"): l2p_prefix,
}
