"""What a user relies on of a pre-allocated key/value cache: bits, addresses, layouts, lengths, and errors that say so."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from intelligent_vram.vram.kv_cache import CacheFull, CacheShape, KVCache, ModelCache, initialize_past_key_values
from intelligent_vram.vram.kv_layouts import FP8, LAYOUTS, decode, encode, permutation
from intelligent_vram.vram.kv_rolling import place
from torch import nn

SHAPE = CacheShape(3, 2, 4, 32, 8, dtype=torch.float32)


def shape(**changes: object) -> CacheShape:
    return CacheShape(**{**{k: getattr(SHAPE, k) for k in SHAPE.__dataclass_fields__}, **changes})


def rows(of: CacheShape, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(of.stored(count), generator=torch.Generator().manual_seed(seed), dtype=of.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_cache_holds_what_concatenation_gives(layout: str, batch: int, heads: int, dtype: torch.dtype) -> None:
    of = shape(layout=layout, batch=batch, heads=heads, dtype=dtype)
    cache = ModelCache(of)
    expected: list[torch.Tensor] = []
    for step, count in enumerate((5, 1, 0, 1, 7)):
        expected.append(rows(of, count, step))
        for layer in range(of.layers):
            keys, values = cache.cat(layer, expected[-1] + layer, expected[-1] - layer)
            assert torch.equal(keys, torch.cat(expected, of.length_dim) + layer)
            assert torch.equal(values, torch.cat(expected, of.length_dim) - layer)
        assert cache.current_length == sum(part.shape[of.length_dim] for part in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_a_part_of_the_length_is_contiguous_exactly_where_the_cache_says_so(
    layout: str, batch: int, heads: int
) -> None:
    of = shape(layout=layout, batch=batch, heads=heads)
    cache = ModelCache(of)[0].key
    part = cache.cat(rows(of, 5))
    assert part.is_contiguous() is cache.prefix_is_contiguous is of.prefix_is_contiguous
    assert cache.data.narrow(of.length_dim, 2, 2).is_contiguous() is cache.prefix_is_contiguous
    assert of.prefix_is_contiguous is (layout == "lbhd" or (batch == 1 and (layout == "blhd" or heads == 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_takes_the_views_of_any_layout(layout: str) -> None:
    of = shape(layout=layout)
    keys, values = ModelCache(of).cat(0, rows(of, 9, 1), rows(of, 9, 2))
    order = permutation(layout, "bhld")
    query = rows(shape(layout="bhld"), 3)
    strided = F.scaled_dot_product_attention(query, keys.permute(order), values.permute(order))
    copied = F.scaled_dot_product_attention(query, keys.permute(order).contiguous(), values.permute(order).contiguous())
    assert torch.equal(strided, copied)


def test_reading_and_appending_keep_the_address_and_touch_only_new_rows() -> None:
    cache = KVCache(torch.full(SHAPE.stored(), -1.0))
    address = cache.data.data_ptr()
    cache.cat(rows(SHAPE, 4))
    before = cache.data.clone()
    part = cache.cat(rows(SHAPE, 3, 1))
    assert part.data_ptr() == cache.get_data().data_ptr() == address == cache.data.data_ptr()
    assert torch.equal(cache.data[:, :, :4], before[:, :, :4])
    assert (cache.data[:, :, 7:] == -1).all()
    assert torch.equal(cache.get_data(last=3), rows(SHAPE, 3, 1))
    assert cache.get_data(last=0).shape[2] == 0
    assert cache.get_data(last=99).shape[2] == 7
    cache.reset()
    assert cache.current_length == 0
    assert cache.get_data().numel() == 0
    assert cache.data.data_ptr() == address


def test_writing_again_replaces_rows_and_adds_no_length() -> None:
    cache = ModelCache(SHAPE)
    cache.append(0, rows(SHAPE, 6), rows(SHAPE, 6))
    for step in range(4):  # a block of video, written in every denoising step
        cache.write(0, rows(SHAPE, 3, step), rows(SHAPE, 3, 9 + step), 6)
        assert cache.current_length == 9
    keys, values = cache.get_data(0)
    assert torch.equal(keys, torch.cat([rows(SHAPE, 6), rows(SHAPE, 3, 3)], 2))
    assert torch.equal(values, torch.cat([rows(SHAPE, 6), rows(SHAPE, 3, 12)], 2))
    cache.write(0, rows(SHAPE, 4, 5), rows(SHAPE, 4, 5), 7)
    assert cache.current_length == 11


def test_all_layers_at_once_is_the_same_as_one_after_the_other() -> None:
    for changes, options in (
        ({}, {}),
        ({"layout": "lbhd"}, {}),
        ({"fp8": True}, {}),
        ({}, {"when_full": "roll", "sink": 2}),
        ({}, {"when_full": "grow"}),
        ({}, {"device_length": True}),
    ):
        of = shape(max_length=8, **changes) if "when_full" in options else shape(**changes)
        one, all_ = ModelCache(of, **options), ModelCache(of, **options)
        for step in range(3):
            new = torch.stack([rows(of, 4, 10 * step + i) for i in range(2 * of.layers)])
            all_.append_all(new)
            for layer in range(of.layers):
                one.append(layer, new[2 * layer], new[2 * layer + 1])
        for left, right in zip(one, all_, strict=True):
            for a, b in zip(left, right, strict=True):
                assert torch.equal(a.get_data(), b.get_data())
                assert int(a.current_length) == int(b.current_length)


def test_layers_of_different_lengths_cannot_be_appended_to_at_once() -> None:
    cache = ModelCache(SHAPE)
    cache.append(1, rows(SHAPE, 1), rows(SHAPE, 1))
    with pytest.raises(ValueError, match="not equally long"):
        cache.append_all(torch.zeros(6, *SHAPE.stored(1)))
    with pytest.raises(ValueError, match="rows for 3 layers"):
        cache.append_all(torch.zeros(4, *SHAPE.stored(1)))


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 4, 2, 8),  # batch
        torch.zeros(2, 3, 2, 8),  # heads
        torch.zeros(2, 4, 2, 9),  # head_dim
        torch.zeros(4, 2, 8),  # dimensions
        torch.zeros(2, 4, 2, 8, dtype=torch.float64),
        torch.zeros(2, 4, 2, 8, device="meta"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"device_length": True}, {"when_full": "grow"}, {"when_full": "roll"}])
def test_another_shape_dtype_or_device_is_refused_and_changes_nothing(bad: torch.Tensor, mode: dict) -> None:
    cache = ModelCache(SHAPE, **mode)
    good = rows(SHAPE, 2)
    cache.append(0, good, good)
    for key, value in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=r"a cache of \[2, 4, any, 8\] \(bhld\) torch.float32 on cpu was given"):
            cache.append(0, key, value)
    with pytest.raises(ValueError, match="was given"):
        cache[0].key.cat(bad)
    for side in cache[0]:
        assert int(side.current_length) == 2
        assert torch.equal(side.data[:, :, :2], good)


def test_keys_and_values_have_equally_many_rows() -> None:
    cache = ModelCache(SHAPE)
    with pytest.raises(ValueError, match="2 rows of keys and 3 of values"):
        cache.append(0, rows(SHAPE, 2), rows(SHAPE, 3))
    assert cache.current_length == 0


def test_past_the_end_is_an_error_that_names_the_lengths() -> None:
    cache = ModelCache(SHAPE)
    cache.append(0, rows(SHAPE, 30), rows(SHAPE, 30))
    before = cache.buffer.clone()
    with pytest.raises(CacheFull, match=r"3 rows at 30 do not fit into a cache of max_length 32, of which 30 are used"):
        cache.append(0, rows(SHAPE, 3), rows(SHAPE, 3))
    assert torch.equal(cache.buffer, before)
    cache.append(0, rows(SHAPE, 2), rows(SHAPE, 2))
    assert cache.current_length == 32


def test_keys_are_left_alone_when_the_values_are_full() -> None:
    cache = ModelCache(SHAPE)[0]
    cache.value.append(rows(SHAPE, 32))
    with pytest.raises(CacheFull):
        cache.append(rows(SHAPE, 1), rows(SHAPE, 1))
    assert cache.key.current_length == 0


def test_negative_lengths_and_gaps_are_refused() -> None:
    cache = KVCache(torch.zeros(SHAPE.stored()))
    for do in (
        lambda: KVCache(torch.zeros(SHAPE.stored()), -1),
        lambda: KVCache(torch.zeros(SHAPE.stored()), 33),
        lambda: KVCache(torch.zeros(SHAPE.stored()), torch.tensor(-1)),
        lambda: KVCache(torch.zeros(SHAPE.stored()), -1, device_length=True),
        lambda: cache.write(rows(SHAPE, 1), -1),
        lambda: cache.write(rows(SHAPE, 1), 1),
        lambda: cache.set_length(-1),
        lambda: cache.set_length(33),
        lambda: cache.get_data(last=-1),
        lambda: cache.copy(torch.tensor([0]), -1),
        lambda: cache.copy(torch.tensor([0]), 1),
        lambda: cache.place(rows(SHAPE, 1), -1),
        lambda: cache.place(rows(SHAPE, 1), 32),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            do()
    assert cache.current_length == 0


@pytest.mark.parametrize(
    "changes",
    [{"layers": 0}, {"batch": -1}, {"max_length": 0}, {"layout": "dbhl"}, {"dtype": torch.int32}, {"head_dim": 0}],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"needs at least 1|none of|floating point"):
        shape(**changes)


@pytest.mark.parametrize(
    "options",
    [
        {"when_full": "shrink"},
        {"sink": 3},
        {"when_full": "roll", "sink": 32},
        {"when_full": "roll", "device_length": True},
        {"when_full": "grow", "device_length": True},
        {"scales": torch.zeros(2, 4, 32, 1)},
        {"current_length": torch.zeros(1, dtype=torch.int64)},
        {"current_length": torch.tensor(1.0)},
        {"when_full": "roll", "current_length": torch.tensor(0)},
        {"layout": "hbld"},
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        KVCache(torch.zeros(SHAPE.stored()), **options)


def test_a_length_tensor_on_the_host_is_the_truth() -> None:
    lengths = torch.zeros(2, dtype=torch.int64)
    cache = KVCache(torch.zeros(SHAPE.stored()), lengths[1])
    cache.cat(rows(SHAPE, 5))
    assert lengths.tolist() == [0, 5]
    assert cache.current_length.data_ptr() == lengths[1].data_ptr()
    lengths.zero_()  # as Medusa resets
    assert cache.cat(rows(SHAPE, 2, 1)).shape == cache.shape == (2, 4, 2, 8)


def test_growth_doubles_and_keeps_what_is_there() -> None:
    cache = ModelCache(SHAPE, when_full="grow")
    parts = [rows(SHAPE, 20, i) for i in range(5)]
    lengths = []
    for part in parts:
        cache.append(0, part, part)
        lengths.append(cache[0].key.max_length)
    assert lengths == [32, 64, 64, 128, 128]
    assert all(torch.equal(side.get_data(), torch.cat(parts, 2)) for side in cache[0])
    assert cache[1].key.max_length == 32
    assert cache.report().buffers == 6


def self_forcing(cache: dict, key: torch.Tensor, start: int, sink: int, size: int) -> torch.Tensor:
    """The rolling window as Self-Forcing's attention describes it, for keys [1, n, heads, dim]."""
    end, count = start + key.shape[1], key.shape[1]
    if end > cache["global"] and count + cache["local"] > size:
        evicted = count + cache["local"] - size
        rolled = cache["local"] - evicted - sink
        cache["k"][:, sink : sink + rolled] = cache["k"][:, sink + evicted : sink + evicted + rolled].clone()
        local = cache["local"] + end - cache["global"] - evicted
    else:
        local = cache["local"] + end - cache["global"]
    cache["k"][:, local - count : local] = key
    cache["global"], cache["local"] = end, local
    return cache["k"][:, :local]


