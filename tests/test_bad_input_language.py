"""What a user gets wrong with texts and language models, through the command line: one line that says what,
what is allowed and the fix; exit code 2; before any weight is read where that can be known."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.engine import small_texts

from limbeck import api, cli, plain
from limbeck.contracts import Spec
from limbeck.data.tokenizers import characters
from limbeck.engine.state import read_sealed, write_sealed
from limbeck.nets import language_models
from limbeck.scenarios import language
from limbeck.students.causal_lm import CausalLMStudent
from limbeck.students.llama import LlamaStudent
from limbeck.teachers.causal_lm import CausalLMTeacher

Said = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "caches"))
    monkeypatch.delenv("LIMBECK_DATA", raising=False)


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> str:
    """The path of a small recipe that works."""
    path = tmp_path / "small.yaml"
    path.write_text(plain.write(small_texts.given(place)))
    return str(path)


def call(*arguments: str) -> int:
    try:
        cli.main([*arguments, "--json"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Said:
    """Run a command that must fail; gives its one line."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        code = call(*arguments)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("limbeck: ")]
        assert line == err.splitlines()[-1]
        return line

    return run


def sets(*items: str) -> list[str]:
    return [word for item in items for word in ("--set", item)]


# Known before any weight is read, and before a folder is made

OWN = "data.tokenizer=characters"
SERVED = (
    "teacher={name: served, url: 'http://127.0.0.1:9/v1', model: large, tokenizer_name: '{model}', k: 4, "
    "retries: 0}"
)
IMAGES = (
    "scenario={name: static}",
    "data=digits",
    "student={name: mlp}",
    "teacher={name: trained, network: {name: mlp}}",
)
SAID: dict[str, tuple[tuple[str, ...], str]] = {
    "tokenizers that differ": (
        (OWN, "data.domains=[docs]"),
        r"teacher and student read different tokens \(16 and \d+\), which objective divergence "
        r"compares: take a student with the teacher's tokenizer, or the objective uld alone",
    ),
    "tokenizers that differ, and the labels alone": (
        (OWN, "data.domains=[docs]", "objective=[labels]", "scenario.writing={share: 1, by: teacher}"),
        r"teacher and student read different tokens \(16 and \d+\): take a student with the teacher's tok",
    ),
    "an objective beside the one that aligns tokenizers": (
        (OWN, "data.domains=[docs]", "objective=[uld, first]"),
        r"different tokens \(16 and \d+\), which objective first compares: take a student with the teacher",
    ),
    "a selector that compares tokens of two tokenizers": (
        (OWN, "data.domains=[docs]", "objective=[labels, uld]", "selector=adaspec"),
        r"different tokens \(16 and \d+\), which selector adaspec compares: .* or the selector all",
    ),
    "texts that are written in one of two tokenizers": (
        (OWN, "data.domains=[docs]", "objective=[labels, uld]", "scenario.writing={share: 0.5}"),
        r"but what a network writes is read in its own alone: .* or set scenario\.writing to null",
    ),
    "a selector without its teacher": (
        ("teacher=none", "objective=[labels]", OWN, "selector=ddk"),
        "selector ddk compares with a teacher but teacher is none: name one",
    ),
    "more than a served teacher tells a selector": (
        (SERVED, "selector=ddk"),
        r"selector ddk reads all that the teacher says, but it is served and tells of its 4 most probable",
    ),
    "fewer top tokens than an objective reads": (
        ("objective=[first]", "engine.cache_top_k=4"),
        r"objective first reads 5 of the teacher's tokens, but the 4 most probable alone are kept: set eng",
    ),
    "top tokens for an objective that reads all": (
        ("objective=[uld]", "engine.cache_top_k=4"),
        r"objective uld reads all of the teacher's tokens, but the 4 most probable alone are kept: set eng",
    ),
    "a written text for a privacy that the data alone knows": (
        ("objective=[swing]", "data.private=[digits]", "scenario.writing={share: 0.5}"),
        r"objective swing reads how private each token is, .*: set scenario\.writing to null",
    ),
    "a privacy that the data does not tell": (
        ("objective=[swing]",),
        r"objective swing reads how private each token is, but the data does not say: set data\.private",
    ),
    "a secret that is no number": (
        ("data={name: canaries, data: {name: python_texts}, formats: ['pin ##'], secrets: ['ab']}",),
        r"data: 'pin ##' has 2 slots '#' for 'ab': give one digit for each",
    ),
    "no tokenizer": (
        ("teacher=none", "objective=[labels]"),
        r"data\.tokenizer is null but neither student nor teacher brings one: set it to characters, bpe",
    ),
    "a tokenizer that is not the pretrained student's": (
        (
            "teacher=none",
            "objective=[labels]",
            "student={name: causal_lm, model: '{model}'}",
            "data.tokenizer=bpe:300",
        ),
        r"data\.tokenizer has \d+ tokens of its own, but the student was trained with 16 others",
    ),
    "too few byte pairs": (
        ("data.tokenizer=bpe:12",),
        r"data\.tokenizer is 'bpe:12': bpe takes a number of tokens",
    ),
    "rows that are longer than the model reads": (
        ("data.length=513",),
        r"data\.length is 513 but the teacher reads at most 512 tokens: set data\.length to 512",
    ),
    "fewer tokens than the tokenizer": (
        ("student={name: causal_lm, model: '{narrow}', pretrained: false}", "data.tokenizer={model}"),
        r"the student has 9 tokens but the tokenizer 16: name the tokenizer of the student",
    ),
    "layers that are not there": (
        ("student={name: causal_lm, model: '{model}', layers: 7}",),
        "layers is 7 but the model has 2: allowed are 1 to 2",
    ),
    "a model that is not there": (
        ("teacher.model={place}/nowhere",),
        "cannot load the tokenizer of language model '.*nowhere' from the Hugging Face",
    ),
    "a length": (("data.length=1",), "data: length is 1: allowed are values of at least 2"),
    "an objective of language models for images": (
        (*IMAGES, "objective=[first]"),
        "objective first matches language models: take scenario language, or kd",
    ),
    "a selector of language models for images": (
        (*IMAGES, "objective=[kd]", "selector=ddk"),
        "selector is DDK, which compares language models: take scenario language, or another selector",
    ),
    "a divergence": (
        ("objective.divergence.kind=forwrd_kl",),
        r"unknown divergence 'forwrd_kl'.*did you mean 'forward_kl'",
    ),
    "a constant of a divergence": (
        ("objective.divergence.kind=jsd", "objective.divergence.constants={betta: 0.5}"),
        r"unknown constant of jsd 'betta'.*did you mean 'beta'",
    ),
    "a constant's value": (
        ("objective.divergence.kind=jsd", "objective.divergence.constants={beta: 1.5}"),
        "objective.1: beta is 1.5",
    ),
    "a temperature for top tokens": (
        ("objective.divergence.temperature=2", "engine.cache_top_k=4"),
        r"objective\.divergence\.temperature is 2.*, but the teacher's top tokens are known at 1 alone",
    ),
    "images for language models": (
        ("data=digits",),
        "data is Digits, which holds no texts: take python_texts",
    ),
    "texts for image networks": (
        ("student={name: mlp}",),
        "the student is MLPStudent, which is no language model: take llama or causal_lm",
    ),
    "an image teacher": (
        ("teacher={name: trained, network: {name: mlp}}",),
        "the teacher is Trained, which is no language model: take llama or causal_lm, or trained",
    ),
    "several language models": (
        (
            "teacher={name: ensemble, members: "
            "[{name: causal_lm, model: '{model}'}, {name: causal_lm, model: '{model}', dtype: bfloat16}]}",
        ),
        "the teacher is Ensemble, which is no language model",
    ),
    "a language model with a second head": (
        ("student={name: dual_head, network: {name: llama}}",),
        "the student is DualHead.*, which is no language model",
    ),
    "texts for a scenario of images": (
        ("scenario={name: static}",),
        "data is PythonTexts, of texts, but scenario Static takes images: take scenario language",
    ),
    "language models for images": (
        ("scenario={name: static}", "data=digits"),
        "student is LlamaStudent, of texts, but scenario Static takes images",
    ),
    "language models in a stream": (
        ("scenario={name: continual}",),
        "data is PythonTexts, of texts, but scenario Continual takes images",
    ),
    "an objective without its teacher": (
        ("teacher=none", OWN),
        "objective 'divergence' needs a teacher but teacher is none",
    ),
    "a teacher whom none hears": (("objective=[labels]",), "no objective listens to it: add one such as kd"),
    "a file that is not there": (
        ("data={name: text_files, files: [nowhere.txt]}",),
        r"text file 'nowhere\.txt' is not there: give its path, or set",
    ),
    "bad lines": (
        ("data={name: jsonl, files: ['{place}/bad.jsonl']}",),
        r"bad\.jsonl, line 2: no JSON \(.*\): mend the line",
    ),
    "a field that no line has": (
        ("data={name: jsonl, files: ['{place}/bad.jsonl'], text: answer}",),
        r"bad\.jsonl, line 1: field 'answer' holds no text: the line has text",
    ),
    "a chat template that is not there": (
        ("data.template=true",),
        r"data\.template is true but the tokenizer has no chat template: set it to false",
    ),
    "texts without a word": (
        ("data={name: jsonl, files: ['{place}/empty.jsonl']}",),
        r"empty: too little text of domain 'empty' for its parts: give it more",
    ),
    "a served teacher's address": (
        (SERVED.replace("http", "ftp"),),
        "teacher: url is 'ftp://127.0.0.1:9/v1': allowed are those that begin with http:// or https://",
    ),
    "a temperature for a served teacher": (
        (SERVED, "objective.divergence.temperature=2"),
        r"objective\.divergence\.temperature is 2.*the teacher to one that is not served",
    ),
    "a served teacher that writes": (
        (SERVED, "scenario.writing={by: teacher}"),
        r"scenario\.writing has the teacher write but it is served.*: let the student write",
    ),
    "more tokens than there are of a served teacher": (
        (SERVED, "teacher.k=17"),
        r"teacher\.k is 17 but the tokenizer has 16 tokens: ask for fewer",
    ),
    "rows to evaluate": (
        ("scenario.eval_rows=0",),
        "scenario: eval_rows is 0: allowed are values of at least 1",
    ),
}


