"""What a user relies on when ranks fill a cache together: the same bits on all ranks, nothing touched outside, and an error
that names the rank instead of a hang or a crash. On Gloo, in real processes, which one launcher forks per test run.

Run as a program, this file is that launcher: ``python test_kv_sync.py WORLD SCENARIO...``, scenarios side by side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store warns about each timeout

import pytest
import torch
import torch.distributed as dist
from intelligent_vram.vram.kv_agree import Intent, RankLost, RanksDisagree, bounds_of
from intelligent_vram.vram.kv_cache import CacheShape, ModelCache
from intelligent_vram.vram.kv_sync import CacheSync, NotContiguous, Transfer, rounds

TIMEOUT = 3.0
LIMIT = 45.0
STRATEGIES = ("ring", "pairwise", "collective")
LENGTHS = {2: ((5, 5), (3, 0)), 4: ((5, 5, 5, 5), (3, 0, 7, 2), (0, 0, 0, 1))}


# What the ranks do. Each scenario returns something that JSON can hold.


def rows(shape: CacheShape, rank: int, layer: int, side: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * layer + side)
    return torch.randn(shape.stored(count), generator=generator, dtype=shape.dtype)


def exchange(rank: int, world: int) -> dict:
    """Every strategy, layout that can be sent, dtype, and lengths: compared with concatenation."""
    digest, done = hashlib.sha256(), 0
    shapes = [
        CacheShape(3, 2, 3, 64, 8, "lbhd", torch.float32),
        CacheShape(3, 1, 3, 64, 8, "blhd", torch.bfloat16),
        CacheShape(3, 1, 1, 64, 8, "bhld", torch.float16),
        CacheShape(3, 2, 3, 64, 8, "lbhd", torch.float32, fp8=True),
    ]
    for shape in shapes:
        for strategy in STRATEGIES:
            for lengths in LENGTHS[world]:
                if strategy == "collective" and len(set(lengths)) > 1:
                    continue
                cache = ModelCache(shape)
                cache.buffer.view(torch.uint8).fill_(1)
                sync = CacheSync(cache, strategy=strategy, timeout=TIMEOUT * 4)
                bounds = sync.agree(lengths[rank], start=4)
                exchanges = []
                for layer in range(shape.layers):
                    sync.put(layer, *(rows(shape, rank, layer, side, lengths[rank]) for side in range(2)))
                    exchanges.append(sync.start(layer))
                for one in exchanges:
                    one.wait()
                    one.wait(confirm=True)
                for layer, sides in enumerate(cache):
                    for side, part in enumerate(sides):
                        dim = shape.length_dim
                        given = [rows(shape, r, layer, side, lengths[r]) for r in range(world)]
                        alone = ModelCache(shape)[0].key
                        expected = alone.cat(torch.cat(given, dim))
                        assert part.current_length == bounds[-1] == 4 + sum(lengths)
                        assert torch.equal(part.get_data(last=sum(lengths)), expected), (strategy, lengths, layer)
                        outside = part.data.view(torch.uint8)
                        assert (outside.narrow(dim, 0, 4) == 1).all()
                        assert (outside.narrow(dim, bounds[-1], 64 - bounds[-1]) == 1).all()
                        digest.update(expected.contiguous().view(torch.uint8).numpy().tobytes())
                sync.close()
                done += 1
    return {"digest": digest.hexdigest(), "done": done}


def steps(rank: int, world: int) -> dict:
    """A cache that grows step by step, over a subgroup and over raw tensors too; nothing is cloned."""
    shape = CacheShape(2, 1, 2, 96, 4, "lbhd", torch.float32)
    cache = ModelCache(shape)
    address = cache.buffer.data_ptr()
    sync = CacheSync(cache, timeout=TIMEOUT * 4)
    at = 0
    for step in range(5):
        bounds = sync.agree(1 + (rank + step) % 3, start=at)
        for layer in range(2):
            count = bounds[rank + 1] - bounds[rank]
            sync.put(layer, *(torch.full(shape.stored(count), 10.0 * step + rank + i) for i in range(2)))
        sync.sync()
        at = bounds[-1]
        for r in range(world):
            assert (cache[1].value.data[bounds[r] : bounds[r + 1]] == 10 * step + r + 1).all()
    assert cache.current_length == at
    assert cache.buffer.data_ptr() == address
    group = dist.new_group([world - 2, world - 1])
    if rank >= world - 2:
        raw = [[torch.zeros(8, 3, dtype=torch.int32)]]
        small = CacheSync(raw, group, "pairwise", TIMEOUT * 4)
        small.agree(2)
        small.put(0, torch.full((2, 3), rank, dtype=torch.int32))
        small.sync()
        assert raw[0][0][:, 0].tolist() == [world - 2] * 2 + [world - 1] * 2 + [0] * 4
    return {"length": at}


def caught(do: Callable[[], object]) -> str:
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagree(rank: int, world: int) -> dict:
    """Each way of disagreeing, found on every rank before data moves; afterwards the same objects still work."""
    odd = rank == world - 1

    def sync(length: int = 16, heads: int = 2, dtype: torch.dtype = torch.float32, layers: int = 2, **more: object):
        cache = ModelCache(CacheShape(layers, 1, heads, length, 4, "lbhd", dtype))
        return CacheSync(cache, timeout=TIMEOUT * 4, **more)

    good = sync()
    errors = {
        "start": caught(lambda: good.agree(2, start=1 if odd else 0)),
        "negative": caught(lambda: good.agree(-1 if odd else 2)),
        "no room": caught(lambda: good.agree(10)),
        "heads": caught(lambda: sync(heads=3 if odd else 2).agree(2)),
        "dtype": caught(lambda: sync(dtype=torch.float64 if odd else torch.float32).agree(2)),
        "layers": caught(lambda: sync(layers=3 if odd else 2).agree(2)),
        "strategy": caught(lambda: sync(strategy="pairwise" if odd else "ring").agree(2)),
        "capacity": caught(lambda: sync(length=3 if odd else 16).agree(2)),
        "collective": caught(lambda: sync(strategy="collective").agree(1 if odd else 2)),
        "not agreed": caught(lambda: good.start(0)),
    }
    good.agree(1)
    errors["rows"] = caught(lambda: good.put(0, torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4)))
    errors["sides"] = caught(lambda: good.put(0, torch.zeros(1, 1, 2, 4)))
    good.put(0, *(torch.full((1, 1, 2, 4), float(rank)) for _ in range(2)))
    pending = good.start(0)
    errors["open"] = caught(lambda: good.agree(1))
    pending.wait()
    assert good.cache[0].key.get_data()[:, 0, 0, 0].tolist() == list(range(world))
    return errors


def unlucky(rank: int, world: int, strategy: str, end: Callable[[], None]) -> dict:
    """Rank 2 ends after all have agreed; the others begin an exchange."""
    cache = ModelCache(CacheShape(2, 1, 2, 64, 4, "lbhd", torch.float32))
    sync = CacheSync(cache, strategy=strategy, timeout=TIMEOUT)
    dist.barrier()
    sync.agree(4)
    if rank == 2:
        end()
    began = time.monotonic()
    try:
        sync.sync()
    except RankLost as lost:
        again = caught(lambda: sync.agree(4))
        return {"lost": lost.ranks, "text": str(lost), "again": again, "seconds": time.monotonic() - began}
    return {"lost": None}


def crash(rank: int, world: int, strategy: str) -> dict:
    return unlucky(rank, world, strategy, lambda: os._exit(7))


def hang(rank: int, world: int, strategy: str) -> dict:
    return unlucky(rank, world, strategy, lambda: time.sleep(3 * TIMEOUT + 1))


def absent(rank: int, world: int) -> dict:
    """A rank that never comes to agree."""
    sync = CacheSync([[torch.zeros(8, 2)]], timeout=TIMEOUT)
    dist.barrier()
    if rank == 1:
        os._exit(7)
    return {"text": caught(lambda: sync.agree(2))}


def run_rank(scenario: str, rank: int, world: int, port: int, report: int) -> None:
    """One forked rank."""
    torch.set_num_threads(1)
    name, *arguments = scenario.split(":")
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
    try:
        result = {"result": globals()[name](rank, world, *arguments)}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    os.write(report, json.dumps(result).encode())
    # every other rank of a lost group waits for this one's sockets otherwise
    os._exit(0 if "result" in result else 1)


def launch(world: int, scenarios: list[str]) -> dict[str, list[dict | None]]:
    """Fork ``world`` ranks for each scenario, host their stores, and collect what they report; None: nothing."""
    ranks: dict[int, tuple[str, int, int, int]] = {}
    for scenario in scenarios:  # threads (of the stores) only after the last fork
        for rank in range(world):
            (port_in, port_out), (report_in, report_out) = os.pipe(), os.pipe()
            child = os.fork()
            if child == 0:
                run_rank(scenario, rank, world, int(os.read(port_in, 16)), report_out)
            os.close(report_out)
            ranks[child] = (scenario, rank, port_out, report_in)
    stores = {one: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for one in scenarios}
    for scenario, _, port_out, _ in ranks.values():
        os.write(port_out, str(stores[scenario].port).encode())
    results: dict[str, list[dict | None]] = {scenario: [None] * world for scenario in scenarios}
    deadline, running = time.monotonic() + LIMIT, set(ranks)
    while running:
        for child in list(running):
            if os.waitpid(child, os.WNOHANG)[0]:
                running.discard(child)
                scenario, rank, _, report_in = ranks[child]
                text = os.read(report_in, 1 << 16)
                results[scenario][rank] = json.loads(text) if text else None
            elif time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return results


# What is expected of them.


def launched(world: int, *scenarios: str) -> dict[str, list[dict | None]]:
    command = [sys.executable, str(Path(__file__)), str(world), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + 30)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def results(of: list[dict | None]) -> list[dict]:
    assert all(one is not None and "result" in one for one in of), of
    return [one["result"] for one in of]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_gloo_available(), reason="needs fork and Gloo")


@needs_fork
@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_end_with_all_rows_in_rank_order_and_nothing_else_is_touched(world: int) -> None:
    found = launched(world, "exchange", "steps")
    done = results(found["exchange"])
    assert len({one["digest"] for one in done}) == 1
    assert done[0]["done"] == 4 * (2 * len(LENGTHS[world]) + 1)
    assert len({one["length"] for one in results(found["steps"])}) == 1


@pytest.fixture(scope="module")
def trouble() -> dict[str, list[dict | None]]:
    scenarios = [*(f"crash:{strategy}" for strategy in STRATEGIES), "hang:ring", "hang:pairwise", "absent", "disagree"]
    return launched(4, *scenarios)


@needs_fork
def test_ranks_that_disagree_find_out_before_data_moves(trouble: dict) -> None:
    found = results(trouble["disagree"])
    common = [{k: v for k, v in one.items() if k not in ("rows", "sides", "open", "not agreed")} for one in found]
    assert all(one == common[0] for one in common)
    expected = {
        "start": "RanksDisagree: start: rank 0 has 0, rank 1 has 0, rank 2 has 0, rank 3 has 1",
        "negative": "rank 3 has -1",
        "no room": "40 rows do not fit",
        "heads": "rank 3 has [1, 3, 4] torch.float32",
        "dtype": "rank 3 has [1, 2, 4] torch.float64",
        "layers": "layers: rank 0 has 2, rank 1 has 2, rank 2 has 2, rank 3 has 3",
        "strategy": "rank 3 has pairwise",
        "capacity": "rank 3 has 3",
        "collective": "needs equal lengths",
        "not agreed": "RuntimeError: the ranks have not agreed",
        "rows": "ValueError: 2 rows where 1 were agreed on",
        "sides": "ValueError: a layer takes a key and a value",
        "open": "1 exchanges have not been waited for",
    }
    for one in found:
        for name, text in expected.items():
            assert text in one[name], (name, one[name])


@needs_fork
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_dies_is_named_by_all_others(trouble: dict, strategy: str) -> None:
    check_lost(trouble[f"crash:{strategy}"])


@needs_fork
@pytest.mark.parametrize("strategy", ["ring", "pairwise"])
def test_a_rank_that_hangs_is_named_by_all_others(trouble: dict, strategy: str) -> None:
    check_lost(trouble[f"hang:{strategy}"])


def check_lost(found: list[dict | None]) -> None:
    for one in results([one for rank, one in enumerate(found) if rank != 2]):
        assert one["lost"] == [2], one
        assert one["text"].startswith("rank 2 did not answer within")
        assert one["again"] == f"RankLost: {one['text']}"
        assert one["seconds"] < 4 * TIMEOUT


@needs_fork
def test_a_rank_that_never_comes_is_named(trouble: dict) -> None:
    found = results([one for rank, one in enumerate(trouble["absent"]) if rank != 1])
    assert [one["text"] for one in found] == ["RankLost: rank 1 did not answer within 3 s (agree/1)"] * 3


@pytest.fixture
def alone(tmp_path: Path):
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_fork
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_alone_needs_no_exchange(alone: None, strategy: str) -> None:
    cache = ModelCache(CacheShape(2, 1, 2, 8, 4, "lbhd", torch.float32))
    sync = CacheSync(cache, strategy=strategy)
    assert sync.agree(3) == [0, 3]
    sync.put(0, torch.ones(3, 1, 2, 4), torch.ones(3, 1, 2, 4))
    sync.sync()
    assert cache.current_length == 3


@needs_fork
@pytest.mark.parametrize(("layout", "batch"), [("bhld", 1), ("blhd", 2)])
def test_a_layout_that_cannot_be_sent_in_place_is_refused_with_one_that_can(
    alone: None, layout: str, batch: int
) -> None:
    with pytest.raises(NotContiguous, match="layout='lbhd'"):
        CacheSync(ModelCache(CacheShape(1, batch, 2, 8, 4, layout)))
    with pytest.raises(NotContiguous):
        CacheSync([[torch.zeros(8, 4)[:, :2]]])


@needs_fork
def test_caches_whose_rows_move_and_unknown_strategies_are_refused(alone: None) -> None:
    for when_full in ("grow", "roll"):
        with pytest.raises(ValueError, match=f"may {when_full}"):
            CacheSync(ModelCache(CacheShape(1, 1, 2, 8, 4, "lbhd"), when_full=when_full))
    with pytest.raises(ValueError, match="none of ring, pairwise, collective"):
        CacheSync(ModelCache(CacheShape(1, 1, 2, 8, 4, "lbhd")), strategy="star")
    with pytest.raises(ValueError, match="different lengths"):
        CacheSync([[torch.zeros(8, 4), torch.zeros(7, 4)]])


@pytest.mark.parametrize("strategy", ["ring", "pairwise"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_in_every_round_each_send_has_its_receive_and_in_the_end_all_have_all(strategy: str, world: int) -> None:
    schedules = [rounds(strategy, rank, world) for rank in range(world)]
    has = [{rank} for rank in range(world)]
    for step in zip(*schedules, strict=True):
        arrived = [set(one) for one in has]
        for rank, transfers in enumerate(step):
            for transfer in transfers:
                assert transfer.sends in has[rank]
                assert [t.receives for t in step[transfer.to] if t.source == rank] == [transfer.sends]
                arrived[rank].add(transfer.receives)
        has = arrived
    assert all(one == set(range(world)) for one in has)
    assert rounds("ring", 0, 3)[0] == [Transfer(1, 0, 2, 2)]


def test_bounds_follow_rank_order() -> None:
    intents = [Intent(4, length, 64, 2, "rows", "ring") for length in (3, 0, 7)]
    assert bounds_of(intents, (0, 1, 2)) == [4, 7, 7, 14]
    with pytest.raises(RanksDisagree, match="rank 5 has 3, rank 6 has 0, rank 9 has 7"):
        bounds_of([Intent(60, i.length, 64, 2, "rows", "ring") for i in intents], (5, 6, 9))


if __name__ == "__main__":
    print(json.dumps(launch(int(sys.argv[1]), sys.argv[2:])))
