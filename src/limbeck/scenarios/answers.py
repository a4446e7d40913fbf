"""What language models answer to the prompts of the test texts, judged word by word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from limbeck.data.texts import Document
from limbeck.data.tokens import encode
from limbeck.metrics import accuracy, fidelity, overlap
from limbeck.metrics.answers import answer_ids, last_number, words
from limbeck.nets.generation import Sampling, generate
from limbeck.scenarios.exposures import Reader
from limbeck.scenarios.written import model_of

Figures = dict[str, Any]


def answered(
    readers: Mapping[str, Reader], documents: Sequence[Document], *, tokens: int, template: bool,
    batch_size: int,
) -> dict[str, Figures]:  # fmt: skip
    """Figures of the answers, by role and of ``fidelity``.

    Prompts that leave a network no room for so many tokens are left out; nothing is found where all are.
    Where every right answer holds a number, the last one is what is answered; else all words are. Longer
    right answers are compared as they are, so that ROUGE-L misses what ``tokens`` leaves no room for.

    Args:
        readers: networks with their tokenizers, by role: ``student`` and maybe ``teacher``.
        documents: prompts with their right answers.
        tokens: of an answer, at most; the most probable one each time.
        template: whether prompts are put into the tokenizer's chat template.
        batch_size: prompts that are answered together.
    """
    prompts = {who: prompts_of(reader, documents, template=template) for who, reader in readers.items()}
    fits = [
        place
        for place in range(len(documents))
        if all(len(prompts[who][place]) + tokens - 1 <= room(reader) for who, reader in readers.items())
    ]
    if not fits:
        return {}
    right = [documents[place].text for place in fits]
    said = {
        who: answers(reader, [prompts[who][place] for place in fits], tokens=tokens, batch_size=batch_size)
        for who, reader in readers.items()
    }
    numbers = all(last_number(text) is not None for text in right)
    ids = dict(zip([*said, "right"], answer_ids([*said.values(), right], numbers=numbers), strict=True))
    found = {who: side(said[who], right, ids[who], ids["right"]) for who in readers}
    if "teacher" in found:
        found["fidelity"] = likeness(said["student"], said["teacher"], ids)
    return found


def prompts_of(reader: Reader, documents: Sequence[Document], *, template: bool) -> list[list[int]]:
    """The documents' prompts in a network's tokens."""
    return [encode(document, reader[1], template=template)[0] for document in documents]


def room(reader: Reader) -> float:
    """How many tokens a network reads at most; the last one of an answer it need not read."""
    most: int | None = getattr(model_of(reader[0]).config.get_text_config(), "max_position_embeddings", None)
    return float("inf") if most is None else most


def answers(reader: Reader, prompts: Sequence[Sequence[int]], *, tokens: int, batch_size: int) -> list[str]:
    """What a network answers to each prompt, greedily."""
    net, tokenizer = reader
    end = tokenizer.eos_token_id
    told = generate(
        model_of(net), prompts, max_new_tokens=tokens, eos=() if end is None else (end,),
        sampling=Sampling(temperature=0), batch_size=batch_size, vocabulary=len(tokenizer),
    )  # fmt: skip
    return [str(tokenizer.decode(text, skip_special_tokens=True)) for text in told]


def side(said: Sequence[str], right: Sequence[str], ids: Tensor, wanted: Tensor) -> Figures:
    """One network's figures: ROUGE-L in 0 .. 1, exact match in percent."""
    hits = int(((ids == wanted) & (ids != fidelity.UNPARSABLE)).sum())
    return {
        "rouge_l": overlap.rouge_l([words(text) for text in said], [words(text) for text in right]),
        "answered": len(ids),
        "exact_match": 100 * hits / len(ids),
        "exact_match_interval": list(accuracy.wilson(hits, len(ids))),
    }


def likeness(student: Sequence[str], teacher: Sequence[str], ids: Mapping[str, Tensor]) -> Figures:
    """How near the student's answers are to the teacher's, right or wrong.

    ``bleu`` is in 0 .. 1, the others in percent; the table's rows are the student right and wrong, its
    columns the teacher.
    """
    own, other = ([words(text) for text in texts] for texts in (student, teacher))
    table = fidelity.agreement_table(ids["student"], ids["teacher"], ids["right"])
    return {
        "answer_agreement": fidelity.answer_agreement(ids["student"], ids["teacher"]),
        "answer_table": table.tolist(),
        "bleu": overlap.corpus_bleu(own, other),
    }