@pytest.fixture
def models(place: Path, recipe: str) -> dict[str, str]:
    """Names that the overrides above take."""
    narrow = place / "narrow"
    if not narrow.exists():
        LlamaStudent().build(Spec(classes=9, size=8), small_texts.torch.Generator()).save(narrow)
        (place / "empty.jsonl").write_text('{"text": ""}\n')
        (place / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    return {"place": str(place), "model": small_texts.model(place), "narrow": str(narrow)}


def no_weights(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights were read")


@pytest.mark.parametrize("case", SAID)
def test_known_before_any_weight_is_read(
    case: str,
    models: dict[str, str],
    recipe: str,
    tmp_path: Path,
    refused: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for choice in (CausalLMStudent, CausalLMTeacher, LlamaStudent):
        monkeypatch.setattr(choice, "build", no_weights)
    for module in (language_models, language):
        monkeypatch.setattr(module, "load_model", no_weights)
    asked, message = SAID[case]
    for name, value in models.items():
        asked = tuple(item.replace(f"{{{name}}}", value) for item in asked)
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(*asked))
    assert re.search(message, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()


# Known when the networks are there


def test_a_spoilt_teacher(place: Path, recipe: str, tmp_path: Path, refused: Said) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(small_texts.model(place), spoilt)
    state = load_file(spoilt / "model.safetensors")
    save_file({k: v * float("nan") for k, v in state.items()}, spoilt / "model.safetensors", {"format": "pt"})
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(f"teacher.model={spoilt}"))
    assert "the teacher's output is not finite before any training: mend its weights, or name others" in said


def test_damaged_and_missing_weights(place: Path, recipe: str, tmp_path: Path, refused: Said) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_texts.model(place), broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    for _ in range(2):
        said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(f"teacher.model={broken}"))
        assert re.search(
            "cannot load language model '.*broken' from the folder .*: mend it, or name another", said
        )
        (broken / "model.safetensors").unlink(missing_ok=True)


def test_a_model_that_cannot_tell_documents_apart(recipe: str, tmp_path: Path, refused: Said) -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)
    small_texts.torch.manual_seed(0)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    small_texts.tokenizer().save_pretrained(tmp_path / "bloom")
    asked = sets(f"teacher.model={tmp_path / 'bloom'}", "data.length=64")
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *asked)
    assert "BloomForCausalLM cannot tell documents in one row apart: set data.pack to false" in said
    assert call("run", recipe, "--out", str(tmp_path / "apart"), *asked, *sets("data.pack=false")) == 0


