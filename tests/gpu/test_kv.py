"""The key/value cache on real GPUs: no allocation after the first append, CUDA graphs, FP8, host memory, and NCCL.

The NCCL tests run this file under torchrun: ``torchrun --nproc-per-node 2 tests/gpu/test_kv.py exchange``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from intelligent_vram.vram.kv_agree import RankLost
from intelligent_vram.vram.kv_cache import CacheFull, CacheShape, ModelCache
from intelligent_vram.vram.kv_offload import OffloadedCache
from intelligent_vram.vram.kv_sync import CacheSync

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPE = CacheShape(36, 1, 8, 2200, 128, device="cuda")
STEPS = 1000


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    torch.cuda.empty_cache()


def allocations() -> int:
    """How often torch's allocator was asked for memory."""
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def like(shape: CacheShape, count: int = 1) -> torch.Tensor:
    return torch.randn(shape.stored(count), device="cuda").to(shape.dtype)


@pytest.mark.parametrize("layout", ["bhld", "blhd", "lbhd"])
def test_a_thousand_appends_to_all_layers_allocate_nothing_after_the_first(layout: str) -> None:
    shape = CacheShape(36, 1, 8, 2200, 128, layout, device="cuda")
    cache = ModelCache(shape)
    new = [like(shape) for _ in range(4)]
    address = cache.buffer.data_ptr()
    for layer in range(36):
        cache.append(layer, new[0], new[1])
    before = allocations()
    for step in range(1, STEPS):
        for layer in range(36):
            cache.append(layer, new[step % 4], new[(step + 1) % 4])
    keys, values = cache.get_data(35)
    assert allocations() == before
    assert cache.current_length == STEPS
    assert cache.buffer.data_ptr() == address == cache[0].key.get_data().data_ptr()
    assert torch.equal(keys, torch.cat([new[i % 4] for i in range(STEPS)], shape.length_dim))
    assert torch.equal(values, torch.cat([new[(i + 1) % 4] for i in range(STEPS)], shape.length_dim))


def test_appending_to_all_layers_at_once_allocates_nothing() -> None:
    cache = ModelCache(SHAPE)
    new = torch.randn(72, *SHAPE.stored(1), device="cuda").to(SHAPE.dtype)
    before = allocations()
    for _ in range(STEPS):
        cache.append_all(new)
    assert allocations() == before
    assert torch.equal(cache[35].value.get_data(), new[71].expand(SHAPE.stored(STEPS)))


def test_the_host_never_waits_for_the_device() -> None:
    cache, fixed = ModelCache(SHAPE), ModelCache(SHAPE, device_length=True)
    new = like(SHAPE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in (cache, fixed):
            for _ in range(3):
                one.append(0, new, new)
                one.get_data(0)
                one.write(0, new, new, 1)
                assert one.current_length is not None
            one.reset()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fp8", [False, True])
def test_one_cuda_graph_serves_all_lengths(fp8: bool) -> None:
    shape = CacheShape(4, 1, 8, 256, 128, device="cuda", fp8=fp8)
    cache, plain = ModelCache(shape, device_length=True), ModelCache(shape)
    query, new = like(shape), like(shape)

    def step(query: torch.Tensor) -> torch.Tensor:
        for layer in range(4):
            cache.append(layer, new, new)
            keys, values = cache.get_data(layer)
            query = query + F.scaled_dot_product_attention(query, keys, values, attn_mask=cache[layer].key.mask()[None])
        return query

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(query)
    torch.cuda.current_stream().wait_stream(side)
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(query)
    for turn in range(100):
        query.copy_(like(shape))
        new.copy_(like(shape))
        graph.replay()
        expected = query
        for layer in range(4):
            keys, values = plain.cat(layer, new, new)
            expected = expected + F.scaled_dot_product_attention(expected, keys, values)
        torch.testing.assert_close(output, expected, rtol=3e-2, atol=3e-2)
        assert int(cache.current_length) == turn + 1
    assert torch.equal(
        cache[3].key.get_stored()[0].view(torch.uint8)[:, :, :100], plain[3].key.get_stored()[0].view(torch.uint8)
    )


def test_rows_past_the_end_in_a_graph_stay_inside_the_buffer() -> None:
    shape = CacheShape(2, 1, 2, 8, 64, device="cuda")
    cache = ModelCache(shape, device_length=True)
    for _ in range(20):
        cache.append(0, like(shape), like(shape))
    torch.cuda.synchronize()
    assert not cache.buffer[2:].any()
    with pytest.raises(CacheFull):
        cache.check()


def test_a_compiled_step_uses_cuda_graphs_and_keeps_the_address() -> None:
    shape = CacheShape(2, 1, 8, 64, 128, device="cuda")
    cache, plain = ModelCache(shape, device_length=True), ModelCache(shape)
    address = cache.buffer.data_ptr()

    def step(new: torch.Tensor) -> torch.Tensor:
        total = new
        for layer in range(2):
            cache.append(layer, new, new)
            keys, values = cache.get_data(layer)
            total = total + F.scaled_dot_product_attention(new, keys, values, attn_mask=cache[layer].key.mask()[None])
        return total

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(10):
        new = like(shape)
        found = compiled(new).clone()
        expected = new
        for layer in range(2):
            expected = expected + F.scaled_dot_product_attention(new, *plain.cat(layer, new, new))
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    assert torch.equal(cache[1].key.data[:, :, :10], plain[1].key.get_data())
    assert cache.buffer.data_ptr() == address


def test_fp8_decodes_into_one_scratch_without_another_allocation() -> None:
    shape = CacheShape(8, 1, 8, 512, 128, device="cuda", fp8=True)
    cache = ModelCache(shape)
    given = like(shape, 300)
    for layer in range(8):
        cache.append(layer, given, given)
    cache.get_data(0)
    before = allocations()
    for layer in range(8):
        keys, _ = cache.get_data(layer)
    assert allocations() == before
    assert ((keys.float() - given.float()).norm() / given.float().norm()) < 0.04


@pytest.mark.parametrize("layout", ["bhld", "blhd", "lbhd"])
@pytest.mark.parametrize(("window", "chunk"), [(2048, 1024), (1000, 700)])
def test_a_cache_in_host_memory_comes_back_to_the_bit_and_attends_exactly(layout: str, window: int, chunk: int) -> None:
    shape = CacheShape(3, 1, 8, 12000, 128, layout, device="cuda")
    cache, whole = OffloadedCache(shape, window, chunk), ModelCache(shape)
    assert cache.page_locked
    query = torch.randn(1, 16, 512, 128, device="cuda", dtype=torch.bfloat16)
    order = tuple(layout.index(letter) for letter in "bhld")
    for _ in range(6):
        for layer in range(3):
            key, value = like(shape, 1900), like(shape, 1900)
            cache.append(layer, key, value)
            whole.append(layer, key, value)
            keys, values = whole.get_data(layer)
            found = cache.attend(layer, query)
            exact = F.scaled_dot_product_attention(query, keys.permute(order), values.permute(order), enable_gqa=True)
            torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-3)
            parts = [key.clone() for key, _ in cache.chunks(layer)]
            assert torch.equal(torch.cat(parts, shape.length_dim), keys)
    cache.close()


