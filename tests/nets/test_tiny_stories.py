from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.errors import DataError
from limbeck.nets.generation import Sampling, generate
from limbeck.nets.tiny_stories import story_folder, story_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [" a", "ab", " ab", "aa", "é", "b ", " ", "a", "b", "c"]


def table(path: Path) -> Path:
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *BYTES, *(word.encode().decode("latin-1") for word in WORDS)]
    scores = [0.0] * 259 + [float(-place) for place in range(len(WORDS))]
    path.write_text(json.dumps({"pieces": pieces, "scores": scores, "byte_offset": 3}))
    return path


def by_the_rule(text: str, words: list[str], scores: list[float]) -> list[int]:
    """One id per character or byte, then the best adjacent pair again and again."""
    place = {word: 259 + i for i, word in enumerate(words)}
    ids = [1, place[" "]]
    for character in text:
        ids += [place[character]] if character in place else [3 + byte for byte in character.encode()]
    while True:
        names = [words[i - 259] if i >= 259 else None for i in ids]
        joined = [
            (scores[place[a + b] - 259], -at)
            for at, (a, b) in enumerate(pairwise(names))
            if a is not None and b is not None and a + b in place
        ]
        if not joined:
            return ids
        at = -max(joined)[1]
        ids[at : at + 2] = [place[words[ids[at] - 259] + words[ids[at + 1] - 259]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return story_tokenizer(table(tmp_path_factory.mktemp("table") / "table.json"), 32)


@given(st.text("aab cé€\n", min_size=1, max_size=30))
def test_text_is_cut_by_the_rule_and_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids == by_the_rule(text, WORDS, [-float(i) for i in range(len(WORDS))])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_it_knows_its_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a</s>").input_ids[-1] == 2
    assert len(tokenizer) == 259 + len(WORDS) and tokenizer.model_max_length == 32


def test_a_file_that_is_missing_or_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no table of pieces"):
        story_tokenizer(tmp_path / "no.json", 32)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 32}')
    with pytest.raises(DataError, match=r"weights.safetensors' is not there"):
        story_folder(
            tmp_path / "config.json", tmp_path / "weights.safetensors", tmp_path / "no.json", tmp_path / "out"
        )
    (tmp_path / "weights.safetensors").touch()
    config, weights = tmp_path / "config.json", tmp_path / "weights.safetensors"
    with pytest.raises(DataError, match="byte_offset"):
        story_folder(config, weights, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The real one


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("LIMBECK_DATA", "no folder"))
    if not (folder / "stories260k.safetensors").is_file():
        pytest.skip("stories260k: set LIMBECK_DATA to the folder that has stories260k.safetensors")
    return folder


@pytest.fixture(scope="module")
def stories(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    names = ("stories260k.config.json", "stories260k.safetensors", "stories260k.tok512.json")
    folder = story_folder(*(data / name for name in names), tmp_path_factory.mktemp("stories"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_real_tokenizer_cuts_by_the_rule(data: Path, stories: Any) -> None:
    known = json.loads((data / "stories260k.tok512.json").read_text())
    words = [piece.encode("latin-1").decode() for piece in known["pieces"][259:]]
    text = gzip.decompress((data / "tinystories_sample.txt.gz").read_bytes()).decode()
    for start in range(0, 20000, 1000):
        part = text[start : start + 200]
        assert stories[1](part).input_ids == by_the_rule(part, words, known["scores"][259:])


def test_it_tells_its_story(stories: Any) -> None:
    model, tokenizer = stories
    (told,) = generate(model, [[tokenizer.bos_token_id]], max_new_tokens=60, sampling=Sampling(temperature=0))
    assert tokenizer.decode(told).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )


def test_it_has_its_perplexity(data: Path, stories: Any) -> None:
    model, tokenizer = stories
    text = gzip.decompress((data / "tinystories_sample.txt.gz").read_bytes()).decode()
    blocks = torch.tensor(tokenizer(text[:5000]).input_ids[:2048]).view(4, 512)
    with torch.no_grad():
        loss = float(model(blocks, labels=blocks).loss)
    assert float(torch.tensor(loss).exp()) == pytest.approx(4.30, rel=0.03)
