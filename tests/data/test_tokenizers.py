from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data.texts import Corpus, Document
from limbeck.data.tokenizers import END, byte_pairs, characters, special_of, tokenizer_of, vocabulary_hash
from limbeck.errors import ConfigError
from limbeck.nets.language_models import load_tokenizer

TEXTS = ["the cat sat on the mat", "the dog, the log:\n\tça va?"]
CORPUS = Corpus("x", (Document(TEXTS[0], prompt=TEXTS[1]),), ("all",), "", "")
TRAIN = f"""
from limbeck.data.tokenizers import *
print(vocabulary_hash(byte_pairs(tuple({TEXTS!r} * 50), 300)))
"""


def test_characters_come_back_and_strangers_are_unknown() -> None:
    tokenizer = characters(TEXTS)
    assert len(tokenizer) == 2 + len(set("".join(TEXTS)))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("cäÿt")["input_ids"][1:3] == [tokenizer.unk_token_id] * 2
    assert special_of(tokenizer) == {"eos": 0, "pad": 0}


@given(st.text(max_size=60))
def test_byte_pairs_say_any_text(text: str) -> None:
    tokenizer = byte_pairs(tuple(TEXTS), 280)
    if END not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_byte_pairs_are_as_many_as_asked_for_and_the_same_in_every_process() -> None:
    tokenizer = byte_pairs(tuple(TEXTS * 50), 300)
    assert 257 < len(tokenizer) <= 300
    assert len(tokenizer("the mat")["input_ids"]) < len("the mat")
    for _ in range(2):
        again = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True)
        assert again.stdout.strip() == vocabulary_hash(tokenizer)


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((characters(TEXTS), byte_pairs(tuple(TEXTS), 270))):
        tokenizer.save_pretrained(tmp_path / str(number))
        again = load_tokenizer(str(tmp_path / str(number)))
        assert vocabulary_hash(again) == vocabulary_hash(tokenizer)
        assert special_of(again) == special_of(tokenizer)
        for text in TEXTS:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert again.decode(again(text)["input_ids"]) == text


def test_tokenizers_by_name(tmp_path: Path) -> None:
    made = tokenizer_of("characters", CORPUS)
    assert set(made.get_vocab()) >= set("".join(TEXTS)), "prompts are read too"
    assert len(tokenizer_of("bpe:260", CORPUS)) == 260
    made.save_pretrained(tmp_path)
    assert vocabulary_hash(tokenizer_of(str(tmp_path), CORPUS)) == vocabulary_hash(made)
    for name in ("bpe:12", "bpe:many"):
        with pytest.raises(
            ConfigError, match=f"data.tokenizer is '{name}': bpe takes a number of tokens of at least"
        ):
            tokenizer_of(name, CORPUS)
    with pytest.raises(ConfigError, match="cannot load the tokenizer of language model 'no/where'") as error:
        tokenizer_of("no/where", CORPUS)
    assert "\n" not in str(error.value)


def test_the_hash_tells_vocabularies_apart() -> None:
    assert vocabulary_hash(characters(["abc"])) == vocabulary_hash(characters(["cba"]))
    assert vocabulary_hash(characters(["abc"])) != vocabulary_hash(characters(["abcd"]))