def test_logits_of_a_teacher_with_fewer_tokens(
    place: Path, recipe: str, tmp_path: Path, refused: Said
) -> None:
    wide = small_texts.model(place, "wide", room=9)
    asked = sets(f"student={{name: causal_lm, model: '{wide}'}}")
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *asked, *sets("objective=[kd]"))
    assert (
        "the teacher has 19 tokens and the student 25, and an objective compares all logits: take diverg"
        in said
    )
    assert call("run", recipe, "--out", str(tmp_path / "common"), *asked) == 0


def test_a_cache_of_another_teacher_is_made_anew(
    recipe: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    asked = sets("engine.cache_top_k=3", f"engine.cache_root={tmp_path / 'shared'}")
    code = call("run", recipe, "--out", str(run), *asked, *sets("scenario.optim.lr=1e30"))
    assert code == 2, "it stops in training, with the cache complete"
    (header,) = run.rglob("header.json")
    other = read_sealed(header)
    other["key"]["net"] = "0" * 64
    write_sealed(header, other)
    assert call("resume", str(run)) == 2
    assert re.search(
        r"warning: .*header\.json is of something else; the cache .* is made anew", capfd.readouterr().err
    )


def test_a_served_teacher_that_is_not_there(
    recipe: str, models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = sets(SERVED.replace("{model}", models["model"]))
    assert call("run", recipe, "--out", str(tmp_path / "run"), *asked) == 75, "another time it may be there"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("limbeck: http://127.0.0.1:9/v1 does not answer, 1 times tried (")
    assert not (tmp_path / "run").exists()


# What a run leaves


def test_another_tokenizer_of_the_same_size_is_another(
    place: Path, recipe: str, tmp_path: Path, refused: Said
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_texts.model(place), other)
    characters(["abcdefghijklmn"]).save_pretrained(other)
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(f"data.tokenizer={other}"))
    assert "teacher and student read different tokens (16 and 16)" in said
