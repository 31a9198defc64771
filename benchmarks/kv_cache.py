"""Appending to a pre-allocated key/value cache against concatenation, over a whole run.

    python benchmarks/kv_cache.py [--batch 1] [--heads 8] [--prefill 1200] [--json FILE]

Every step appends one token to the keys and values of all layers, as decoding does: layer by layer, layer by layer in one
CUDA graph a step, and all layers in one call; against ``torch.cat`` layer by layer, and of all layers in one call. Host
and device time together, the same rows, and the caches compared at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from intelligent_vram.vram.kv_cache import CacheShape, ModelCache
from measure import reset_peaks, synchronize


class Bench:
    """One shape of cache."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        length = args.prefill + args.steps
        self.shape = CacheShape(
            args.layers, args.batch, args.heads, length, args.head_dim, args.layout, torch.bfloat16, self.device
        )
        self.parts = 2 * args.layers
        self.past = torch.randn(self.parts, *self.shape.stored(args.prefill)).to(self.device, self.shape.dtype)
        self.new = torch.randn(self.parts, *self.shape.stored(1)).to(self.device, self.shape.dtype)
        self.dim = self.shape.length_dim

    def filled(self, **options: bool) -> ModelCache:
        """A cache with what came before."""
        cache = ModelCache(self.shape, **options)
        cache.append_all(self.past)
        return cache

    def cat_layers(self) -> tuple[Callable[[], None], Callable[[], list[torch.Tensor]]]:
        caches = list(self.past.clone())

        def step() -> None:
            for i in range(self.parts):
                caches[i] = torch.cat([caches[i], self.new[i]], self.dim)

        return step, lambda: caches

    def cat_all(self) -> tuple[Callable[[], None], Callable[[], list[torch.Tensor]]]:
        caches = [self.past.clone()]

        def step() -> None:
            caches[0] = torch.cat([caches[0], self.new], self.dim + 1)

        return step, lambda: list(caches[0])

    def append_layers(self) -> tuple[Callable[[], None], Callable[[], list[torch.Tensor]]]:
        cache = self.filled()
        rows = [(self.new[2 * layer], self.new[2 * layer + 1]) for layer in range(self.args.layers)]

        def step() -> None:
            for layer, (key, value) in zip(cache.layers, rows, strict=True):
                layer.append(key, value)

        return step, lambda: [side.get_data() for layer in cache for side in layer]

    def append_graph(self) -> tuple[Callable[[], None], Callable[[], list[torch.Tensor]]]:
        cache = self.filled(device_length=True)
        rows = [(self.new[2 * layer], self.new[2 * layer + 1]) for layer in range(self.args.layers)]

        def step() -> None:
            for layer, (key, value) in zip(cache.layers, rows, strict=True):
                layer.append(key, value)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        cache.reset()
        cache.append_all(self.past)
        length = self.shape.max_length
        return graph.replay, lambda: [side.data.narrow(self.dim, 0, length) for layer in cache for side in layer]

    def append_all(self) -> tuple[Callable[[], None], Callable[[], list[torch.Tensor]]]:
        cache = self.filled()
        return lambda: cache.append_all(self.new), lambda: [side.get_data() for layer in cache for side in layer]

    def run(self, make: Callable) -> dict[str, float | int | bool]:
        """Seconds of all steps (median over repeats), allocations after the first step, peak bytes, and equality."""
        seconds, row = [], {}
        for _ in range(self.args.repeats):
            reset_peaks(self.device)
            step, result = make()
            step()
            synchronize(self.device)
            before = self.allocations()
            start = time.perf_counter()
            for _ in range(self.args.steps - 1):
                step()
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
            row["allocations"] = self.allocations() - before
            caches = result()
            synchronize(self.device)
            row["equal"] = all(
                torch.equal(cache.narrow(self.dim, 0, self.args.prefill), self.past[i])
                and torch.equal(
                    cache.narrow(self.dim, self.args.prefill, self.args.steps),
                    self.new[i].expand(self.shape.stored(self.args.steps)),
                )
                for i, cache in enumerate(caches)
            )
            del step, result, caches
        if self.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return {"seconds": statistics.median(seconds), "spread": max(seconds) - min(seconds), **row}

    def allocations(self) -> int:
        """How often torch's allocator was asked for memory; 0 on a CPU."""
        cuda = self.device.type == "cuda"
        return torch.cuda.memory_stats(self.device)["allocation.all.allocated"] if cuda else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layout", default="bhld")
    parser.add_argument("--prefill", type=int, default=1200, help="tokens that are there before")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    with torch.inference_mode():
        bench = Bench(args)
        ways = {
            "torch.cat, layer by layer": bench.cat_layers,
            "torch.cat, all layers": bench.cat_all,
            "append, layer by layer": bench.append_layers,
            "append, all layers": bench.append_all,
        }
        if bench.device.type == "cuda":
            ways["append, layer by layer, CUDA graph"] = bench.append_graph
        rows = {}
        for name, make in ways.items():
            row = rows[name] = bench.run(make)
            row["times_faster"] = rows["torch.cat, layer by layer"]["seconds"] / row["seconds"]
            print(f"{name:36s} {row['seconds']:8.4f} s  {row['times_faster']:6.1f}x", end="  ")
            print(f"{row['allocations']:7d} allocations  {'equal' if row['equal'] else 'DIFFERENT'}", flush=True)
    all_layers = rows["torch.cat, all layers"]["seconds"] / rows["append, all layers"]["seconds"]
    print(f"all layers in one call: {all_layers:.1f} times faster than torch.cat of all layers in one call")
    if args.json:
        name = torch.cuda.get_device_name(args.device) if bench.device.type == "cuda" else "cpu"
        with open(args.json, "w") as file:
            json.dump({"device": name, "arguments": vars(args), "rows": rows}, file, indent=1)
    return 0 if all(row["equal"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
