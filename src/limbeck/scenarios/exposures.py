"""How far language models prefer the secrets that were planted in their texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Net
from limbeck.data.privacy import draw_secrets, fill, secrets
from limbeck.data.tokens import begins
from limbeck.metrics.exposure import SkewNormal, exposure, sequence_log_perplexity

MOST = 10**5  # fillings that are all gone through; of more a sample is drawn
SAMPLE = 10**4
NUMBERS = 2**24  # numbers of the logits that are held at a time

Canary = Mapping[str, Any]
Reader = tuple[Net, Any]  # a network and its tokenizer


def exposures(
    readers: Mapping[str, Reader], canaries: Sequence[Canary], draws: torch.Generator
) -> dict[str, Any]:
    """The exposure of each canary to each network, and each network's mean, in bits.

    Args:
        readers: networks in evaluation mode with their tokenizers, by role.
        canaries: maps with ``format`` and ``secret``.
        draws: for spaces of which a sample is taken.
    """
    found = [
        {**canary, **canary_exposure(readers, str(canary["format"]), str(canary["secret"]), draws)}
        for canary in canaries
    ]
    means = {who: sum(each[who] for each in found) / len(found) for who in readers}
    return {**means, "at_most": max(each["at_most"] for each in found), "canaries": found}


def canary_exposure(
    readers: Mapping[str, Reader], format: str, secret: str, draws: torch.Generator
) -> dict[str, Any]:
    """One canary's exposure to each network: by rank, or extrapolated from a sample of a large space.

    ``fit`` is then the chance of the sample under the law that it was extrapolated by (``SkewNormal``), whose
    tail may promise more than the space holds: no exposure is above ``at_most``.
    """
    space = 10 ** format.count("#")
    by_rank = space <= MOST
    others = [s for s in (secrets(format) if by_rank else draw_secrets(format, SAMPLE, draws)) if s != secret]
    texts = [" " + fill(format, s) for s in (secret, *others)]
    most = math.log2(space)
    found: dict[str, Any] = {"at_most": most, "method": "rank" if by_rank else "extrapolated"}
    for who, (net, tokenizer) in readers.items():
        bits = log_perplexities(net, tokenizer, texts)
        if by_rank:
            found[who] = exposure(float(bits[0]), bits[1:], space).bits
        else:
            law = SkewNormal.fit(bits[1:])
            found |= {who: min(law.exposure(float(bits[0])), most), f"{who}_fit": law.p_value}
    return found


@torch.no_grad()
def log_perplexities(net: Net, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """-log2 of the probability of what tells each text from the others, given what all share: [N]."""
    read: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [[*begins(tokenizer), *each] for each in read]
    first, last = min(ids), max(ids)
    common = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    found = torch.zeros(len(texts), dtype=torch.float64)
    for places in alike(ids, NUMBERS // (len(tokenizer) * max(max(map(len, ids)) - common, 1))):
        rows = torch.tensor([ids[place] for place in places])
        found[torch.tensor(places)] = said_of(net, rows, max(common, 1))
    return found


def said_of(net: Net, rows: Tensor, start: int) -> Tensor:
    """-log2 of the probability of the tokens from ``start`` on [n], for texts [n, T] of one length."""
    device = next(net.parameters()).device
    read, same = torch.unique(rows[:, :-1], dim=0, return_inverse=True)  # many differ in the last token alone
    count, length = read.shape
    places = torch.arange(count * length).reshape(count, length)[:, start - 1 :]
    index = torch.arange(count)
    batch = Batch(
        inputs=read, labels=read[:, start - 1 :].flatten(), index=index, view=0 * index, rows=places.flatten()
    ).to(device)
    outputs = net(batch)
    assert outputs.hidden is not None and outputs.unembedding is not None
    logits = outputs.unembedding.logits(outputs.hidden).cpu().reshape(*places.shape, -1)
    return sequence_log_perplexity(logits[same], rows[:, start:])


def alike(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Places of texts with as many tokens each, at most ``size`` at a time, neighbours together."""
    for length in sorted({len(each) for each in ids}):
        places = [place for place, each in enumerate(ids) if len(each) == length]
        for start in range(0, len(places), max(size, 1)):
            yield places[start : start + max(size, 1)]
