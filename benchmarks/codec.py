"""Lossless coding on this GPU: what is left of weights, how fast they are encoded and decoded, beside the link.

    python benchmarks/codec.py [--nbytes BYTES] [--chunks]

Prints a line for each dtype; --chunks: for several sizes of chunks. Rates are of plain bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from intelligent_vram.vram.codec import CHUNK, codec_for, kind_of
from intelligent_vram.vram.units import KIB, MIB
from measure import copy_bandwidth

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
REPEATS = 9


def weights(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [nbytes] on the GPU: weights as a trained layer has them, each row with a scale of its own."""
    count = nbytes // torch.empty(0, dtype=dtype).element_size()
    values = torch.randn(count // 5120, 5120, device="cuda") * 0.02
    values *= torch.exp(0.5 * torch.randn(count // 5120, 1, device="cuda"))
    if dtype == torch.int8:
        values = (values / values.abs().amax(1, keepdim=True) * 127).round()
    elif dtype.itemsize == 1:
        values *= torch.finfo(dtype).max / values.abs().max()
    return values.to(dtype).view(-1).view(torch.uint8)


def seconds(run: Callable[[], object]) -> float:
    """The median on the device."""
    run()
    taken = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken)


def measure(nbytes: int, dtype: torch.dtype, chunk: int, link: float) -> str:
    """One line of the table."""
    codec = codec_for(torch.device("cuda"))
    plain = weights(nbytes, dtype)
    host = plain.cpu()
    room = torch.zeros(2 * len(plain), dtype=torch.uint8).pin_memory()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        chunks = codec.encode(host, kind_of(dtype), room, chunk)
        times.append(time.perf_counter() - start)
    source, target = room[: chunks.encoded].cuda(), torch.zeros_like(plain)
    (batch,), stream = codec.batches([[(0, 0, chunks)]]), torch.cuda.current_stream()
    taken = seconds(lambda: batch.decode(source, target, "here", stream))
    calls = []
    for _ in range(50):
        start = time.perf_counter()
        batch.decode(source, target, "here", stream)
        calls.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    assert torch.equal(target, plain)
    saved = (len(plain) - chunks.encoded) / link
    return (
        f"{str(dtype).removeprefix('torch.'):14} {chunk // KIB:6} {len(plain) / MIB:7.0f} {chunks.encoded / len(plain):7.3f} "
        f"{len(plain) / statistics.median(times) / 1e9:8.1f} {len(plain) / taken / 1e9:8.0f} {taken * 1000:9.2f} "
        f"{saved * 1000:9.2f} {statistics.median(calls) * 1e6:8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=int, default=734_003_200)
    parser.add_argument("--chunks", action="store_true")
    args = parser.parse_args()
    link = copy_bandwidth(torch.device("cuda"), args.nbytes)
    print(f"{torch.cuda.get_device_name()}, link {link / 1e9:.1f} GB/s")
    print(
        f"{'dtype':14} {'chunk':>6} {'MiB':>7} {'left':>7} {'enc GB/s':>8} {'dec GB/s':>8} {'decode ms':>9} {'saved ms':>9} "
        f"{'call us':>8}"
    )
    for dtype in DTYPES:
        for chunk in [64 * KIB, 128 * KIB, CHUNK, 512 * KIB, MIB] if args.chunks else [CHUNK]:
            print(measure(args.nbytes // 10240 * 10240, dtype, chunk, link), flush=True)


if __name__ == "__main__":
    main()
