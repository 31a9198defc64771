"""New host memory filled, page-locked and freed: what the system's mappings cost beside the one that the arena uses.

    python benchmarks/host_memory.py [--segments 16] [--threads 8 16] [--rounds 3]

Segments of 690 MiB, each filled by one thread and then registered with the driver, if there is a GPU. Kinds are measured in turn.
On Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from intelligent_vram.vram.host_memory import HostSegment
from intelligent_vram.vram.page_lock import CudaRegistrar
from intelligent_vram.vram.units import GIB, MIB

SEGMENT = 690 * MIB  # of a Wan 14B block


def mapped(flags: int, advice: int | None = None) -> Callable[[int], torch.Tensor]:
    def make(nbytes: int) -> torch.Tensor:
        mapping = mmap.mmap(-1, nbytes, flags=flags | mmap.MAP_ANONYMOUS)
        if advice is not None:
            mapping.madvise(advice)
        return torch.frombuffer(mapping, dtype=torch.uint8)

    return make


def kinds() -> dict[str, Callable[[int], torch.Tensor]]:
    """What makes uint8 [nbytes] of new memory, by name."""
    return {
        "shared": mapped(mmap.MAP_SHARED),
        "shared, huge pages asked for": mapped(mmap.MAP_SHARED, mmap.MADV_HUGEPAGE),
        "private": mapped(mmap.MAP_PRIVATE),
        "torch.empty": lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        "the arena's (private, huge pages)": lambda nbytes: HostSegment(nbytes).buffer,
    }


def run(make: Callable[[int], torch.Tensor], count: int, threads: int, source: torch.Tensor) -> tuple[float, float]:
    """Seconds of filling and page-locking ``count`` segments, and of freeing them once they are not page-locked any more."""
    registrar = CudaRegistrar(torch.device("cuda")) if torch.cuda.is_available() else None

    def one(_: int) -> torch.Tensor:
        buffer = make(SEGMENT)
        ctypes.memmove(buffer.data_ptr(), source.data_ptr(), SEGMENT)
        if registrar is not None and (reason := registrar.register(buffer.data_ptr(), SEGMENT)):
            raise RuntimeError(reason)
        return buffer

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        buffers = list(pool.map(one, range(count)))
    filled = time.perf_counter()
    addresses = [buffer.data_ptr() for buffer in buffers]
    for address in addresses if registrar is not None else ():
        registrar.unregister(address)
    begin = time.perf_counter()
    del buffers
    return filled - start, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        parser.error("this compares kinds of memory that only Linux has")
    source = torch.ones(SEGMENT, dtype=torch.uint8)
    size = args.segments * SEGMENT
    print(f"{size / GIB:.1f} GiB, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    for threads in args.threads:
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds()}
        for _ in range(args.rounds):
            for kind, make in kinds().items():
                found[kind].append(run(make, args.segments, threads, source))
        for kind, results in found.items():
            filling, freeing = (statistics.median(column) for column in zip(*results, strict=True))
            rates = [size / seconds / 1e9 for seconds, _ in results]
            print(
                f"{threads:3} threads, {kind:35} {size / filling / 1e9:5.1f} GB/s ({min(rates):.1f} to {max(rates):.1f}), "
                f"freed in {freeing:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
