"""A small server of a language model that tells of a prompt's tokens as vLLM does, and can fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from limbeck.nets.language_models import load_model

NAME = "teacher"


class Server(ThreadingHTTPServer):
    """A model that is asked over HTTP.

    Attributes:
        asked: the bodies of the questions for log-probabilities, in order.
        headers: the headers of all questions.
        faults: what happens to each such question instead of an answer, by its number from 0.
        spoil: changes an answer before it is sent.
    """

    daemon_threads = True

    def __init__(self, model: str, name: str = NAME) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.network: Any = load_model(model)
        self.name = name
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: dict[int, Callable[[Handler], None]] = {}
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """vLLM's: at each place the top k and the token that stands there, by id."""
        choices = []
        for number, ids in enumerate(body["prompt"]):
            shares = self.network(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            told: list[Any] = [None]
            for row, token in zip(shares[:-1], ids[1:], strict=True):
                top = row.topk(min(body["prompt_logprobs"], len(row))).indices.tolist()
                told.append({str(t): {"logprob": float(row[t]), "rank": 1} for t in (token, *top)})
            choices.append({"index": number, "text": "?", "prompt_logprobs": told})
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    """One question."""

    server: Server

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        self.give(200, {"object": "list", "data": [{"id": self.server.name}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers.append(dict(self.headers))
        self.server.asked.append(body)
        fault = self.server.faults.get(len(self.server.asked) - 1, self.server.faults.get(-1))
        if fault is not None:
            fault(self)
        else:
            self.give(200, self.server.spoil(self.server.answer(body)))

    def give(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def fails(status: int, message: str = "out of order") -> Callable[[Handler], None]:
    return lambda handler: handler.give(status, {"error": {"message": message}})


def half(handler: Handler) -> None:
    """The server dies while it answers."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def hangs(handler: Handler) -> None:
    threading.Event().wait(0.5)


def hangs_up(handler: Handler) -> None:
    handler.connection.close()


def no_json(handler: Handler) -> None:
    handler.give(200, b"<html>busy</html>")


@contextmanager
def serving(model: str, name: str = NAME) -> Iterator[Server]:
    """The server, as long as the context lasts."""
    server = Server(model, name)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
