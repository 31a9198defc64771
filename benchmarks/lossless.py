"""Weights kept encoded in RAM and on the link, beside the same engine with plain ones, at Wan 14B block size.

    python benchmarks/lossless.py [--layers 12] [--tokens 1024 7800 32760] [--files FOLDER]

All in one process, on the same weights and inputs. The plain floor is max(compute-only time, plain bytes / page-locked
bandwidth), the latter measured before each configuration. -v: tell the rate of encoding, too. --files: also set-up from a plain
and from an encoded file, which are written there.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from intelligent_vram.cli.wan import WAN_14B, WanConfig, WanModel, meta_model, random_model, sample_inputs
from intelligent_vram.quant.lossless import compress_file
from intelligent_vram.vram import Swap, SwapConfig, attach
from intelligent_vram.vram.adapt import SETTLED
from intelligent_vram.vram.encoded_file import load_encoded
from intelligent_vram.vram.units import GIB, MIB
from measure import copy_bandwidth, forwards, reset_peaks
from safetensors.torch import load_file, save_file

DEVICE = torch.device("cuda", 0)
SET_UPS = {"plain": "a plain file", "then": "a plain file, encoded then", "encoded": "an encoded file"}
FIRST = 1024  # tokens of the first forward after setting up
SETTLING = 3 * SETTLED  # forwards after which the engine has made its choices


def configurations(layers: int) -> dict[str, SwapConfig]:
    """By name, with plain weights."""
    every = SwapConfig(mode="chunkwise", streamed_blocks=layers, lossless="off")
    return {
        "every block streamed": every,
        "adaptive, 6 GiB": SwapConfig(max_vram=6 * GIB, lossless="off"),
    }


def ram() -> int:
    """Bytes of RAM that are taken on this machine, files in the page cache not counted."""
    memory = psutil.virtual_memory()
    return memory.total - memory.available


def measured(
    model: WanModel, config: SwapConfig, inputs: dict, expected: dict
) -> Iterator[tuple[int, float, Swap, int]]:
    """Tokens, seconds of a forward, the swap and peak bytes for each number of tokens, attached anew for each."""
    for tokens, args in inputs.items():
        swap = attach(model, config, DEVICE)
        for _ in range(SETTLING):
            assert torch.equal(model(*args), expected[tokens])
        reset_peaks(DEVICE)
        per_group = 6 if tokens < 20000 else 3
        result = forwards(lambda args=args: model(*args), DEVICE, 5, per_group)
        yield tokens, result.seconds, swap, result.peak_allocated
        swap.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 7800, 32760])
    parser.add_argument(
        "--files", type=Path, help="a folder with room for two files of the model: measure set-up from files too"
    )
    parser.add_argument("--only-files", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of set-up from files")
    parser.add_argument("--set-up", choices=["make", *SET_UPS], help=argparse.SUPPRESS)
    parser.add_argument("-v", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO if args.v else logging.WARNING, format="%(message)s")
    config = replace(WAN_14B, num_layers=args.layers)
    with torch.inference_mode():
        if args.set_up:
            files = args.files / "plain.safetensors", args.files / "encoded.safetensors"
            if args.set_up == "make":
                make_files(config, *files)
            else:
                print(*set_up(config, *files, args.set_up))
            return
        if not args.only_files:
            compare(config, args)
        if args.files is not None:
            from_files(args)


def compare(config: WanConfig, args: argparse.Namespace) -> None:
    model = random_model(config, torch.bfloat16, "cuda")
    inputs = {tokens: sample_inputs(config, tokens, torch.bfloat16, "cuda", seed=1) for tokens in args.tokens}
    expected = {tokens: model(*args) for tokens, args in inputs.items()}
    resident = {
        tokens: forwards(lambda args=args: model(*args), DEVICE, 3, 3).seconds for tokens, args in inputs.items()
    }
    model.cpu()
    print(f"{torch.cuda.get_device_name()}, {args.layers} blocks")
    print(f"{'':27} {'tokens':>6} {'floor':>7} {'off':>7} {'here':>7} {'here/off':>9} {'/floor':>9} {'memory':>9}")
    for name, plain in configurations(args.layers).items():
        bandwidth = copy_bandwidth(DEVICE, 700 * MIB)
        print(f"{name}: link {bandwidth / 1e9:.1f} GB/s")
        before: dict[int, tuple[float, float, int]] = {}
        for tokens, seconds, swap, peak in measured(model, plain, inputs, expected):
            floor = max(resident[tokens], swap.plan.streamed_bytes / bandwidth)
            before[tokens] = seconds, floor, peak
            arena = swap.packed.host_bytes
        for choice in ("auto", "on"):
            for tokens, seconds, swap, peak in measured(model, replace(plain, lossless=choice), inputs, expected):
                was, floor, was_peak = before[tokens]
                record, coded = swap.telemetry.last(wait=True), swap.plan.encoded_bytes
                largest = max(unit.encoded for unit in swap.plan.units) / MIB
                print(
                    f"{name:22} {choice:4} {tokens:6} {floor:7.4f} {was:7.4f} {seconds:7.4f} {seconds / was:9.3f} "
                    f"{seconds / floor:9.3f} {(peak - was_peak) / MIB:+6.0f} MiB {'encoded' if coded else 'plain'}, arena "
                    f"{swap.packed.host_bytes / arena:.3f}, largest unit {largest:.0f} MiB, set-up {swap.setup_seconds:.2f} s, "
                    f"decoding {record.decode_seconds * 1000:.2f} ms",
                    flush=True,
                )


def make_files(config: WanConfig, plain: Path, packed: Path) -> None:
    plain.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_model(config, torch.bfloat16, "cuda").cpu().state_dict(), plain)
    start = time.perf_counter()
    made = compress_file(plain, packed, DEVICE)
    print(
        f"file: {made.nbytes / made.plain:.3f}, encoded at {made.plain / (time.perf_counter() - start) / 1e9:.2f} GB/s"
    )


def set_up(config: WanConfig, plain: Path, packed: Path, kind: str) -> tuple[float, float, int, int]:
    """Seconds, those until a first forward of FIRST tokens is over, too, bytes of the arena, bytes of RAM that loading and attaching
    the model take; see SET_UPS."""
    inputs = sample_inputs(config, FIRST, torch.bfloat16, DEVICE, seed=1)
    warm = random_model(replace(config, num_layers=1), torch.bfloat16, DEVICE)
    warm(*inputs)  # the process' own start is not what is measured
    del warm
    gc.collect()
    torch.cuda.synchronize()
    base = ram()
    start = time.perf_counter()
    model = meta_model(config)
    model.load_state_dict(load_encoded(packed)[0] if kind == "encoded" else load_file(plain), assign=True)
    lossless = "off" if kind == "plain" else "on"
    swap = attach(model, SwapConfig(mode="chunkwise", streamed_blocks=config.num_layers, lossless=lossless), DEVICE)
    seconds = time.perf_counter() - start
    gc.collect()
    taken = ram() - base
    start = time.perf_counter()
    model(*inputs)
    torch.cuda.synchronize()
    return seconds, seconds + time.perf_counter() - start, swap.packed.host_bytes, taken


def from_files(args: argparse.Namespace) -> None:
    """Set-up from a plain and from an encoded file, which are in the page cache, each in a process of its own, in turn: a user's
    process does it once."""

    def run(*more: str) -> str:
        own = [sys.executable, __file__, "--layers", str(args.layers), "--files", str(args.files)]
        return subprocess.run([*own, *more], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    print(run("--set-up", "make"))
    found: dict[str, list[tuple[float, float, int, int]]] = {kind: [] for kind in SET_UPS}
    for _ in range(args.rounds):
        for kind, results in found.items():
            seconds, forward, arena, taken = run("--set-up", kind).split()
            results.append((float(seconds), float(forward), int(arena), int(taken)))
    plain = [statistics.median(column) for column in zip(*found["plain"], strict=True)]
    for kind, results in found.items():
        seconds, forward, arena, taken = (statistics.median(column) for column in zip(*results, strict=True))
        print(
            f"{SET_UPS[kind]:27} {seconds:6.2f} s ({', '.join(f'{result[0]:.2f}' for result in results)}), of plain "
            f"{seconds / plain[0]:.3f}; with a first forward {forward:.2f} s "
            f"({', '.join(f'{result[1]:.2f}' for result in results)}), of plain {forward / plain[1]:.3f}; arena "
            f"{arena / GIB:.2f} GiB, RAM {taken / GIB:+.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
