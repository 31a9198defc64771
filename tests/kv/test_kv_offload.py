"""What a user relies on of a cache that is larger than the device: every row comes back, once, in order, to the bit, and
attention over chunks is attention over all. The CPU is the device here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from intelligent_vram.vram.arena import Arena
from intelligent_vram.vram.kv_attention import attend
from intelligent_vram.vram.kv_cache import CacheFull, CacheShape
from intelligent_vram.vram.kv_layouts import LAYOUTS, permutation
from intelligent_vram.vram.kv_offload import OffloadedCache

CPU = torch.device("cpu")


def shape(layout: str = "blhd", dtype: torch.dtype = torch.float32, heads: int = 2) -> CacheShape:
    return CacheShape(3, 2, heads, 100, 8, layout, dtype)


def rows(of: CacheShape, count: int, seed: int) -> torch.Tensor:
    return torch.randn(of.stored(count), generator=torch.Generator().manual_seed(seed), dtype=of.dtype)


def read(cache: OffloadedCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(key.clone(), value.clone()) for key, value in cache.chunks(layer)]
    return tuple(torch.cat(side, cache.shape.length_dim) for side in zip(*parts, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("window", "chunk"), [(16, 8), (8, 16), (10, 7), (1, 1), (99, 1), (50, None)])
def test_every_row_comes_back_in_order(layout: str, window: int, chunk: int | None) -> None:
    of = shape(layout, torch.bfloat16)
    cache = OffloadedCache(of, window, chunk)
    given: list[list[torch.Tensor]] = [[] for _ in range(of.layers)]
    for step, count in enumerate((1, 5, 30, 0, 17, 17, 30)):
        for layer in range(of.layers):
            new = rows(of, count, 10 * step + layer)
            given[layer].append(new)
            cache.append(layer, new, -new)
        for layer in range(of.layers):
            expected = torch.cat(given[layer], of.length_dim)
            keys, values = read(cache, layer)
            assert torch.equal(keys, expected)
            assert torch.equal(values, -expected)
            assert cache.length(layer) == expected.shape[of.length_dim]
            newest = cache.get_window(layer)[0].shape[of.length_dim]
            assert min(cache.length(layer), window) <= newest <= window + cache.chunk


def test_the_device_holds_the_window_and_the_slots_and_no_more() -> None:
    cache = OffloadedCache(shape(), window=16, chunk=8)
    assert cache.device_bytes == (3 * 24 + 3 * 8) * shape().token_bytes
    assert cache.host_bytes == 3 * 88 * shape().token_bytes
    addresses = {key.data_ptr() for key, _ in cache.chunks(0)}
    for step in range(5):
        for layer in range(3):
            cache.append(layer, rows(shape(), 20, step), rows(shape(), 20, step))
            addresses |= {key.data_ptr() for key, _ in cache.chunks(layer)}
    assert len(addresses) == 3 + 2  # the layers' own, and two slots


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("query_heads", [2, 6])
def test_attention_over_chunks_is_attention_over_all(layout: str, dtype: torch.dtype, query_heads: int) -> None:
    of = shape(layout, dtype)
    cache = OffloadedCache(of, window=16, chunk=9)
    order = permutation(layout, "bhld")
    query = torch.randn(2, query_heads, 5, 8, generator=torch.Generator().manual_seed(7), dtype=dtype) * 3
    given: list[torch.Tensor] = []
    for step in range(6):
        given.append(rows(of, 15, step) * 2)
        cache.append(1, given[-1], given[-1].flip(-1))
        keys = torch.cat(given, of.length_dim)
        wide = [t.permute(order).to(torch.float64) for t in (keys, keys.flip(-1))]
        exact = F.scaled_dot_product_attention(query.to(torch.float64), *wide, enable_gqa=True)
        found = cache.attend(1, query)
        assert found.shape == query.shape
        assert found.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(found.to(torch.float64), exact, rtol=tolerance, atol=tolerance)


def test_scores_far_apart_do_not_overflow() -> None:
    key = torch.cat([torch.full((1, 1, 3, 4), size) for size in (-300.0, 0.0, 300.0)], 2)
    value = torch.randn(1, 1, 9, 4, generator=torch.Generator().manual_seed(0))
    query = torch.full((1, 1, 2, 4), 10.0)
    parts = [(key[:, :, i : i + 3], value[:, :, i : i + 3]) for i in (0, 3, 6)]
    expected = F.scaled_dot_product_attention(query, key, value)
    for chunks in (parts, parts[::-1], [*parts, (key[:, :, :0], value[:, :, :0])]):
        torch.testing.assert_close(attend(query, chunks), expected)
    torch.testing.assert_close(
        attend(query, parts, scale=0.01), F.scaled_dot_product_attention(query, key, value, scale=0.01)
    )


def test_many_queries_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 50, 4), torch.randn(1, 2, 30, 4)
    expected = attend(query, [(key, key)])
    monkeypatch.setattr("intelligent_vram.vram.kv_attention.SCORE_BYTES", 2 * 30 * 4 * 7)
    torch.testing.assert_close(attend(query, [(key, key)]), expected)


def test_attention_needs_keys_that_fit() -> None:
    query = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="over no keys"):
        attend(query, [])
    for bad in ((2, 4, 3, 8), (1, 3, 3, 8), (1, 4, 3, 9)):
        with pytest.raises(ValueError, match="query"):
            attend(query, [(torch.zeros(bad), torch.zeros(bad))])


def test_a_block_is_written_again_while_it_is_on_the_device() -> None:
    of = shape()
    cache = OffloadedCache(of, window=16, chunk=8)
    cache.append(0, rows(of, 60, 0), rows(of, 60, 0))
    for step in range(4):
        cache.write(0, rows(of, 12, step), rows(of, 12, step), 60)
    assert cache.length(0) == 72
    assert torch.equal(read(cache, 0)[0], torch.cat([rows(of, 60, 0), rows(of, 12, 3)], 1))
    with pytest.raises(ValueError, match=r"row 30 has left the device, which has rows 48 to 72"):
        cache.write(0, rows(of, 12, 0), rows(of, 12, 0), 30)


def test_bad_rows_are_refused_and_change_nothing() -> None:
    of = shape()
    cache = OffloadedCache(of, window=16, chunk=8)
    good = rows(of, 90, 0)
    cache.append(0, good, good)
    before = read(cache, 0)
    for do, message in (
        (lambda: cache.append(0, rows(of, 11, 1), rows(of, 11, 1)), "11 rows at 90 do not fit"),
        (lambda: cache.append(0, rows(of, 2, 1), rows(of, 3, 1)), "2 rows of keys and 3 of values"),
        (lambda: cache.append(0, good[:1], good), "was given"),
        (lambda: cache.append(0, good, good.double()), "was given"),
        (lambda: cache.write(0, good[:, :1], good[:, :1], -1), "cannot be written at -1"),
        (lambda: cache.write(0, good[:, :1], good[:, :1], 91), "cannot be written at 91"),
    ):
        with pytest.raises(ValueError, match=message):
            do()
    assert all(torch.equal(a, b) for a, b in zip(read(cache, 0), before, strict=True))
    cache.append(0, rows(of, 10, 1), rows(of, 10, 1))
    with pytest.raises(CacheFull):
        cache.append(0, rows(of, 1, 1), rows(of, 1, 1))


@pytest.mark.parametrize(("window", "chunk"), [(0, 8), (-1, 8), (100, 8), (16, 0), (16, -3)])
def test_sizes_that_make_no_sense_are_refused(window: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="a window of"):
        OffloadedCache(shape(), window, chunk)
    with pytest.raises(ValueError, match="no FP8"):
        OffloadedCache(CacheShape(1, 1, 1, 10, 8, fp8=True), 5)


def test_a_pass_that_is_broken_off_leaves_the_slots_usable() -> None:
    of = shape()
    cache = OffloadedCache(of, window=16, chunk=8)
    cache.append(0, rows(of, 90, 0), rows(of, 90, 0))
    cache.append(1, rows(of, 90, 1), rows(of, 90, 1))
    pass_over = cache.chunks(0)
    next(pass_over)
    with pytest.raises(RuntimeError, match="one pass"):
        next(cache.chunks(1))
    pass_over.close()
    assert torch.equal(read(cache, 1)[0], rows(of, 90, 1))
    assert torch.equal(read(cache, 0)[0], rows(of, 90, 0))


def test_after_a_reset_nothing_old_comes_back_from_a_slot() -> None:
    of = shape()
    cache = OffloadedCache(of, window=16, chunk=8)
    for turn in range(3):
        for layer in range(3):
            new = rows(of, 60, 10 * turn + layer)
            cache.append(layer, new, new)
            assert torch.equal(read(cache, layer)[0], new)
        cache.reset()
        assert cache.length(0) == 0
        assert list(cache.chunks(0)) == []
    cache.close()


def test_the_arena_is_asked_for_page_locked_memory_within_its_budget() -> None:
    arena = Arena(CPU, budget=0)
    cache = OffloadedCache(shape(), window=16, chunk=8, arena=arena)
    assert not cache.page_locked
    assert arena.page_locked_bytes == 0
