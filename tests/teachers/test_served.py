"""A served teacher: what it is asked, what its answers teach, and what happens when it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import served_endpoint
from tests.battery.networks import TEXT, language_model
from tests.engine import small, small_texts
from tests.served_endpoint import Server, fails, half, hangs, hangs_up, no_json, serving

from limbeck import api, cli, plain
from limbeck.contracts import Batch
from limbeck.data.tokens import Rows, batch_of
from limbeck.engine import capture
from limbeck.errors import ConfigError, DataError, LimbeckError, NonFiniteError, ServiceError
from limbeck.metrics import cost
from limbeck.nets import endpoint as wire
from limbeck.nets.causal_lm import CausalLM
from limbeck.nets.endpoint import Endpoint
from limbeck.nets.language_models import load_model
from limbeck.teachers.served import Served, documents

K = 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    found: list[float] = []
    monkeypatch.setattr(wire.time, "sleep", lambda seconds: found.append(seconds) if seconds >= 1 else None)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    small_texts.model(folder, room=0)
    return folder


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    with serving(str(place / "teacher")) as found:
        yield found


def endpoint(server: Server, **fields: Any) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "teacher", "k": K, "retries": 2, **fields})


def given(place: Path, server: Server, *sets: str) -> Any:
    """The small recipe with the served teacher."""
    return small_texts.recipe(place, f"teacher={json.dumps(choice(place, server))}", *sets)


def choice(place: Path, server: Server) -> dict[str, Any]:
    return {
        "name": "served", "url": server.url, "model": "teacher", "tokenizer_name": str(place / "teacher"),
        "k": K, "retries": 1,
    }  # fmt: skip


# What is asked, and what comes back


def batch() -> Batch:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 0], [3, 3, 3, 3, 3, 3]])
    said = torch.tensor([[2, 3, 9, -100, 6, 7], [-100, -100, 1, 2, -100, -100], [-100] * 6])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0] * 6])
    return batch_of(Rows("made up", ids, said, segments, torch.zeros(3), ("all",)), torch.arange(3))


def test_documents_are_asked_one_by_one_and_up_to_what_counts() -> None:
    assert list(documents(batch())) == [
        ([1, 2, 3, 9], [0, 1, 2]),
        ([4, 5, 6, 7], [1, 2]),
        ([7, 8, 9, 1, 2], [2, 3]),
    ]


def test_its_answers_are_those_of_the_same_model_here(tmp_path: Path) -> None:
    model = language_model(tmp_path)
    with serving(model) as server:
        net = Served(url=server.url, model="teacher", tokenizer_name=model, k=K).build(
            TEXT, torch.Generator()
        )
        told = net(batch())
    local = CausalLM(load_model(model)).eval()
    with torch.no_grad():
        outputs = local(batch())
    assert outputs.hidden is not None and outputs.unembedding is not None and told.top is not None
    ids, shares = capture.most_probable(outputs.hidden, outputs.unembedding, K)
    assert torch.equal(told.top[0], ids)
    torch.testing.assert_close(told.top[1], shares)
    torch.testing.assert_close(told.logits.gather(1, ids), shares)
    torch.testing.assert_close(told.logits.exp().sum(1), torch.ones(len(ids)))
    assert not list(net.parameters()) and not net.train().training


def test_what_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_SOME_KEY", "secret")
    endpoint(server, key_variable="LIMBECK_SOME_KEY").top([[1, 2, 3]], 16)
    endpoint(server).top([[1, 2, 3]], 16)
    assert server.asked[0] == {
        "model": "teacher", "prompt": [[1, 2, 3]], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": K,
    }  # fmt: skip
    assert [headers.get("Authorization") for headers in server.headers] == ["Bearer secret", None]


def test_all_tokens_may_be_asked_for(server: Server) -> None:
    ((ids, shares),) = endpoint(server, k=40).top([[1, 2]], 16)
    assert sorted(ids[0].tolist()) == list(range(16))
    assert float(shares.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_a_logarithm_of_nought_stays_one(server: Server) -> None:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        place = {str(token): {"logprob": -9999.0} for token in range(K)} | {"0": {"logprob": 0.0}}
        answer["choices"][0]["prompt_logprobs"][1] = place
        return answer

    server.spoil = spoil
    ((ids, shares),) = endpoint(server).top([[1, 2]], 16)
    assert (ids.tolist(), shares.tolist()) == ([[0, 1, 2, 3]], [[0.0] + [-math.inf] * 3])


# The run


@pytest.fixture(scope="module")
def live(place: Path) -> Path:
    """The same teacher here, with as many of its tokens kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "write_page", lambda _: None)
        patch.setattr(cost, "latency", lambda _: 0.0)
        api.run(small_texts.recipe(place, f"engine.cache_top_k={K}"), out=place / "live", quiet=True)
    return place / "live"


