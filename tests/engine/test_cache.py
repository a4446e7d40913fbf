from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.contracts import Outputs
from limbeck.data.batches import Batches
from limbeck.data.images import from_arrays
from limbeck.data.views import Views
from limbeck.engine import cache as module
from limbeck.engine.cache import Cache
from limbeck.engine.capture import Captured, largest, outputs_of, rows_of
from limbeck.errors import CacheError

INDEX = torch.tensor([7, 2, 5, 3, 11])
VIEWS = 2


def rows(count: int = len(INDEX) * VIEWS) -> dict[str, Tensor]:
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return {"logits": values, "chosen": torch.arange(count)}


class Chunks:
    """Gives the rows two at a time, and remembers where it was asked to start."""

    def __init__(self, stop: int | None = None) -> None:
        self.asked: list[int] = []
        self.stop = stop

    def __call__(self, first: int) -> Iterator[dict[str, Tensor]]:
        self.asked.append(first)
        for start in range(first, len(INDEX) * VIEWS, 2):
            if self.stop is not None and start >= self.stop:
                raise RuntimeError("cut off")
            yield {name: value[start : start + 2] for name, value in rows().items()}


def cache(root: Path, weights: str = "a", dtype: torch.dtype = torch.float32) -> Cache:
    return Cache(root, {"net": weights, "taps": ("blocks.0",)}, INDEX, VIEWS, dtype)


def filled(given: Cache, chunks: Chunks | None = None) -> list[str]:
    """Fill a cache that gives what it shall; the warnings."""
    said: list[str] = []
    given.fill(chunks or Chunks(), said.append)
    assert torch.equal(given(INDEX, torch.ones_like(INDEX))["chosen"], torch.arange(5, 10))
    return said


def made_anew(given: Cache) -> str:
    """Fill a cache that was damaged; what it said."""
    chunks = Chunks()
    (said,) = filled(given, chunks)
    assert chunks.asked == [0]
    assert said.endswith(f"; the cache {given.folder} is made anew")
    assert "\n" not in said
    return said


def test_rows_come_back_by_sample_and_view(tmp_path: Path) -> None:
    full = cache(tmp_path)
    full.fill(Chunks(), print)
    found = full(torch.tensor([3, 7, 2]), torch.tensor([0, 1, 1]))
    assert torch.equal(found["logits"], rows()["logits"][[3, 5, 6]])
    assert torch.equal(found["chosen"], torch.tensor([3, 5, 6]))


def test_a_second_use_asks_nothing(tmp_path: Path) -> None:
    cache(tmp_path).fill(Chunks(), print)
    again, chunks = cache(tmp_path), Chunks()
    again.fill(chunks, print)
    assert chunks.asked == []
    assert torch.equal(again(INDEX, torch.zeros_like(INDEX))["logits"], rows()["logits"][: len(INDEX)])


def test_half_precision_is_stored_rounded_and_read_as_float32(tmp_path: Path) -> None:
    full = cache(tmp_path, dtype=torch.float16)
    full.fill(Chunks(), print)
    found = full(INDEX, torch.zeros_like(INDEX))["logits"]
    assert found.dtype == torch.float32
    assert torch.equal(found, rows()["logits"][: len(INDEX)].half().float())


def test_big_caches_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    full = cache(tmp_path)
    full.fill(Chunks(), print)
    assert torch.equal(full(INDEX, torch.ones_like(INDEX))["logits"], rows()["logits"][len(INDEX) :])


def test_an_unknown_sample_is_refused(tmp_path: Path) -> None:
    full = cache(tmp_path)
    full.fill(Chunks(), print)
    with pytest.raises(CacheError, match="no row for sample 4"):
        full(torch.tensor([2, 4]), torch.tensor([0, 0]))


def test_everything_that_rows_depend_on_is_in_the_address(tmp_path: Path) -> None:
    plain = cache(tmp_path)
    others = [
        cache(tmp_path, weights="b"),
        cache(tmp_path, dtype=torch.float16),
        Cache(tmp_path, plain.key, INDEX, VIEWS + 1),
        Cache(tmp_path, plain.key, INDEX.flip(0), VIEWS),
    ]
    assert len({c.folder for c in [plain, *others]}) == 5


