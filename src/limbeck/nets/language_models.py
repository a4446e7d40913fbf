"""Language models and tokenizers by name, by folder, or from a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.errors import ConfigError, LimbeckError
from limbeck.nets import hub
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
    network: Any
    if not weights:
        form = load_form(model)
        with _named(model):
            network = library.AutoModelForCausalLM.from_config(form, dtype=DTYPES[dtype])
    elif model.endswith(".gguf"):
        from limbeck.nets.gguf_lm import read_gguf_model

        network = read_gguf_model(model).to(DTYPES[dtype])  # type: ignore[arg-type]
    else:
        with _named(model) as place:
            alone = _kept_alone(place)
            network, found = library.AutoModelForCausalLM.from_pretrained(
                place, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True,
                trust_remote_code=False, local_files_only=alone, adapter_kwargs={"local_files_only": alone},
            )  # fmt: skip
            if found["missing_keys"]:  # which the library would leave at chance
                raise ValueError(f"it lacks the weights {min(found['missing_keys'])}")
    return network.eval()  # type: ignore[no-any-return]


def load_form(model: str) -> Any:
    """The configuration of a model, by the same names as ``load_model``; no weight is read.

    Raises:
        ConfigError: it cannot be had, or is of no causal language model.
    """
    library = the_library()
    with _named(model) as place:
        path = Path(place)
        packed = {"gguf_file": path.name} if model.endswith(".gguf") else {}
        form = library.AutoConfig.from_pretrained(
            path.parent if packed else place,
            trust_remote_code=False,
            local_files_only=_kept_alone(place),
            **packed,
        )
        if type(form) not in library.AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{form.model_type} is no causal language model")
    return form


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, by the same names as ``load_model``.

    Raises:
        ConfigError: it cannot be had.
    """
    library = the_library()
    if model.endswith(".gguf"):
        from limbeck.nets.gguf_lm import read_gguf_tokenizer

        return read_gguf_tokenizer(model)
    with _named(model, "the tokenizer of ") as place:
        tokenizer = library.AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=_kept_alone(place)
        )
        tokenizer("a")  # one that can be read may yet be unable to read
    return tokenizer


def _kept_alone(place: str) -> bool:
    """Whether a model can only be had from this machine."""
    return os.path.exists(place) or not hub.answers()


@contextmanager
def _named(model: str, part: str = "") -> Iterator[str]:
    """Where the model is; what the library says of one that cannot be had becomes one line."""
    folder = Path(os.path.expanduser(model))
    try:
        yield str(folder) if os.path.exists(folder) else model
    except LimbeckError:
        raise
    except Exception as error:  # of several libraries and many families
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        where, fix = "the Hugging Face hub", "go online once so that it is kept, or name a local folder"
        if os.path.exists(folder):
            where, fix = "the folder", "mend it, or name another"
        raise ConfigError(
            f"cannot load {part}language model {model!r} from {where} ({reason}): {fix}"
        ) from error
