from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.bounded import bounded
from limbeck.contracts import Spec
from limbeck.data.aligned import aligned_rows
from limbeck.data.texts import Corpus, Document, Reading
from limbeck.data.tokenizers import byte_pairs, characters
from limbeck.data.tokens import UNCOUNTED, Rows, TokenBatches, batch_of, encode, rows_of
from limbeck.errors import ConfigError, DataError
from limbeck.students.llama import LlamaStudent

LETTERS = characters(["abcdefghij ?:"])
END = LETTERS.eos_token_id

documents = st.lists(
    st.builds(
        Document, st.text("abcdef", min_size=1, max_size=30), st.text("ghij?", max_size=12), st.integers(0, 1)
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def corpus(*found: Document) -> Corpus:
    return Corpus("made up train", found, ("one", "other"), "none", "here")


def rows(*found: Document, length: int = 8, pack: bool = True, tokenizer: Any = LETTERS) -> Rows:
    return rows_of(corpus(*found), tokenizer, Reading(length=length, pack=pack))


def read(made: Rows, row: int) -> str:
    """What stands in a row, ``.`` for the end token and for what fills it."""
    return "".join("." if token == END else LETTERS.decode([token]) for token in made.ids[row])


def said(made: Rows, row: int) -> str:
    """What is to be said at each place of a row, ``_`` where nothing counts."""
    marks = {END: ".", UNCOUNTED: "_"}
    return "".join(marks.get(token) or LETTERS.decode([token]) for token in made.following[row].tolist())


def test_what_is_read_and_what_is_said() -> None:
    made = rows(Document("abc"), Document("defgh"), Document("a"), Document("bcdefabcdef"))
    assert [read(made, row) for row in range(3)] == ["abcdefgh", "a.......", "bcdefabc"]
    assert [said(made, row) for row in range(3)] == ["bc.efgh.", "._______", "cdefabcd"]
    assert made.segments is not None
    assert made.segments.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0] + [1] * 7, [0] * 8, [0] * 3 + [1] * 5]
    assert (read(made, 3), said(made, 3)) == ("def.....", "ef._____")


def test_prompts_are_read_and_do_not_count() -> None:
    made = rows(Document("abc", prompt="gh?"), Document("d", prompt="ij?"), length=16)
    assert read(made, 0) == "gh?abcij?d......"
    assert said(made, 0) == "__abc.__d._______"[:16]
    assert made.prompts == ((LETTERS("gh?")["input_ids"], "abc"), (LETTERS("ij?")["input_ids"], "d"))
    assert made.counted == 6


def test_a_prompt_that_fills_rows_leaves_the_last_of_it() -> None:
    made = rows(Document("abc", prompt="ghijghijghij"))
    assert [read(made, row) for row in range(len(made))] == ["ghijabc."]


def test_texts_without_a_token_to_say() -> None:
    made = rows(Document(""), Document("", prompt="gh"), Document("ab"))
    assert (read(made, 0), said(made, 0)) == ("ghab....", "_.b.____"), "an empty answer ends at once"
    with pytest.raises(DataError, match="made up train: no token counts: each text has but one; check"):
        rows(Document("a", ends=False), Document("b", ends=False))


@given(documents, st.integers(2, 20), st.booleans())
def test_every_token_of_a_text_counts_once(found: list[Document], length: int, pack: bool) -> None:
    """Against a plain loop; the first token of a text without a prompt is the one that nothing precedes."""
    wanted = []
    for document in found:
        asked, told = encode(document, LETTERS)
        whole = [*asked, *told]
        first = max(len(asked), 1)
        wanted += [(whole[place - 1], whole[place]) for place in range(first, len(whole))]
    made = rows(*found, length=length, pack=pack)
    counted = made.following != UNCOUNTED
    assert list(zip(made.ids[counted].tolist(), made.following[counted].tolist(), strict=True)) == wanted
    assert made.counted == len(wanted)


