"""Tokenizers made from the texts at hand, and those that models bring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from limbeck.data.texts import Corpus
from limbeck.errors import ConfigError
from limbeck.nets.language_models import load_tokenizer, the_library

END, UNKNOWN = "<|end|>", "<|unknown|>"


def tokenizer_of(name: str, corpus: Corpus) -> Any:
    """A tokenizer of transformers.

    Args:
        name: ``characters``; ``bpe:N`` for N tokens of byte pairs; else a model's, as ``load_tokenizer``
            takes it.
        corpus: what the first two are made from.

    Raises:
        ConfigError: a number of tokens that cannot be, or a model that cannot be had.
    """
    kind, _, size = name.partition(":")
    texts = [part for d in corpus.documents for part in (d.prompt, d.text) if part]
    if name == "characters":
        return characters(texts)
    if kind == "bpe" and size:
        if not size.isdigit() or int(size) < 257:
            raise ConfigError(f"data.tokenizer is {name!r}: bpe takes a number of tokens of at least 257")
        return byte_pairs(tuple(texts), int(size))
    return load_tokenizer(name)


def characters(texts: Sequence[str]) -> Any:
    """Each character that occurs is a token; another one is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    found = sorted({character for text in texts for character in text})
    vocabulary = {token: number for number, token in enumerate((END, UNKNOWN, *found))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer, unk_token=UNKNOWN)


@lru_cache(maxsize=1)  # a run asks for it before it begins, and when it does
def byte_pairs(texts: tuple[str, ...], size: int) -> Any:
    """Byte-level pairs, merged by their frequency until there are ``size`` tokens or none is left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer)


def _fast(tokenizer: Any, **special: str) -> Any:
    library = the_library()
    return library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        **special,
    )


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash (64 hex digits) of which token has which number: equal where two read and say the same ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def special_of(tokenizer: Any) -> dict[str, int]:
    """The numbers of the tokens that begin, end and pad a text, as ``contracts.Spec`` names them."""
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return {name: int(token) for name, token in named.items() if token is not None}