def test_a_cut_off_cache_goes_on_where_it_was_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", -1)
    with pytest.raises(RuntimeError, match="cut off"):
        cache(tmp_path).fill(Chunks(stop=6), print)
    chunks, again = Chunks(), cache(tmp_path)
    again.fill(chunks, print)
    assert chunks.asked == [6]
    assert torch.equal(again(INDEX, torch.ones_like(INDEX))["logits"], rows()["logits"][len(INDEX) :])


def test_a_cache_cut_off_before_its_first_flush_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        cache(tmp_path).fill(Chunks(stop=6), print)
    chunks = Chunks()
    cache(tmp_path).fill(chunks, print)
    assert chunks.asked == [0]


def test_rows_written_after_the_last_flush_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", -1)
    with pytest.raises(RuntimeError, match="cut off"):
        cache(tmp_path).fill(Chunks(stop=6), print)
    with (cache(tmp_path).folder / "logits.bin").open("ab") as file:
        file.write(b"half a row")
    again = cache(tmp_path)
    again.fill(Chunks(), print)
    assert torch.equal(again(INDEX, torch.ones_like(INDEX))["logits"], rows()["logits"][len(INDEX) :])


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_cut_or_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool, harm: str
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", -1)
    if complete:
        cache(tmp_path).fill(Chunks(), print)
    else:
        with pytest.raises(RuntimeError, match="cut off"):
            cache(tmp_path).fill(Chunks(stop=6), print)
    path = cache(tmp_path).folder / "logits.bin"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:5])
    else:
        path.unlink()
    assert f"{path} is damaged: its content" in made_anew(cache(tmp_path))


