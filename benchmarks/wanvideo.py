"""Block swap in ComfyUI-WanVideoWrapper's own model class: against all weights resident, the floor, and its own block swap.

    python benchmarks/wanvideo.py [--blocks 12] [--tokens 1024 7800 32760] [--json FILE]
    python benchmarks/wanvideo.py --experts [--blocks 4] [--runs 10]

Finds ComfyUI and the wrapper by COMFYUI_PATH and WANVIDEOWRAPPER_PATH, else below ~/comfy. Everything is measured in one
process on the same weights and inputs, each run through the wrapper's own steps: load_weights, init_blockswap, calls of the
transformer, offload_transformer. The floor of a configuration is max(compute-only time, bytes it streams / page-locked
bandwidth), both measured here. With --experts two models take turns, as those of Wan 2.2 do, and the RAM of the process is
printed after each run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from block_swap import configurations
from intelligent_vram.cli.wan import WAN_14B, WanConfig
from intelligent_vram.vram import SwapConfig
from intelligent_vram.vram.device import facts
from intelligent_vram.vram.units import GIB, MIB
from measure import Measured, copy_bandwidth, forwards, reset_peaks, synchronize
from wanvideo_host import Inputs, Run, Wrapper, default_paths, host_weights, own_arguments

RESIDENT = "resident"
DEFAULTS = "wrapper's block swap, defaults"
BEST = "wrapper's, non-blocking + prefetch 1"
NO_PREFETCH = "wrapper's, non-blocking (prefetch reset)"
OWN = (DEFAULTS, BEST, NO_PREFETCH)
SLOW = 2.0  # seconds of a forward of which few are measured
RSS_PARTS = ("RssAnon", "RssFile", "RssShmem")


@dataclass
class Row:
    """A configuration at one number of tokens. Bytes and seconds; ``compute`` is the resident model's forward."""

    name: str
    tokens: int
    seconds: float
    spread: float
    peak_allocated: int
    peak_reserved: int
    setup: float
    streamed_bytes: int
    identical: bool
    compute: float
    bandwidth: float
    plan: str = ""
    stall: float = 0.0

    @property
    def floor(self) -> float:
        """Seconds that no schedule beats without moving fewer bytes."""
        return max(self.compute, self.streamed_bytes / self.bandwidth)


def groups_for(seconds: float, most: int) -> tuple[int, int]:
    """How many groups of how many forwards to measure of forwards that take so long."""
    if seconds > SLOW:
        return min(most, 2), 1
    return most, 5 if seconds < SLOW / 4 else 2