def test_reading_a_cache_in_host_memory_allocates_nothing_and_runs_beside_compute() -> None:
    shape = CacheShape(2, 1, 8, 66000, 128, "blhd", device="cuda")
    cache = OffloadedCache(shape, window=2000, chunk=8000)
    for layer in range(2):
        for _ in range(6):
            cache.append(layer, like(shape, 11000), like(shape, 11000))
    sums = torch.zeros(2, device="cuda")
    torch.cuda.synchronize()
    before = allocations()
    began = time.perf_counter()
    for layer in range(2):
        for _ in cache.chunks(layer):
            sums.add_(1)
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    assert allocations() == before
    assert queued < (time.perf_counter() - began) / 2
    cache.close()


# NCCL


def torchrun(world: int, scenario: str) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run([*command, str(Path(__file__)), scenario], capture_output=True, text=True, timeout=240)
    assert done.stdout.count("fine") == world - (scenario == "lost"), done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_end_with_all_rows_over_nccl(world: int) -> None:
    torchrun(world, "exchange")


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_dies_is_named_over_nccl(world: int) -> None:
    torchrun(world, "lost")


def exchange(rank: int, world: int) -> None:
    """Every strategy, equal and unequal lengths, beside compute on the same stream."""
    shape = CacheShape(6, 1, 8, 4096, 128, "lbhd", device="cuda")
    product = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def rows(of: int, layer: int, side: int, count: int) -> torch.Tensor:
        seed = torch.Generator("cuda").manual_seed(1000 * of + 10 * layer + side)
        return torch.randn(shape.stored(count), device="cuda", generator=seed).to(shape.dtype)

    for strategy in ("ring", "pairwise", "collective"):
        for lengths in ([1000] * world, [700, 0, 1300, 40][:world]):
            if strategy == "collective" and len(set(lengths)) > 1:
                continue
            cache = ModelCache(shape)
            sync = CacheSync(cache, strategy=strategy, timeout=60)
            for _ in range(3):
                sync.agree(lengths[rank])
                exchanges = []
                for layer in range(len(cache)):
                    sync.put(layer, *(rows(rank, layer, side, lengths[rank]) for side in range(2)))
                    before = allocations()
                    exchanges.append(sync.start(layer))
                    assert allocations() == before, "the exchange allocated"
                    product @ product
                for one in exchanges:
                    one.wait()
                for layer, sides in enumerate(cache):
                    for side, part in enumerate(sides):
                        expected = torch.cat([rows(r, layer, side, lengths[r]) for r in range(world)])
                        assert torch.equal(part.get_data(), expected), (strategy, lengths, layer, side)


def lost(rank: int, world: int) -> None:
    """The last rank dies after a step; the others name it at the next, and end."""
    sync = CacheSync(ModelCache(CacheShape(2, 1, 8, 4096, 128, "lbhd", device="cuda")), timeout=5)
    sync.agree(100)
    sync.sync()
    if rank == world - 1:
        os._exit(0)
    for _ in range(2):
        with pytest.raises(RankLost, match=f"rank {world - 1} did not answer"):
            sync.agree(100)


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    with torch.inference_mode():
        globals()[sys.argv[1]](rank, world)
    torch.cuda.synchronize()
    print(f"rank {rank} fine", flush=True)
    if sys.argv[1] == "lost":
        os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
