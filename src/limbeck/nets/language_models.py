"""Language models and tokenizers by name, by folder, or from a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.errors import ConfigError
from limbeck.nets.torchvision_ops import declare_missing_ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def the_library() -> Any:
    """transformers, imported.

    Raises:
        ConfigError: it is missing.
    """
    declare_missing_ops()
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("language models need transformers: pip install 'limbeck[language]'") from error
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def load_model(model: str, *, dtype: str = "float32", weights: bool = True) -> nn.Module:
    """A causal language model in evaluation mode.

    Args:
        model: a name on the Hugging Face hub, a folder with ``config.json`` and safetensors, or a ``.gguf``
            file.
        dtype: a key of ``DTYPES``.
        weights: read the weights; else the model's form with weights of torch's own start.

    Raises:
        ConfigError: it cannot be had, or is no causal language model.
    """
    library = the_library()
    if model.endswith(".gguf"):
        from limbeck.nets.gguf_lm import read_gguf

        network: nn.Module = read_gguf(model)[0]
        return network.to(dtype=DTYPES[dtype]).eval()
    with _named(model):
        if not weights:
            config = library.AutoConfig.from_pretrained(model)
            network = library.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        else:
            network = library.AutoModelForCausalLM.from_pretrained(
                model, dtype=DTYPES[dtype], use_safetensors=True
            )
    return network.eval()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, by the same names as ``load_model``.

    Raises:
        ConfigError: it cannot be had.
    """
    library = the_library()
    if model.endswith(".gguf"):
        from limbeck.nets.gguf_lm import read_gguf_tokenizer

        return read_gguf_tokenizer(model)
    with _named(model):
        return library.AutoTokenizer.from_pretrained(model)


@contextmanager
def _named(model: str) -> Iterator[None]:
    """Turn what the library says of a model that cannot be had into one line."""
    folder = Path(model).expanduser()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "the folder" if folder.exists() else "the Hugging Face hub"
        raise ConfigError(
            f"cannot load language model {model!r} from {where} ({reason}): check the name, go online once "
            "so that it is kept, or name a local folder or .gguf file"
        ) from error