@pytest.mark.parametrize("sink", [0, 2, 3])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_rolling_window_is_self_forcings(sink: int, fp8: bool) -> None:
    of = CacheShape(1, 1, 2, 12, 4, "blhd", torch.float32, fp8=fp8)
    cache = ModelCache(of, when_full="roll", sink=sink)
    theirs = {"k": torch.zeros(1, 12, 2, 4), "global": 0, "local": 0}
    address = cache.buffer.data_ptr()
    for block in range(12):
        for step in range(4):
            key = rows(of, 3, 100 * block + step)
            cache.write(0, key, -key, 3 * block)
            stored = decode(*encode(key), torch.empty_like(key)) if fp8 else key
            expected = self_forcing(theirs, stored, 3 * block, sink, 12)
            keys, values = cache.get_data(0)
            assert torch.equal(keys, expected)
            assert torch.equal(values, -expected)
    assert cache.current_length == 12
    assert cache[0].key.total_length == 36
    assert cache.buffer.data_ptr() == address
    cache.reset()
    assert cache[0].key.total_length == 0


def test_a_rolling_window_refuses_what_it_cannot_hold() -> None:
    cache = ModelCache(shape(max_length=8), when_full="roll", sink=3)
    part = rows(SHAPE, 4)
    for _ in range(4):
        cache.append(0, part, part)
    with pytest.raises(CacheFull, match="beside 3 sink rows"):
        cache.append(0, rows(SHAPE, 6), rows(SHAPE, 6))
    with pytest.raises(ValueError, match="have left the window"):
        cache.write(0, part, part, 5)
    cache.write(0, rows(SHAPE, 3, 7), rows(SHAPE, 3, 7), 0)
    assert torch.equal(cache.get_data(0)[0][:, :, :3], rows(SHAPE, 3, 7))


