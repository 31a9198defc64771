"""Exchanging a cache between ranks against the raw operations on the same bytes, and hidden behind compute.

    torchrun --standalone --nproc-per-node 4 benchmarks/kv_sync.py --json FILE          # GPUs, over NCCL
    torchrun --standalone --nproc-per-node 2 benchmarks/kv_sync.py --device cpu --rows 256 --layers 4 --repeats 5

Raw is what one would write by hand on tensors made for it: all-gathers; for pairwise one batch of sends and receives; for
ring one after the other. Ours and raw take turns. A figure is the median over repeats of the slowest rank's time.
"over": ours / raw. "hidden": how much of the shorter of exchange and compute vanishes when both run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from intelligent_vram.vram.kv_cache import CacheShape, ModelCache
from intelligent_vram.vram.kv_sync import CacheSync, all_gather_flat
from measure import synchronize


class Bench:
    """One rank."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        length = args.rows * self.world
        self.cache = ModelCache(CacheShape(args.layers, 1, args.heads, length, 128, "lbhd", dtype, device))
        for part in self.cache.buffer:
            part[self.rank * args.rows : (self.rank + 1) * args.rows].normal_()
        # for the raw operations: pieces that are tensors of their own, and whole outputs for the all-gather
        self.own = self.cache.buffer[:, self.rank * args.rows : (self.rank + 1) * args.rows].clone()
        self.whole = torch.zeros_like(self.cache.buffer)
        self.pieces = [[torch.empty_like(own) for _ in range(self.world)] for own in self.own]
        for pieces, own in zip(self.pieces, self.own, strict=True):
            pieces[self.rank].copy_(own)
        self.piece_bytes = self.own[0].nbytes
        size = args.product
        self.factor = torch.randn(size, size, device=device, dtype=dtype)
        self.product = torch.empty_like(self.factor)
        self.per_layer = 1

    def timed(self, *ways: Callable[[], object]) -> list[float]:
        """Seconds of each way, which take turns: medians of the slowest rank's times."""
        seconds: list[list[float]] = [[] for _ in ways]
        for turn in range(self.args.repeats + 2):
            for way, times in zip(ways, seconds, strict=True):
                synchronize(self.device)
                dist.barrier()
                synchronize(self.device)
                start = time.perf_counter()
                way()
                synchronize(self.device)
                slowest = torch.tensor(time.perf_counter() - start, device=self.device, dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if turn > 1:
                    times.append(slowest.item())
        return [statistics.median(times) for times in seconds]

    def wait(self, works: list[dist.Work]) -> None:
        for work in works:
            work.wait()

    def raw_collective(self) -> None:
        works = [
            all_gather_flat(whole.view(-1), own.view(-1), async_op=True)
            for whole, own in zip(self.whole, self.own, strict=True)
        ]
        self.wait(works)

    def raw_pairwise(self) -> None:
        for i in range(0, len(self.own), 2):
            operations = []
            for distance in range(1, self.world):
                to, source = (self.rank + distance) % self.world, (self.rank - distance) % self.world
                for side in range(2):
                    operations.append(dist.P2POp(dist.isend, self.pieces[i + side][self.rank], to))
                    operations.append(dist.P2POp(dist.irecv, self.pieces[i + side][source], source))
            self.wait(dist.batch_isend_irecv(operations))

    def raw_ring(self) -> None:
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        for i in range(0, len(self.own), 2):
            for step in range(self.world - 1):
                sends, receives = (self.rank - step) % self.world, (self.rank - step - 1) % self.world
                operations = []
                for side in range(2):
                    operations.append(dist.P2POp(dist.isend, self.pieces[i + side][sends], after))
                    operations.append(dist.P2POp(dist.irecv, self.pieces[i + side][receives], before))
                self.wait(dist.batch_isend_irecv(operations))

    def exchange(self, sync: CacheSync) -> None:
        """All layers, by us."""
        exchanges = [sync.start(layer) for layer in range(self.args.layers)]
        for one in exchanges:
            one.wait()

    def layer(self) -> None:
        """The compute that stands for a layer."""
        for _ in range(self.per_layer):
            torch.mm(self.factor, self.factor, out=self.product)

    def compute(self) -> None:
        for _ in range(self.args.layers):
            self.layer()

    def both(self, sync: CacheSync) -> None:
        """A layer's exchange starts when the layer is queued, and is waited for after the last one."""
        exchanges = []
        for layer in range(self.args.layers):
            exchanges.append(sync.start(layer))
            self.layer()
        for one in exchanges:
            one.wait()

    def strategy(self, name: str) -> dict[str, float | bool]:
        """Figures of one strategy."""
        sync = CacheSync(self.cache, strategy=name, timeout=120)
        start = time.perf_counter()
        for _ in range(10):
            sync.agree(self.args.rows)
        agree = (time.perf_counter() - start) / 10
        raw = {"ring": self.raw_ring, "pairwise": self.raw_pairwise, "collective": self.raw_collective}[name]
        ours, same, gather = self.timed(lambda: self.exchange(sync), raw, self.raw_collective)
        self.calibrate(ours)
        alone, compute, both = self.timed(lambda: self.exchange(sync), self.compute, lambda: self.both(sync))
        equal = torch.equal(self.cache.buffer, self.whole)
        sync.close()
        sent = self.piece_bytes * 2 * self.args.layers * (self.world - 1)
        return {
            "seconds": ours,
            "raw_seconds": same,
            "over_raw": ours / same,
            "collective_seconds": gather,
            "over_collective": ours / gather,
            "received_gb_per_second": sent / ours / 1e9,
            "exchange_seconds": alone,
            "compute_seconds": compute,
            "both_seconds": both,
            "hidden": (alone + compute - both) / min(alone, compute),
            "agree_seconds": agree,
            "equal": equal,
        }

    def calibrate(self, seconds: float) -> None:
        """Make the compute of all layers take about as long as ``seconds``, on all ranks alike."""
        self.per_layer = 1
        (one,) = self.timed(self.compute)
        count = torch.tensor(max(1, round(seconds / one)), device=self.device)
        dist.broadcast(count, 0)
        self.per_layer = int(count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096, help="tokens that each rank brings")
    parser.add_argument("--product", type=int, default=2048, help="size of the matrix products beside the exchange")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--high-priority", action="store_true", help="NCCL's streams come before the compute")
    parser.add_argument("--strategies", nargs="+", default=["ring", "pairwise", "collective"])
    parser.add_argument("--json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if args.device == "cuda":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=args.high_priority)
        dist.init_process_group("nccl", pg_options=options)
    else:
        dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = Bench(args, device)
        rows = {}
        for name in args.strategies:
            row = rows[name] = bench.strategy(name)
            if bench.rank == 0:
                print(
                    f"{name:10s} {bench.world} ranks, {bench.piece_bytes / 2**20:.1f} MiB pieces: "
                    f"{row['seconds'] * 1e3:.2f} ms, {row['over_raw']:.3f} of raw, {row['over_collective']:.3f} of the "
                    f"all-gather, {row['received_gb_per_second']:.1f} GB/s; with compute {row['compute_seconds'] * 1e3:.2f} "
                    f"ms: {row['both_seconds'] * 1e3:.2f} ms, {100 * row['hidden']:.0f}% hidden; agree "
                    f"{row['agree_seconds'] * 1e3:.2f} ms; {'equal' if row['equal'] else 'DIFFERENT'}",
                    flush=True,
                )
    if bench.rank == 0 and args.json:
        name = torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu"
        with open(args.json, "w") as file:
            json.dump({"device": name, "world": bench.world, "arguments": vars(args), "rows": rows}, file, indent=1)
    dist.destroy_process_group()
    return 0 if all(row["equal"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