def give_back(device: torch.device) -> None:
    """Return the device memory of a run that is over."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Bench:
    """One model size on one device."""

    def __init__(self, args: argparse.Namespace, wrapper: Wrapper, config: WanConfig) -> None:
        self.args = args
        self.wrapper = wrapper
        self.device = wrapper.device
        self.config = config
        self.weights = host_weights(config)
        self.inputs = {tokens: Inputs.sample(config, tokens, self.device) for tokens in args.tokens}
        self.rows: list[Row] = []
        self.reference: dict[int, torch.Tensor] = {}
        self.resident_seconds: dict[int, list[float]] = {tokens: [] for tokens in args.tokens}
        self.bandwidth = copy_bandwidth(self.device, (512 if self.device.type == "cuda" else 64) * MIB)

    def cells(self, run: Run) -> Iterator[tuple[int, Measured, bool]]:
        """Measure a run as it stands at each token count: (tokens, figures, outputs equal to the resident model's)."""
        for tokens, inputs in self.inputs.items():
            reset_peaks(self.device)
            synchronize(self.device)
            start = time.perf_counter()
            outputs = [run.forward(inputs)]
            synchronize(self.device)
            if time.perf_counter() - start < SLOW:
                start = time.perf_counter()
                outputs.append(run.forward(inputs))
                synchronize(self.device)
            seconds = time.perf_counter() - start
            reference = self.reference.setdefault(tokens, outputs[0])
            same = all(torch.equal(output, reference) for output in outputs)

            def step(inputs: Inputs = inputs, outputs: list[torch.Tensor] = outputs) -> None:
                outputs[:] = [run.forward(inputs)]

            measured = forwards(step, self.device, *groups_for(seconds, self.args.groups))
            yield tokens, measured, same and torch.equal(outputs[0], reference)

    def add(self, name: str, setup: float, streamed: int, run: Run, managed: Any = None) -> None:
        """Measure a row for each token count and print it."""
        for tokens, measured, same in self.cells(run):
            if name.startswith(RESIDENT):
                self.resident_seconds[tokens].append(measured.seconds)
            compute = statistics.mean(self.resident_seconds[tokens])
            row = Row(
                name,
                tokens,
                **asdict(measured),
                setup=setup,
                streamed_bytes=streamed,
                identical=same,
                compute=compute,
                bandwidth=self.bandwidth,
            )
            if managed is not None:
                records = managed.swap.telemetry.records(wait=True)[-8:]
                row.plan = managed.swap.plan.describe()
                row.stall = statistics.median(record.stall for record in records)
            self.rows.append(row)
            print(
                f"{name:40s} {tokens:6d}: {row.seconds:.4f} s, {row.seconds / row.floor:.3f} of floor, spread "
                f"{row.spread:.4f}, peak {row.peak_allocated / GIB:.2f}/{row.peak_reserved / GIB:.2f} GiB, set-up "
                f"{setup:.2f} s, {'identical' if same else 'DIFFERENT'}"
                + (f", stall {row.stall:.4f}" if managed is not None else ""),
                flush=True,
            )

    def block_bytes(self) -> int:
        """Bytes of all blocks, as they are moved."""
        return sum(weight.nbytes for name, weight in self.weights.items() if name.startswith("blocks."))

    def own(self, name: str, arguments: dict[str, Any] | None, prefetch: int | None = None) -> None:
        """The wrapper by itself. ``prefetch``: set again after init_blockswap, which in 1.4.7 resets it to 0."""
        transformer = self.wrapper.model(self.config)
        start = time.perf_counter()
        run = Run(self.wrapper, transformer, self.weights, arguments)
        synchronize(self.device)
        setup = time.perf_counter() - start
        if prefetch is not None:
            transformer.prefetch_blocks = prefetch
        run.forward(self.inputs[min(self.inputs)])
        self.add(name, setup, self.block_bytes() if arguments is not None else 0, run)
        run.end()
        del run, transformer
        give_back(self.device)

    def ours(self, name: str, config: SwapConfig) -> None:
        """One configuration of this pack. Its set-up ends when the engine, in the first forward, is attached."""
        from intelligent_vram.vram.hosts import wanvideo  # needs ComfyUI, which is there once Wrapper is made

        transformer = self.wrapper.model(self.config)
        managed = wanvideo.manage(transformer)
        arguments = wanvideo.arguments(config)
        start = time.perf_counter()
        run = Run(self.wrapper, transformer, self.weights, arguments)
        setup = time.perf_counter() - start
        run.forward(self.inputs[min(self.inputs)])
        if managed.swap is None:
            raise SystemExit(f"{name}: the wrapper's run went on without the engine; see the log")
        setup += managed.swap.setup_seconds
        self.add(name, setup, managed.swap.plan.streamed_bytes, run, managed)
        run.end()
        managed.release()
        del run, managed, transformer
        give_back(self.device)

    def table(self) -> None:
        """All rows against their final floors, and each row of the wrapper's own block swap against each of ours."""
        cells: dict[str, dict[int, Row]] = {}
        for row in self.rows:
            row.compute = statistics.mean(self.resident_seconds[row.tokens])
            cells.setdefault(row.name, {})[row.tokens] = row
        print(f"\nseconds, time over floor, peak GiB{'':8s}" + "".join(f"{tokens:>24d}" for tokens in self.inputs))
        for name, of_tokens in cells.items():
            texts = (
                f"{r.seconds:.4f} {r.seconds / r.floor:.3f} {r.peak_allocated / GIB:.2f}" for r in of_tokens.values()
            )
            print(f"{name:42s}" + "".join(f"{text:>24s}" for text in texts))
        ours = [name for name in cells if name not in OWN and not name.startswith(RESIDENT)]
        for own in (name for name in OWN if name in cells):
            for name in ours:
                ratios = (cells[own][tokens].seconds / cells[name][tokens].seconds for tokens in self.inputs)
                print(f"{name} is so many times as fast as {own}:" + "".join(f" {ratio:.2f}" for ratio in ratios))


def resident_parts() -> dict[str, int]:
    """Bytes of RAM that this process holds, by kind: memory of its own, of files, shared."""
    text = Path("/proc/self/status").read_text()
    return {part: 1024 * int(re.search(rf"{part}:\s*(\d+) kB", text)[1]) for part in RSS_PARTS}


def experts(args: argparse.Namespace, wrapper: Wrapper, config: WanConfig) -> dict[str, Any]:
    """Two models in turn with every block streamed, a few forwards each a run; the RAM of the process after each run."""
    from intelligent_vram.vram.hosts import wanvideo  # as in Bench.ours

    inputs = Inputs.sample(config, args.tokens[0], wrapper.device)
    swap = configurations(config.num_layers, args.block_size * MIB)["every block streamed"]
    models = []
    for seed in range(2):
        transformer = wrapper.model(config)
        managed = wanvideo.manage(transformer)
        models.append((transformer, host_weights(config, seed), managed, wanvideo.arguments(swap)))
    reference: dict[int, torch.Tensor] = {}
    totals, same = [], True
    for turn in range(1, args.runs + 1):
        start = time.perf_counter()
        for index, (transformer, weights, managed, arguments) in enumerate(models):
            run = Run(wrapper, transformer, weights, arguments)
            for _ in range(args.forwards):
                output = run.forward(inputs)
                same = same and torch.equal(output, reference.setdefault(index, output))
            if managed.swap is None:
                raise SystemExit("the wrapper's run went on without the engine; see the log")
            run.end()
            del run
        seconds = time.perf_counter() - start
        parts = resident_parts()
        totals.append(sum(parts.values()))
        described = ", ".join(f"{part} {size / GIB:.3f}" for part, size in parts.items())
        print(f"run {turn:2d}: {totals[-1] / GIB:.3f} GiB ({described}), {seconds:.2f} s", flush=True)
    for _, _, managed, _ in models:
        managed.release()
    growth = totals[-1] / totals[1]
    print(f"run {args.runs} over run 2: {growth:.4f}; outputs {'identical' if same else 'DIFFERENT'}")
    return {"experts": totals, "growth": growth, "identical": same}


def timings(args: argparse.Namespace, wrapper: Wrapper, config: WanConfig) -> dict[str, Any]:
    """All rows. The resident model comes first and last, because a card slows down as it gets warm, and ours before the
    wrapper's, whose non-blocking copies leave much page-locked memory in PyTorch's cache."""
    start = time.perf_counter()
    bench = Bench(args, wrapper, config)
    print(
        f"weights made in {time.perf_counter() - start:.1f} s, page-locked {bench.bandwidth / 1e9:.1f} GB/s", flush=True
    )
    bench.own(RESIDENT, None)
    for name, swap in configurations(config.num_layers, args.block_size * MIB).items():
        if args.only is None or args.only in name:
            bench.ours(name, swap)
    fast = {"use_non_blocking": True, "prefetch_blocks": 1}
    for name, settings, prefetch in ((BEST, fast, 1), (NO_PREFETCH, fast, None), (DEFAULTS, {}, None)):
        if args.only is None or args.only in name:
            bench.own(name, own_arguments(config.num_layers, **settings), prefetch)
    bench.own(f"{RESIDENT} again", None)
    bench.table()
    rows = [{**asdict(row), "floor": row.floor} for row in bench.rows]
    return {"rows": rows, "identical": all(row.identical for row in bench.rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    comfyui, wrapper_folder = default_paths()
    parser.add_argument("--comfyui", type=Path, default=comfyui, help="folder of ComfyUI")
    parser.add_argument("--wrapper", type=Path, default=wrapper_folder, help="folder of ComfyUI-WanVideoWrapper")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--experts", action="store_true", help="RAM over runs of two models in turn, instead of times")
    parser.add_argument("--blocks", type=int, help="of a model; default 12, and 4 with --experts")
    parser.add_argument("--dim", type=int, default=WAN_14B.dim)
    parser.add_argument("--ffn-dim", type=int, default=WAN_14B.ffn_dim)
    parser.add_argument("--heads", type=int, default=WAN_14B.num_heads)
    parser.add_argument("--text-tokens", type=int, default=WAN_14B.text_len)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 7800, 32760], help="--experts takes the first")
    parser.add_argument("--block-size", type=int, default=300, help="MiB")
    parser.add_argument("--groups", type=int, default=5, help="measured groups of forwards, of which the median counts")
    parser.add_argument("--only", help="only configurations whose name contains this, and the resident model")
    parser.add_argument("--runs", type=int, default=10, help="of --experts")
    parser.add_argument("--forwards", type=int, default=2, help="of each model in a run of --experts")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.runs < 2:
        parser.error("--runs must be 2 or more: growth is that since the second run")
    for folder, option in ((args.comfyui, "--comfyui"), (args.wrapper, "--wrapper")):
        if not folder.is_dir():
            parser.error(f"{folder} is not there; name the folder with {option}")
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    if not args.experts:  # where each run would have lines of its own
        logging.getLogger("intelligent_vram").setLevel(logging.INFO)
    config = WanConfig(
        dim=args.dim,
        ffn_dim=args.ffn_dim,
        num_heads=args.heads,
        num_layers=args.blocks or (4 if args.experts else 12),
        text_len=args.text_tokens,
    )
    with torch.inference_mode():
        wrapper = Wrapper(args.comfyui, args.wrapper, torch.device(args.device))
        result = (experts if args.experts else timings)(args, wrapper, config)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": facts(args.device).name, **result}, file, indent=1)
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