def test_the_arithmetic_of_a_full_cache() -> None:
    assert place(4, 4, 4, 0, 8).length == 8
    rolled = place(8, 3, 8, 0, 8, 2)
    assert (rolled.at, rolled.length, rolled.evicted, rolled.source, rolled.target, rolled.moved) == (5, 8, 3, 5, 2, 3)
    assert place(8, 3, 8, 3, 8, 2).at == 5
    assert place(100, 5, 100, 0, None).length == 105


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_keeps_small_heads_beside_large_ones(layout: str) -> None:
    of = shape(layout=layout, fp8=True, dtype=torch.bfloat16, head_dim=64)
    order = permutation("bhld", layout)
    given = rows(shape(head_dim=64), 10) * torch.logspace(-3, 3, 4)[None, :, None, None]
    given = given.permute(order).to(torch.bfloat16)
    cache = ModelCache(of)
    keys, _ = cache.cat(0, given, given)
    error = (keys.float() - given.float()).norm(dim=-1) / given.float().norm(dim=-1)
    assert keys.dtype == torch.bfloat16
    assert error.max() < 0.05
    codes, scales = cache[0].key.get_stored()
    assert codes.dtype == FP8
    assert scales.shape == (*codes.shape[:-1], 1)
    before = codes.view(torch.uint8).clone()
    cache.append(0, given * 1000, given * 1000)
    assert torch.equal(cache[0].key.get_stored()[0].view(torch.uint8).narrow(of.length_dim, 0, 10), before)
    zeros = torch.zeros_like(given)
    assert torch.equal(cache.cat(1, zeros, zeros)[0], zeros)
    assert cache[0].key.get_data().data_ptr() == cache[1].key.get_data().data_ptr()  # one scratch for all layers