def gap(one: Path, other: Path) -> float:
    ours, theirs = small.weights(one), small.weights(other)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_the_student_is_that_of_the_same_teacher_here(
    place: Path, live: Path, server: Server, tmp_path: Path
) -> None:
    found = api.run(given(place, server), out=tmp_path / "run", quiet=True).data
    assert gap(live, tmp_path / "run") < 1e-5
    own = json.loads((live / "result.json").read_text())
    assert found["student"]["nll"] == pytest.approx(own["student"]["nll"], rel=1e-5)
    assert found["teacher_cache"] == pytest.approx(own["teacher_cache"])
    assert found["teacher_cache"]["kept"] == K and 0 < found["teacher_cache"]["left_out"] < 1
    assert found["teacher"] is None and found["cost"]["teacher"] is None
    near, whole = found["fidelity"], own["fidelity"]
    assert near["agreement"] == pytest.approx(whole["agreement"])
    assert 0 < near["kl"] <= whole["kl"] and 0 < near["reverse_kl"] <= whole["reverse_kl"]
    assert "acceptance" not in near


@pytest.mark.parametrize("sets", [("engine.cache=false",), ("objective=[kd]",), ("scenario.epochs=1",)])
def test_it_teaches_live_logits_and_a_single_epoch(
    place: Path, server: Server, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    found = api.run(given(place, server, *sets), out=tmp_path / "run", quiet=True).data
    assert 1 < found["student"]["perplexity"] < 100


def test_the_key_is_written_nowhere(
    place: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_SOME_KEY", "very-secret")
    api.run(given(place, server, "teacher.key_variable=LIMBECK_SOME_KEY"), out=tmp_path / "run", quiet=True)
    assert all(headers["Authorization"] == "Bearer very-secret" for headers in server.headers)
    assert not any(b"very-secret" in file.read_bytes() for file in (tmp_path / "run").rglob("*.*"))


# Faults that pass


@pytest.mark.parametrize("fault", [fails(500), fails(503), fails(429), half, hangs_up, no_json, hangs])
def test_a_passing_fault_is_passed_over(server: Server, pauses: list[float], fault: Any) -> None:
    server.faults = {0: fault, 1: fault}
    ((ids, _),) = endpoint(server, timeout=0.2).top([[1, 2, 3]], 16)
    assert ids.shape == (2, K) and len(server.asked) == 3
    assert pauses == [1, 2]


def test_a_server_says_how_long_to_wait(server: Server, pauses: list[float]) -> None:
    def busy(handler: Any) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", "9")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.faults = {0: busy}
    endpoint(server).top([[1, 2, 3]], 16)
    assert pauses == [9]


def test_a_server_that_is_not_there(pauses: list[float]) -> None:
    with pytest.raises(ServiceError, match=r"does not answer, 3 times tried \(.*refused"):
        Endpoint(url="http://127.0.0.1:9/v1", model="teacher", k=K, retries=2).check()
    assert pauses == [1, 2]


# Faults that do not


def broken(change: Any) -> Any:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer)
        return answer

    return spoil


def places(answer: dict[str, Any]) -> list[Any]:
    found: list[Any] = answer["choices"][0]["prompt_logprobs"]
    return found


ANSWERS: dict[str, tuple[Any, type[LimbeckError], str]] = {
    "of another model": (
        lambda a: a.update(model="other"), DataError, "asked for 'teacher' but 'other' answered",
    ),
    "to too few texts": (lambda a: a["choices"].pop(), DataError, "2 texts but did not answer to each once"),
    "without prompts": (
        lambda a: a["choices"][0].pop("prompt_logprobs"), ConfigError,
        "gives no log-probabilities of a prompt's tokens: serve the model with vLLM",
    ),
    "of other tokens": (lambda a: places(a).pop(), DataError, "a text of 3 tokens but tells of 2"),
    "with a gap": (lambda a: places(a).__setitem__(1, None), DataError, "says nothing of token 1"),
    "of words": (
        lambda a: places(a).__setitem__(1, {"the": {"logprob": -1}}), DataError, "does not give token ids",
    ),
    "without numbers": (
        lambda a: places(a).__setitem__(1, {"1": -1.0}), DataError, "token ids with their logprob",
    ),
    "with no number": (
        lambda a: places(a)[1].update({"3": {"logprob": math.nan}}), NonFiniteError, "is no number",
    ),
    "of another vocabulary": (
        lambda a: places(a)[1].update({"16": {"logprob": -0.01}}), DataError,
        "gives token 16 but the tokenizer has 16: name that of teacher as teacher.tokenizer_name",
    ),
    "of too few tokens": (
        lambda a: places(a).__setitem__(1, {"1": {"logprob": -1}}), DataError,
        "gives 1 tokens where 4 were asked for: set teacher.k to 1",
    ),
    "that is no distribution": (
        lambda a: places(a).__setitem__(1, {str(t): {"logprob": -0.1} for t in range(4)}), DataError,
        "probabilities that sum to more than 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_a_wrong_answer_is_refused_at_once(server: Server, case: str) -> None:
    change, kind, message = ANSWERS[case]
    server.spoil = broken(change)
    with pytest.raises(kind, match=message) as caught:
        endpoint(server).top([[1, 2, 3], [4, 5, 6]], 16)
    assert len(server.asked) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the key \(status 401\): name the variable that holds it as teacher.key_variable"),
        (400, r"refuses what it is asked \(status 400\): no more than 20, please"),
    ],
)
def test_a_refusal_is_final(server: Server, status: int, message: str) -> None:
    server.faults = {0: fails(status, "no more\n than 20, please")}
    with pytest.raises(ConfigError, match=message):
        endpoint(server).top([[1, 2, 3]], 16)
    assert len(server.asked) == 1


def test_another_model_is_named(place: Path) -> None:
    with (
        serving(str(place / "teacher"), "techer") as server,
        pytest.raises(ConfigError, match=r"unknown served model 'teacher' at http.*did you mean 'techer'"),
    ):
        endpoint(server).check()


def test_a_key_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="'LIMBECK_SOME_KEY' but the environment has none such"):
        endpoint(server, key_variable="LIMBECK_SOME_KEY").check()