@given(documents, st.integers(2, 20))
def test_a_packed_row_is_of_one_domain_and_pads_stand_apart(found: list[Document], length: int) -> None:
    made = rows(*found, length=length)
    places = [d.domain for d in found]
    assert set(made.domain.tolist()) == set(places)
    segments = torch.zeros_like(made.ids) if made.segments is None else made.segments
    for row, segment in zip(made.following, segments, strict=True):
        assert (segment.diff() >= 0).all()
        if made.segments is not None:
            last = int((row != UNCOUNTED).nonzero().max())
            assert (segment[last + 1 :] > segment[last]).all()
    assert len(made) <= len(rows(*found, length=length, pack=False))


@torch.no_grad()
def test_a_packed_text_is_read_as_if_it_stood_alone() -> None:
    choice = LlamaStudent(layers=3, width=24, heads=3)
    net: Any = choice.build(Spec(classes=len(LETTERS), size=24), torch.Generator().manual_seed(0)).eval()
    found = [Document("abc"), Document("fedcba"), Document("a"), Document("cab", prompt="gh?")]
    packed, alone = rows(*found, length=24), rows(*found, length=24, pack=False)
    assert (len(packed), len(alone)) == (1, 4)
    together, apart = (net(batch_of(made, torch.arange(len(made)))) for made in (packed, alone))
    torch.testing.assert_close(together.hidden, apart.hidden)
    torch.testing.assert_close(together.logits, apart.logits)
    blind = net(dataclasses.replace(batch_of(packed, torch.tensor([0])), segments=None))
    assert not torch.allclose(blind.hidden, apart.hidden, atol=1e-2)