def test_fp8_takes_half_of_the_memory() -> None:
    half, eighth = shape(dtype=torch.bfloat16, head_dim=128), shape(dtype=torch.bfloat16, head_dim=128, fp8=True)
    assert eighth.nbytes / half.nbytes == pytest.approx(0.5 + 4 / 256)
    assert ModelCache(half).nbytes == half.nbytes
    assert ModelCache(eighth).nbytes == eighth.nbytes + 2 * 2 * 4 * 32 * 128 * 2


@pytest.mark.parametrize("device_length", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_speculative_decoding_keeps_the_accepted_rows(device_length: bool, fp8: bool) -> None:
    cache = ModelCache(shape(fp8=fp8), device_length=device_length)[0].key
    cache.append(rows(SHAPE, 10))
    before = cache.get_data().clone()
    cache.copy(torch.tensor([5, 7, 8]), 4)
    assert int(cache.current_length) == 7
    assert torch.equal(cache.get_data()[:, :, 4:7], before[:, :, [5, 7, 8]])
    with pytest.raises(CacheFull):
        cache.copy(torch.zeros(30, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="dimension 2"):
        cache.copy(torch.tensor([0]), 0, dim=1)


def test_gradients_are_not_kept() -> None:
    cache = KVCache(torch.zeros(SHAPE.stored()))
    part = cache.cat(rows(SHAPE, 2).requires_grad_())
    assert not part.requires_grad
    assert not cache.data.requires_grad


def test_a_cache_made_in_inference_mode_serves_outside_it_and_the_other_way_round() -> None:
    with torch.inference_mode():
        cache = ModelCache(SHAPE)
        cache.append(0, rows(SHAPE, 1), rows(SHAPE, 1))
    cache.append(0, rows(SHAPE, 1), rows(SHAPE, 1))
    with torch.inference_mode():
        assert cache.cat(0, rows(SHAPE, 1), rows(SHAPE, 1))[0].shape[2] == 3


@pytest.mark.parametrize("fp8", [False, True])
def test_a_length_on_the_device_gives_the_same_rows(fp8: bool) -> None:
    of = shape(fp8=fp8)
    fixed, plain = ModelCache(of, device_length=True), ModelCache(of)
    address = fixed.buffer.data_ptr()
    for step, count in enumerate((4, 1, 1, 3)):
        key, value = rows(of, count, step), rows(of, count, 50 + step)
        fixed.append(0, key, value)
        plain.append(0, key, value)
    for written in (7, torch.tensor(8)):
        key = rows(of, 4, int(written))
        fixed.write(0, key, key, written)
        plain.write(0, key, key, int(written))
    length = fixed[0].key.current_length
    assert isinstance(length, torch.Tensor)
    assert int(length) == plain.current_length == 12
    assert fixed[0].key.mask().tolist() == [True] * 12 + [False] * 20
    for a, b in zip(fixed[0], plain[0], strict=True):
        assert a.get_data().shape[2] == 32
        assert torch.equal(a.get_data()[:, :, :12], b.get_data())
    fixed.reset()
    assert int(length) == 0
    assert fixed.buffer.data_ptr() == address
    with pytest.raises(ValueError, match="mask"):
        fixed[0].key.get_data(last=3)


def test_past_the_end_with_a_length_on_the_device_stays_inside_and_is_found_by_check() -> None:
    cache = ModelCache(SHAPE, device_length=True)
    for step in range(3):
        cache.append(1, rows(SHAPE, 15, step), rows(SHAPE, 15, step))
        if step < 2:
            cache.check()
    with pytest.raises(CacheFull, match="45 rows"):
        cache.check()
    assert torch.equal(cache[1].key.data[:, :, :30], torch.cat([rows(SHAPE, 15, 0), rows(SHAPE, 15, 1)], 2))
    assert not cache.buffer[:2].any()
    assert not cache.buffer[4:].any()
    with pytest.raises(CacheFull):
        cache.append(0, rows(SHAPE, 33), rows(SHAPE, 33))
    with pytest.raises(CacheFull):
        cache.write(0, rows(SHAPE, 3), rows(SHAPE, 3), 30)
    with pytest.raises(ValueError, match="not negative"):
        cache.write(0, rows(SHAPE, 3), rows(SHAPE, 3), -1)


def test_one_compiled_graph_serves_all_lengths() -> None:
    of = shape(batch=1)
    cache, plain = ModelCache(of, device_length=True), ModelCache(of)
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: list) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    def step(query: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        for layer in range(of.layers):
            cache.append(layer, new, new + layer)
            keys, values = cache.get_data(layer)
            query = query + F.scaled_dot_product_attention(query, keys, values, attn_mask=cache[layer].key.mask()[None])
        return query

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for turn in range(8):
        query, new = torch.randn(1, 4, 1, 8), rows(of, 1, turn)
        expected = query
        for layer in range(of.layers):
            keys, values = plain.cat(layer, new, new + layer)
            expected = expected + F.scaled_dot_product_attention(expected, keys, values)
        torch.testing.assert_close(compiled(query, new), expected)
    assert graphs == 1
    assert cache._lengths.tolist() == [8] * 6


def test_models_that_write_into_the_buffers_find_their_dicts() -> None:
    for layout in LAYOUTS:
        cache = ModelCache(shape(batch=1, layout=layout))
        dicts = cache.as_dicts()
        assert [sorted(d) for d in dicts] == [["global_end_index", "k", "local_end_index", "v"]] * 3
        assert dicts[0]["k"].shape == (1, 32, 4, 8)
        assert dicts[0]["k"].is_contiguous() is (layout != "bhld")
        assert dicts[0]["global_end_index"].tolist() == [0]
        assert dicts[0]["global_end_index"].dtype == torch.int64
        dicts[1]["v"][:, 3:5] = 7
        cache[1].value.set_length(5)
        assert (cache[1].value.get_data(last=2) == 7).all()
        assert cache.buffer.sum() == 7 * 2 * 4 * 8
    assert cache.as_dicts("int")[2]["local_end_index"] == 0
    for refused in (ModelCache(SHAPE, when_full="grow"), ModelCache(shape(fp8=True))):
        with pytest.raises(ValueError, match="neither grows nor is FP8"):
            refused.as_dicts()
    with pytest.raises(ValueError, match="neither 'tensor' nor 'int'"):
        cache.as_dicts("long")


def test_what_was_allocated_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        cache = ModelCache(CacheShape(36, 1, 1, 2200, 128))
    assert caplog.messages == [
        "[Rank 0] pre-allocated KV cache:\n  layers: 36\n  max length: 2200\n  total size: 0.04 GB\n  buffers: 1"
    ]
    report = cache.report(rank=3)
    assert (report.rank, report.layers, report.max_length, report.buffers) == (3, 36, 2200, 1)
    assert report.nbytes == cache.buffer.nbytes == 36 * 2 * 2200 * 128 * 2


class Decoder(nn.Module):
    """As transformers' decoders are built."""

    def __init__(self, layers: int = 3, **config: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=layers, num_attention_heads=4, hidden_size=32, **config)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.dtype = torch.bfloat16


@pytest.mark.parametrize(
    ("config", "heads", "dim"), [({}, 4, 8), ({"num_key_value_heads": 2}, 2, 8), ({"head_dim": 16}, 4, 16)]
)
def test_the_triple_that_medusa_code_expects(config: dict, heads: int, dim: int) -> None:
    caches, buffers, lengths = initialize_past_key_values(Decoder(**config), max_length=20, batch_size=2)
    assert [len(layer) for layer in caches] == [2, 2, 2]
    assert [list(b.shape) for b in buffers] == [[6, 2, heads, 20, dim]]
    assert buffers[0].dtype == torch.bfloat16
    assert lengths.shape == (6,)
    assert lengths.dtype == torch.int64
    new = torch.randn(2, heads, 3, dim, dtype=torch.bfloat16)
    keys, values = (side.cat(new + i, dim=2) for i, side in enumerate(caches[1]))
    assert torch.equal(keys, new)
    assert torch.equal(values, buffers[0][3, :, :, :3])
    assert lengths.tolist() == [0, 0, 3, 3, 0, 0]
    assert caches[1][0].shape == (2, heads, 3, dim)
    with pytest.raises(ValueError, match="along dimension 2, not 1"):
        caches[0][0].cat(new, dim=1)


def test_layers_on_several_devices_have_a_buffer_on_each() -> None:
    model = Decoder()
    model.model.layers[2].to("meta")
    caches, buffers, _ = initialize_past_key_values(model, max_length=20)
    assert [(b.device.type, b.shape[0]) for b in buffers] == [("cpu", 4), ("meta", 2)]
    assert caches[2][0].data.device.type == "meta"


def test_a_model_without_layers_is_named() -> None:
    model = Decoder()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="Decoder has no list of 5 layers"):
        initialize_past_key_values(model)
