"""A server that says of each token of a text which others might have stood there."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import ConfigError, DataError, LimbeckError, NonFiniteError, ServiceError, unknown

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts; each is twice the one before
PASSING = (408, 409, 425, 429)  # answers that another attempt may change, besides those from 500 on
NEVER = -9999.0  # what vLLM writes for a logarithm of 0, which JSON has no number for
ROUNDING = 1e-2  # of a sum of probabilities that a server computed in half precision


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server with vLLM's parameter ``prompt_logprobs``.

    Attributes:
        url: up to and with ``/v1``.
        model: the name that the server gives it.
        k: how many of the most probable tokens are asked for.
        timeout: seconds that an answer may take.
        retries: further attempts where a server fails, with pauses of 1, 2, 4, ... seconds.
        key_variable: the environment variable that holds the key; empty = none is sent.
    """

    url: str
    model: str
    k: int
    timeout: float = 120.0
    retries: int = 6
    key_variable: str = ""

    def check(self) -> None:
        """Raise unless the server is there and has the model.

        Raises:
            ServiceError: no answer.
            ConfigError: the model is not among the server's, or the key will not do.
        """
        listed = self._call("models", None).get("data")
        if not isinstance(listed, list):
            raise DataError(f"{self.url} is no OpenAI-compatible server: its /models lists nothing")
        names = [str(one.get("id")) for one in listed if isinstance(one, Mapping)]
        if self.model not in names:
            raise unknown("served model", self.model, names, where=self.url)

    def top(self, texts: Sequence[Sequence[int]], vocabulary: int) -> list[tuple[Tensor, Tensor]]:
        """The most probable tokens at each place of each text but the first.

        Args:
            texts: token ids, two at least each.
            vocabulary: how many ids there are.

        Returns:
            For each text of n tokens: ids [n - 1, K] int64 and log-probabilities [n - 1, K] of the softmax of
            the whole vocabulary at temperature 1, the most probable first, where K is ``k``, or
            ``vocabulary`` where that is less.

        Raises:
            ServiceError: no answer after all attempts.
            ConfigError: the server refuses what it is asked, or gives no prompt log-probabilities.
            DataError: an answer about other texts, or of another vocabulary, or that is no distribution.
            NonFiniteError: a log-probability that is no number.
        """
        asked = {
            "model": self.model, "prompt": [list(text) for text in texts], "max_tokens": 1,
            "temperature": 1.0, "prompt_logprobs": self.k,
        }  # fmt: skip
        said = self._call("completions", asked)
        if said.get("model", self.model) != self.model:
            raise DataError(
                f"{self.url} was asked for {self.model!r} but {said['model']!r} answered: name that as "
                "teacher.model, or serve the other"
            )
        choices = said.get("choices")
        if not isinstance(choices, list) or len(choices) != len(texts):
            raise DataError(f"{self.url} was given {len(texts)} texts but did not answer to each once")
        ordered = sorted(choices, key=lambda choice: int(choice.get("index", 0)))
        return [self._read(one, text, vocabulary) for one, text in zip(ordered, texts, strict=True)]

    def _read(self, choice: Mapping[str, Any], text: Sequence[int], vocabulary: int) -> tuple[Tensor, Tensor]:
        """What the server said of one text."""
        places = choice.get("prompt_logprobs")
        if places is None:
            raise ConfigError(
                f"{self.url} gives no log-probabilities of a prompt's tokens: serve the model with vLLM, or "
                "with another server that knows prompt_logprobs"
            )
        if len(places) != len(text):
            raise DataError(
                f"{self.url} was given a text of {len(text)} tokens but tells of {len(places)}: it must take "
                "token ids as they are"
            )
        rows = [self._place(place, vocabulary, number) for number, place in enumerate(places[1:], 1)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([shares for _, shares in rows])

    def _place(self, told: Any, vocabulary: int, number: int) -> tuple[list[int], list[float]]:
        """The tokens at one place and their log-probabilities; vLLM adds the text's own token to the top."""
        if not isinstance(told, Mapping):
            raise DataError(f"{self.url} says nothing of token {number} of a text: take another server")
        try:
            found = [(int(token), float(one["logprob"])) for token, one in told.items()]
        except (TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{self.url} does not give token ids with their logprob ({error}): take another server"
            ) from error
        if any(math.isnan(share) for _, share in found):
            raise NonFiniteError(f"a log-probability that {self.url} gives is no number: mend that model")
        found = sorted(found, key=lambda pair: (-pair[1], pair[0]))[: self.k]
        ids, shares = [token for token, _ in found], [share for _, share in found]
        if min(ids, default=0) < 0 or max(ids, default=0) >= vocabulary:
            raise DataError(
                f"{self.url} gives token {max(ids)} but the tokenizer has {vocabulary}: name that of "
                f"{self.model} as teacher.tokenizer_name"
            )
        if len(ids) < min(self.k, vocabulary):
            raise DataError(
                f"{self.url} gives {len(ids)} tokens where {self.k} were asked for: set teacher.k to "
                f"{len(ids)}"
            )
        if sum(map(math.exp, shares)) > 1 + ROUNDING or shares[0] > ROUNDING:
            raise DataError(
                f"{self.url} gives probabilities that sum to more than 1: let it give those of the "
                "whole vocabulary (vLLM: --logprobs-mode raw_logprobs)"
            )
        return ids, [share if share > NEVER else -math.inf for share in shares]

    # The wire

    def _call(self, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """What the server answers to a POST of ``body``, or to a GET; tried again where it fails."""
        pause = FIRST_PAUSE
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, body)
            except _Passing as error:
                if attempt == self.retries:
                    raise ServiceError(
                        f"{self.url} does not answer, {attempt + 1} times tried ({error})"
                    ) from error
                time.sleep(min(max(pause, error.wait), LONGEST_PAUSE))
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _once(self, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", headers=self._headers())
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                said = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except ValueError as error:
            raise _Passing("its answer is no JSON") from error
        except (OSError, http.client.HTTPException) as error:  # timeouts, lost and refused connections
            raise _Passing(" ".join(str(getattr(error, "reason", "") or error).split())[:120]) from error
        if not isinstance(said, Mapping):
            raise _Passing("its answer is no JSON object")
        return said

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            key = os.environ.get(self.key_variable)
            if not key:
                raise ConfigError(
                    f"teacher.key_variable is {self.key_variable!r} but the environment has none such: "
                    "set it to the server's key"
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _refusal(self, error: urllib.error.HTTPError) -> LimbeckError:
        """What a status other than 200 means."""
        if error.code in PASSING or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            return _Passing(f"status {error.code}", float(wait) if wait.isdigit() else 0.0)
        if error.code in (401, 403):
            return ConfigError(
                f"{self.url} refuses the key (status {error.code}): name the variable that holds it as "
                "teacher.key_variable"
            )
        return ConfigError(f"{self.url} refuses what it is asked (status {error.code}): {_words(error)}")


class _Passing(LimbeckError):
    """A failure that another attempt may not meet; ``wait`` are the seconds that the server asks for."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says for itself, in one line."""
    text = error.read(4096).decode(errors="replace")
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = str(said.get("message", text))
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "no reason given"