def test_a_text_begins_as_its_tokenizer_begins_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = characters(["abc?"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    plain = encode(Document("ab", prompt="c?"), tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    asked, told = encode(Document("ab", prompt="c?"), tokenizer)
    assert plain == (asked[1:], told)
    assert asked[0] == tokenizer.bos_token_id
    made = rows(Document("ab"), tokenizer=tokenizer)
    assert made.ids[0, :3].tolist() == [tokenizer.bos_token_id, *told[:2]]
    assert made.following[0, :4].tolist() == [*told, UNCOUNTED]


def test_a_chat_template_stands_around_prompts() -> None:
    tokenizer = characters(["abc?:"])
    with pytest.raises(ConfigError, match=r"data\.template is true but the tokenizer has no chat template"):
        encode(Document("ab", prompt="c?"), tokenizer, template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}a:{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}b:{% endif %}"
    )
    asked, told = encode(Document("ab", prompt="c?"), tokenizer, template=True)
    assert tokenizer.decode(asked) == "a:c?b:"
    assert (tokenizer.decode(told[:-1]), told[-1]) == ("ab", tokenizer.eos_token_id)
    assert encode(Document("ab"), tokenizer, template=True) == encode(Document("ab"), tokenizer)


def test_a_chat_template_without_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.data.tokens.bounded", lambda: bounded(0.2))
    tokenizer = characters(["abc?:"])
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"chat template fails \(it takes more than 0.2 s\)"):
        encode(Document("ab", prompt="c?"), tokenizer, template=True)


def test_rows_are_joined() -> None:
    one, other = rows(Document("abc", domain=1), Document("ab", domain=1)), rows(Document("abcdefgh"))
    assert one.segments is not None and other.segments is None
    both = one.joined(other)
    assert len(both) == 2
    assert both.ids.tolist() == [*one.ids.tolist(), *other.ids.tolist()]
    assert both.segments is not None and both.segments[1].tolist() == [0] * 8
    assert both.domain.tolist() == [1, 0]
    assert both.counted == one.counted + other.counted
    assert rows(Document("abcdefgh"), Document("abcdefgh")).joined(other).segments is None


def test_the_fingerprint_is_of_what_is_read_and_said() -> None:
    same = rows(Document("abc"), Document("de")).fingerprint
    assert same == rows(Document("abc"), Document("de")).fingerprint
    others = [
        rows(Document("abc"), Document("de"), pack=False),
        rows(Document("c", prompt="ab"), Document("de")),
    ]
    others += [rows(Document("abc"), Document("de"), length=9), rows(Document("abc"), Document("df"))]
    made = rows(Document("abc"), Document("de"))
    others.append(dataclasses.replace(made, other=made))
    assert len({same, *(other.fingerprint for other in others)}) == 6


# Batches


def batches(count: int = 7, **given_: Any) -> TokenBatches:
    made = rows(*(Document("abcdef"[: 2 + n % 5], domain=n % 2) for n in range(count)), pack=False)
    return TokenBatches(made, **{"batch_size": 3, "seed": 4, **given_})


def test_batches_go_over_all_rows_in_an_order_of_each_epoch() -> None:
    source = batches()
    orders = [torch.cat([batch.index for batch in source.epoch(epoch)]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert source.steps == 3 and batches(drop_last=True).steps == 2
    late = [batch.index.tolist() for batch in source.epoch(1, start=2)]
    assert late == [orders[1][6:]]
    assert torch.cat([b.index for b in source.in_order(2).epoch(5)]).tolist() == list(range(7))
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_a_batch_says_what_its_tokens_are_followed_by() -> None:
    for batch in batches().epoch(0):
        assert batch.rows is not None
        pairs = zip(batch.rows.tolist(), batch.labels.tolist(), strict=True)
        made = batches().rows
        for place, label in pairs:
            row, at = divmod(place, 8)
            assert made.following[batch.index[row], at] == label
        assert torch.equal(batch.counted(batch.inputs), batch.inputs.flatten()[batch.rows])
        assert len(batch.labels) == int((made.following[batch.index] != UNCOUNTED).sum())


def test_a_subset_may_name_a_row_twice() -> None:
    part = batches().subset(torch.tensor([5, 5, 1])).in_order(3)
    (batch,) = part.epoch(0)
    assert batch.index.tolist() == [5, 5, 1]
    assert torch.equal(batch.inputs[0], batch.inputs[1])


def test_batches_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0 but must be at least 1"):
        batches(batch_size=0)
    with pytest.raises(DataError, match="no rows to make batches of"):
        batches(index=torch.arange(0))
    with pytest.raises(ConfigError, match="only 7 rows and drop_last is on"):
        batches(batch_size=8, drop_last=True)


# Two tokenizers


def test_aligned_rows_hold_the_same_text_for_both() -> None:
    text = "ab cd ef gh " * 4 + "ij"
    pairs = byte_pairs((text * 9,), 275)
    found = corpus(Document(text), Document("ab cd", domain=1), Document("ef", prompt="gh?"))
    own = aligned_rows(found, LETTERS, pairs, Reading(length=20))
    other = own.other
    assert other is not None and len(own) == len(other)
    texts = []
    for row in range(len(own)):
        ids, more = (
            made.ids[row][: int((made.following[row] != UNCOUNTED).nonzero().max()) + 1]
            for made in (own, other)
        )
        texts.append(LETTERS.decode(ids))
        closed = (own.following[row] == END).any()
        assert closed == (other.following[row] == pairs.eos_token_id).any()
        cut = 0 if closed else 1  # the last token of a piece is said and never read
        assert pairs.decode(more)[: len(texts[-1]) - 8].startswith(texts[-1][: len(texts[-1]) - 8 - cut])
    assert "".join(texts[:-2]).count("a") == 4
    assert own.domain.tolist() == other.domain.tolist()
    batch = batch_of(own, torch.tensor([0, 1]))
    assert batch.other is not None
    assert torch.equal(batch.other.inputs, other.ids[:2])
    with pytest.raises(DataError, match="two tokenizers share no part of an answer"):
        aligned_rows(corpus(Document(text, prompt="?")), LETTERS, pairs, Reading(length=20))