def test_altered_bytes_are_noticed(tmp_path: Path) -> None:
    cache(tmp_path).fill(Chunks(), print)
    path = cache(tmp_path).folder / "logits.bin"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    assert f"{path} is damaged" in made_anew(cache(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 3}'])
def test_a_damaged_header_is_named(tmp_path: Path, content: str) -> None:
    cache(tmp_path).fill(Chunks(), print)
    (cache(tmp_path).folder / "header.json").write_text(content)
    assert "header.json is damaged: its content" in made_anew(cache(tmp_path))


def test_altered_bytes_of_an_unfinished_cache_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", -1)
    with pytest.raises(RuntimeError, match="cut off"):
        cache(tmp_path).fill(Chunks(stop=6), print)
    path = cache(tmp_path).folder / "logits.bin"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    assert f"{path} is damaged" in made_anew(cache(tmp_path))


@pytest.mark.parametrize("place", range(0, 700, 23))
def test_no_altered_byte_of_a_header_passes(tmp_path: Path, place: int) -> None:
    cache(tmp_path).fill(Chunks(), print)
    path = cache(tmp_path).folder / "header.json"
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    made_anew(cache(tmp_path))


def test_a_cache_of_something_else_is_made_anew(tmp_path: Path) -> None:
    other = cache(tmp_path, weights="b")
    other.fill(Chunks(), print)
    other.folder.rename(cache(tmp_path).folder)
    assert "header.json is of something else" in made_anew(cache(tmp_path))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    folder = cache(tmp_path).folder
    folder.mkdir(parents=True)
    (folder / "logits.bin").symlink_to("/dev/full")
    with pytest.raises(CacheError, match="the disk is full: free some space") as caught:
        cache(tmp_path).fill(Chunks(), print)
    assert "\n" not in str(caught.value)


def test_deleting_leaves_nothing(tmp_path: Path) -> None:
    full = cache(tmp_path)
    full.fill(Chunks(), print)
    full.delete()
    assert list(tmp_path.iterdir()) == []


# Captured networks


def batches(views: Views | None = None, *, shuffle: bool = True, seed: int = 0) -> Batches:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    labels = np.arange(30) % 3
    images = from_arrays("noise", pixels, labels, ["a", "b", "c"], licence="none", source="none")
    index = torch.arange(4, 29)
    return Batches(images, index, views=views, batch_size=8, size=8, channels=1, seed=seed, shuffle=shuffle)


class Asked:
    """A stand-in for a frozen network: the sum of the pixels; counts the samples that it was shown."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, batch: object) -> dict[str, Tensor]:
        inputs: Tensor = batch.inputs  # type: ignore[attr-defined]
        self.samples += len(inputs)
        return {"sum": inputs.double().sum((1, 2, 3)).float()}


def captured(root: Path, source: Batches, ask: Asked, weights: str = "a") -> Captured:
    return Captured(root, lambda: {"net": weights}, source, ask, device=torch.device("cpu"), warn=print)


@pytest.mark.parametrize("views", [None, Views(count=3, translate=0.2, noise=0.1)])
def test_what_was_captured_is_what_would_have_been_said(tmp_path: Path, views: Views | None) -> None:
    source, ask = batches(views), Asked()
    replay, live = captured(tmp_path, source, ask), Asked()
    for epoch in range(4):
        for batch in source.epoch(epoch):
            assert torch.equal(replay(batch)["sum"], live(batch)["sum"])
    assert ask.samples == 25 * (1 if views is None else 3)


def test_nothing_is_asked_before_the_first_batch(tmp_path: Path) -> None:
    ask = Asked()
    captured(tmp_path, batches(), ask)
    assert ask.samples == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "weights"),
    [
        (batches(Views(count=2, translate=0.1)), "a"),
        (batches(Views(count=2, translate=0.2), seed=1), "a"),
        (batches(Views(count=2, translate=0.2)), "b"),
    ],
    ids=["other views", "other seed", "other weights"],
)
def test_a_change_of_what_it_depends_on_asks_again(tmp_path: Path, other: Batches, weights: str) -> None:
    source = batches(Views(count=2, translate=0.2))
    captured(tmp_path, source, Asked())(next(source.epoch(0)))
    ask = Asked()
    captured(tmp_path, other, ask, weights)(next(other.epoch(0)))
    assert ask.samples == 50


def test_the_order_of_batches_is_no_part_of_it(tmp_path: Path) -> None:
    """Without augmentation nothing but the pixels count: another seed's run takes the same cache."""
    captured(tmp_path, batches(), Asked())(next(batches().epoch(0)))
    ask, other = Asked(), batches(seed=5)
    captured(tmp_path, other, ask)(next(other.epoch(0)))
    assert ask.samples == 0


def test_outputs_go_through_rows() -> None:
    given = Outputs(logits=torch.randn(2, 3), features={"blocks.-1": torch.randn(2, 5, 4)})
    back = outputs_of(rows_of(given))
    assert torch.equal(back.logits, given.logits)
    assert torch.equal(back.features["blocks.-1"], given.features["blocks.-1"])


@settings(deadline=None, max_examples=40)
@given(classes=st.integers(3, 12), top=st.integers(1, 11), seed=st.integers(0, 99))
def test_shortened_logits_keep_the_largest_and_the_mass_of_the_rest(
    classes: int, top: int, seed: int
) -> None:
    top = min(top, classes - 1)
    logits = 3 * torch.randn(5, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows_of(Outputs(logits=logits.float()), top)
    assert rows["top"].shape == (5, top)
    again = outputs_of(rows, classes).logits
    full, short = logits.softmax(1), again.double().softmax(1)
    kept = torch.zeros_like(full, dtype=torch.bool).scatter(1, rows["classes"], True)
    torch.testing.assert_close(short[kept], full[kept], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(short.sum(1), torch.ones(5, dtype=torch.float64))
    rest = short[~kept].reshape(5, -1)
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))
    assert set(rows["classes"][0].tolist()) == set(logits[0].topk(top).indices.tolist())


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 400), st.integers(1, 12), st.booleans())
def test_the_largest_are_those_of_a_whole_search(
    seed: int, rows: int, width: int, count: int, equal: bool
) -> None:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    if equal:
        values = values.round()
    count = min(count, width)
    found, places = largest(values, count)
    assert torch.equal(found, values.topk(count).values)
    assert torch.equal(found, values.gather(1, places))
    assert all(len(set(row)) == count for row in places.tolist())


def test_the_largest_of_a_row_with_a_nan_begin_with_it() -> None:
    values = torch.randn(2, 400)
    values[1, 7] = torch.nan
    found, _ = largest(values, 4)
    assert found[0].isfinite().all() and found[1, 0].isnan()
