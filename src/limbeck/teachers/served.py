"""A language model that others serve, asked for its most probable tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Net, Outputs, Spec, Teacher
from limbeck.engine.capture import probable_logits
from limbeck.errors import ConfigError
from limbeck.nets.causal_lm import TextInput
from limbeck.nets.endpoint import Endpoint
from limbeck.nets.language_models import load_tokenizer

OWN = "LIMBECK_"


@dataclass(frozen=True, kw_only=True)
class Served(Teacher):
    """A language model behind an OpenAI-compatible endpoint that tells each token's likeliest alternatives.

    The server gets token ids and must know vLLM's parameter ``prompt_logprobs`` of ``/v1/completions``: vLLM
    from 0.6 on, started with ``--max-logprobs`` of ``k`` or more (its default is 20). llama.cpp's server and
    OpenAI's own tell of generated tokens alone and will not do.

    Attributes:
        url: the endpoint up to and with ``/v1``.
        model: the name that the server gives the model. What is kept of its answers goes by it, so it
            must stand for the same weights as long as a run lasts.
        tokenizer_name: the model whose tokenizer it has: a name on the Hugging Face hub, a local folder or a
            ``.gguf`` file.
        k: how many of the most probable tokens are asked for.
        timeout: seconds that an answer may take.
        retries: further attempts where the server fails, with pauses of 1, 2, 4, ... seconds between them.
        key_variable: the environment variable that holds the server's key, which is written nowhere; its
            name begins with LIMBECK_, so that no recipe can send what was meant for others. Empty = no key
            is sent.

    Raises:
        ConfigError: a field out of its range, or an address that is none of the web.
    """

    url: str
    model: str
    tokenizer_name: str
    k: int = 20
    timeout: float = 120.0
    retries: int = 6
    key_variable: str = ""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {self.url!r}: allowed are those that begin with http:// or https://")
        if self.key_variable and not self.key_variable.startswith(OWN):
            raise ConfigError(
                f"key_variable is {self.key_variable!r}: allowed are names that begin with {OWN}: set "
                f"{OWN}KEY to the server's key, say, and name that"
            )
        for name, least in (("k", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least {least}")
        if self.timeout <= 0:
            raise ConfigError(f"timeout is {self.timeout}: allowed are values above 0")

    def input_spec(self) -> TextInput:
        """No pixels."""
        return TextInput()

    def reads_text(self) -> bool:
        """It does."""
        return True

    def tells(self) -> int | None:
        """See ``Teacher.tells``."""
        return self.k

    def tokenizer(self) -> Any:
        """See ``Network.tokenizer``."""
        return load_tokenizer(self.tokenizer_name)

    def check(self, spec: Spec) -> None:
        """Whether the server is there and has the model."""
        if self.k > spec.classes:
            raise ConfigError(
                f"teacher.k is {self.k} but the tokenizer has {spec.classes} tokens: ask for fewer"
            )
        self.endpoint().check()

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        return ServedLM(self.endpoint(), spec.classes)

    def endpoint(self) -> Endpoint:
        """Where it is asked."""
        return Endpoint(
            self.url, self.model, self.k, timeout=self.timeout, retries=self.retries,
            key_variable=self.key_variable,
        )  # fmt: skip


class ServedLM(Net):
    """A served language model; it answers for the tokens that count.

    Args:
        endpoint: who is asked.
        vocabulary: how many token ids there are.
    """

    constant = True
    identity: Tensor

    def __init__(self, endpoint: Endpoint, vocabulary: int) -> None:
        super().__init__()
        self.endpoint, self.vocabulary = endpoint, vocabulary
        name = f"{endpoint.model} {endpoint.k} {vocabulary}".encode()
        self.register_buffer("identity", torch.tensor(list(name), dtype=torch.uint8))  # what its hash is of

    def train(self, mode: bool = True) -> ServedLM:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """What most probably follows each token that counts.

        Args:
            batch: token ids [B, T], with ``rows`` and maybe ``segments``.
            taps: none can be given.
            teacher: not read.

        Raises:
            ConfigError: there are taps.
            LimbeckError: see ``Endpoint.top``.
        """
        if taps:
            raise ConfigError(
                f"a served teacher has no features, but an objective reads {taps[0]!r} of it: take divergence"
            )
        asked = list(documents(batch))
        told = self.endpoint.top([text for text, _ in asked], self.vocabulary)
        ids, shares = (
            torch.cat([rows[side][wanted] for rows, (_, wanted) in zip(told, asked, strict=True)]).to(
                batch.inputs.device
            )
            for side in (0, 1)
        )
        logits = shares.new_empty(len(shares), 0)
        if self.projects:
            logits = probable_logits(ids, shares, self.vocabulary)
        return Outputs(logits=logits, top=(ids, shares))


def documents(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """The texts of a batch with a token that counts, in the order of these.

    Each is what its document has in the row, up to the last token that is to be said; with it go the places,
    counted from 0 behind the first token, that are to be said.
    """
    assert batch.rows is not None
    length = batch.inputs.shape[1]
    segments = torch.zeros_like(batch.inputs) if batch.segments is None else batch.segments
    numbers, labels = segments.tolist(), batch.labels.tolist()
    found = [divmod(place, length) for place in batch.rows.tolist()]
    counted = iter(range(len(found)))
    for (row, segment), part in groupby(found, lambda place: (place[0], numbers[place[0]][place[1]])):
        places = [column for _, column in part]
        last = [next(counted) for _ in places][-1]
        start = numbers[row].index(segment)
        text = batch.inputs[row, start : places[-1] + 1].tolist()
        yield [*text, labels[last]], [column - start for column in places]