def test_a_key_that_was_meant_for_others(server: Server) -> None:
    with pytest.raises(ConfigError, match="'AWS_KEY': allowed are names that begin with LIMBECK_"):
        Served(url=server.url, model="teacher", tokenizer_name="none", key_variable="AWS_KEY")


# A server that stops


def test_a_run_goes_on_where_the_server_stopped(
    place: Path, live: Path, server: Server, tmp_path: Path, pauses: list[float], capfd: Any
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(plain.write(small_texts.given(place, f"teacher={json.dumps(choice(place, server))}")))
    command = ["run", str(recipe), "--out", str(tmp_path / "run"), "--json"]

    def code(*arguments: str) -> int:
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    server.faults = dict.fromkeys(range(3, 99), fails(500))
    assert code(*command) == 75
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"limbeck: {server.url} does not answer, 2 times tried (status 500); its answers are kept: go on "
        f"with limbeck resume {tmp_path / 'run'}"
    )
    assert [json.loads(h.read_text())["rows"] for h in (tmp_path / "run").rglob("header.json")] == [16]
    before = server.asked[:3]
    server.asked.clear()
    server.faults = {}
    assert code(*command) == 0, "the same command goes on"
    assert before[1]["prompt"] not in [body["prompt"] for body in server.asked], "nothing is asked twice"
    assert gap(live, tmp_path / "run") < 1e-5


def test_a_live_run_keeps_the_steps_that_it_took(
    place: Path, server: Server, tmp_path: Path, pauses: list[float]
) -> None:
    sets = ("engine.cache=false",)
    api.run(given(place, server, *sets), out=tmp_path / "whole", quiet=True)
    asked = len(server.asked)
    server.faults = dict.fromkeys(range(asked + 6, asked + 99), fails(502))
    with pytest.raises(ServiceError, match="go on with limbeck resume"):
        api.run(given(place, server, *sets), out=tmp_path / "run", quiet=True)
    server.faults = {}
    server.asked.clear()
    api.resume(tmp_path / "run", quiet=True)
    assert len(server.asked) < asked
    small.assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd': allowed are those that begin with http://"),
        ({"k": 0}, "k is 0: allowed are values of at least 1"),
        ({"retries": -1}, "retries is -1: allowed are values of at least 0"),
        ({"timeout": 0}, "timeout is 0: allowed are values above 0"),
    ],
)  # fmt: skip
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Served(**{"url": "http://here/v1", "model": "m", "tokenizer_name": "t", **fields})


def test_it_has_no_features(server: Server) -> None:
    net = Served(url=server.url, model="teacher", tokenizer_name="t").build(TEXT, torch.Generator())
    with pytest.raises(ConfigError, match="a served teacher has no features, but an objective reads 'x'"):
        net(batch(), taps=("x",))


def test_the_endpoint_of_these_tests_is_closed(place: Path) -> None:
    with serving(str(place / "teacher")) as server:
        url = server.url
    with pytest.raises(ServiceError):
        Endpoint(url=url, model=served_endpoint.NAME, k=K, retries=0).check()
