"""The small story tellers of llama2.c, as a folder that transformers reads.

Their tokenizer is a table of pieces with scores. Text begins with a space and is cut into characters; then
the adjacent pair whose joined piece has the highest score is merged, until none is left. Characters without a
piece stand as their bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from limbeck.errors import DataError

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2


def story_folder(config: Path, weights: Path, pieces: Path, folder: Path) -> Path:
    """Make ``folder`` a model that ``from_pretrained`` loads.

    Args:
        config: JSON of a ``LlamaConfig``.
        weights: safetensors with the names of ``LlamaForCausalLM``.
        pieces: see ``story_tokenizer``.
        folder: made where it is missing.

    Raises:
        DataError: a file is missing, or is no such table.
    """
    for file in (config, weights):
        if not file.is_file():
            raise DataError(f"{str(file)!r} is not there: give the config, weights and pieces of one model")
    tokenizer = story_tokenizer(pieces, json.loads(config.read_text("utf-8"))["max_position_embeddings"])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, folder / "config.json")
    shutil.copyfile(weights, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def story_tokenizer(file: Path, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a table of pieces; it begins each text with ``<s>``.

    Args:
        file: JSON with ``pieces`` (bytes written as latin-1) and ``scores`` in the order of the ids (unknown,
            begin, end, the 256 bytes, then pieces of text), and the ``byte_offset``.
        length: the longest sequence that the model reads.

    Raises:
        DataError: the file is missing, or is no such table.
    """
    try:
        table = json.loads(file.read_text("utf-8"))
        pieces, scores, first = table["pieces"], table["scores"], table["byte_offset"] + 256
    except (OSError, ValueError, LookupError) as error:
        raise DataError(
            f"{str(file)!r} is no table of pieces ({error}): give JSON with pieces, scores and byte_offset"
        ) from error
    names = [*SPECIAL, *pieces[len(SPECIAL) : first]]
    names += [piece.encode("latin-1").decode("utf-8") for piece in pieces[first:]]
    ids = {name: place for place, name in enumerate(names)}
    ranked = sorted(ids.items(), key=lambda item: -scores[item[1]])
    merges = [pair for name, place in ranked if place >= first for pair in _halves(name, ids, first)]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=SPECIAL[0], byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    unknown, begin, end = SPECIAL
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end,
        model_max_length=length, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return wrapped


def _halves(piece: str, ids: dict[str, int], first: int) -> list[tuple[str, str]]:
    """The pairs of pieces of text that join to ``piece``."""
    cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    return [(left, right) for left, right in cuts if ids.get(left, 0) >= first <= ids.get(right, 0)]
