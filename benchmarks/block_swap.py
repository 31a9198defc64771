"""Block swap at Wan 14B block size: against the resident model, the floor, and diffusers' group offloading.

    python benchmarks/block_swap.py [--layers 12] [--tokens 1024 7800 32760] [--json FILE]

Everything is measured in one process on the same weights and inputs. The floor of a configuration is
max(compute-only time, bytes it streams / page-locked bandwidth), the latter measured just before it: a machine that is shared
has a link that changes by some percent within minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from intelligent_vram.cli.wan import WAN_14B, WanModel, random_model, sample_inputs
from intelligent_vram.vram import Swap, SwapConfig, attach, snapshot
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.units import GIB, MIB
from measure import Measured, copy_bandwidth, forwards, reset_peaks, synchronize

PEERS = ("block_level", "leaf_level")


def configurations(layers: int, block_size: int) -> dict[str, SwapConfig]:
    """What is measured of this pack, by name."""
    chunk = SwapConfig(mode="chunkwise", block_size=block_size, lossless="off")
    return {
        "every block streamed": replace(chunk, streamed_blocks=layers),
        "every second block streamed": replace(chunk, streamed_blocks=layers // 2),
        "layerwise, everything streamed": SwapConfig(mode="layerwise", lossless="off"),
    }


class Bench:
    """One model size on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.config = replace(WAN_14B, num_layers=args.layers)
        self.rows: list[dict[str, object]] = []
        self.inputs = {
            tokens: sample_inputs(self.config, tokens, torch.bfloat16, self.device, seed=1) for tokens in args.tokens
        }
        self.reference: dict[int, torch.Tensor] = {}
        self.compute: dict[int, float] = {}
        self.resident_seconds: dict[int, list[float]] = {tokens: [] for tokens in args.tokens}
        self.bandwidth = 0.0

    def model(self) -> WanModel:
        """The model in host memory; the same weights each time."""
        return random_model(self.config, torch.bfloat16, seed=0)

    def cells(self, model: WanModel) -> Iterator[tuple[int, Measured, bool]]:
        """Measure the model as it stands at each token count: (tokens, figures, output equal to the resident one)."""
        for tokens, inputs in self.inputs.items():
            reset_peaks(self.device)
            same = True
            for _ in range(3):
                output = model(*inputs)
                if tokens in self.reference:
                    same = same and torch.equal(output, self.reference[tokens])
                else:
                    self.reference[tokens] = output
                del output
            per_group = 5 if tokens < 20_000 else 2
            yield tokens, forwards(lambda: model(*inputs), self.device, self.args.groups, per_group), same  # noqa: B023

    def fitting_cells(self, model: WanModel) -> Iterator[tuple[int, Measured, bool]]:
        """``cells`` up to the first that does not fit the limit, which is said."""
        try:
            yield from self.cells(model)
        except torch.OutOfMemoryError as error:
            print("    does not fit:", str(error)[:160], flush=True)

    def add(self, name: str, setup: float, streamed: int, cells: Iterator, more: Callable[[], dict]) -> None:
        """Measure a row for each token count and print it."""
        for tokens, measured, same in cells:
            if name.startswith("resident"):
                self.resident_seconds[tokens].append(measured.seconds)
                self.compute[tokens] = statistics.mean(self.resident_seconds[tokens])
            floor = max(self.compute[tokens], streamed / self.bandwidth)
            row: dict[str, object] = {
                "name": name,
                "tokens": tokens,
                "seconds": measured.seconds,
                "spread": measured.spread,
                "bandwidth": self.bandwidth,
                "floor": floor,
                "over_floor": measured.seconds / floor,
                "identical": same,
                "peak_allocated": measured.peak_allocated,
                "peak_reserved": measured.peak_reserved,
                "setup": setup,
                "streamed_bytes": streamed,
                **more(),
            }
            self.rows.append(row)
            extra = "".join(f", {key} {value:.4g}" for key, value in row.items() if key in ("host_us", "stall"))
            print(
                f"{name:34s} {tokens:6d}: {measured.seconds:.4f} s, {row['over_floor']:.3f} of floor, spread "
                f"{measured.spread:.4f}, peak {measured.peak_allocated / GIB:.2f}/{measured.peak_reserved / GIB:.2f} GiB, "
                f"set-up {setup:.2f} s, {'identical' if same else 'DIFFERENT'}{extra}",
                flush=True,
            )

    def measure_link(self) -> None:
        """The page-locked bandwidth now, for what is measured next."""
        self.bandwidth = copy_bandwidth(self.device, 512 * MIB)
        print(f"page-locked bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def resident(self, name: str) -> None:
        """Compute only; its outputs are what all others are compared with. Measured first and last, because a card slows
        down as it gets warm: the floor is the mean."""
        self.measure_link()
        model = self.model().to(self.device)
        self.add(name, 0.0, 0, self.cells(model), dict)

    def table(self) -> None:
        """The rows with their final floors."""
        print(f"\n{'':36s}" + "".join(f"{tokens:>26d}" for tokens in self.inputs))
        names = dict.fromkeys(str(row["name"]) for row in self.rows)
        for name in names:
            cells = []
            for row in (row for row in self.rows if row["name"] == name):
                row["floor"] = max(self.compute[row["tokens"]], row["streamed_bytes"] / row["bandwidth"])
                row["over_floor"] = row["seconds"] / row["floor"]
                peaks = f"{row['peak_allocated'] / GIB:.2f}/{row['peak_reserved'] / GIB:.2f}"
                cells.append(f"{row['seconds']:.4f} {row['over_floor']:.3f} {peaks}")
            print(f"{name:36s}" + "".join(f"{cell:>26s}" for cell in cells))

    def ours(self, name: str, config: SwapConfig) -> None:
        """One configuration of this pack."""
        self.measure_link()
        model = self.model()
        synchronize(self.device)
        start = time.perf_counter()
        swap = attach(model, config, self.device)
        synchronize(self.device)
        setup = time.perf_counter() - start
        host_us = self.host_microseconds(model, swap)

        def more() -> dict[str, float]:
            records = swap.telemetry.records(wait=True)[-8:]
            return {
                "host_us": host_us,
                "stall": statistics.median(record.stall for record in records),
                "misses": records[-1].misses,
                "arena_over_weights": swap.packed.host_bytes / sum(layer.layer.nbytes for layer in swap.packed.layers),
                "plan": swap.plan.describe(),
            }

        streamed = swap.plan.streamed_bytes
        self.add(name, setup, streamed, self.cells(model), more)
        swap.detach()

    def host_microseconds(self, model: WanModel, swap: Swap) -> float:
        """The engine's own host code per streamed unit and forward: the median of forwards that are waited for one by one,
        because a host that runs far ahead waits inside the driver."""
        inputs = self.inputs[min(self.inputs)]
        per_unit = []
        for turn in range(8):
            model(*inputs)
            synchronize(self.device)
            record = swap.telemetry.last(wait=True)
            if turn > 2 and record.units:
                per_unit.append(1e6 * record.host_seconds / len(record.units))
        return statistics.median(per_unit) if per_unit else 0.0

    def limited(self, mode: str, gib: float) -> None:
        """A mode under a limit: the floor is that of the bytes it ends up streaming at each token count."""
        self.measure_link()
        model = self.model()
        start = time.perf_counter()
        config = SwapConfig(mode=mode, max_vram=round(gib * GIB), block_size=self.args.block_size * MIB, lossless="off")
        swap = attach(model, config, self.device)
        setup = time.perf_counter() - start
        outside = snapshot(self.device).outside_torch
        for cell in self.fitting_cells(model):
            self.add(
                f"{mode}, limit {gib:g} GiB",
                setup,
                swap.plan.streamed_bytes,
                iter([cell]),
                lambda: {"plan": swap.plan.describe(), "limit": swap.limit, "outside_torch": outside},
            )
            over = self.rows[-1]["peak_reserved"] + outside > swap.limit
            print("   ", swap.plan.describe(), "OVER THE LIMIT" if over else "within the limit", flush=True)
            self.rows[-1]["within_limit"] = not over
        swap.detach()

    def diffusers(self, kind: str) -> None:
        """diffusers' group offloading with a stream."""
        from diffusers.hooks import apply_group_offloading

        self.measure_link()
        model = self.model()
        start = time.perf_counter()
        apply_group_offloading(
            model,
            onload_device=self.device,
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            use_stream=True,
        )
        synchronize(self.device)
        setup = time.perf_counter() - start
        streamed = sum(p.nbytes for p in (model if kind == "leaf_level" else model.blocks).parameters())
        self.add(f"diffusers {kind}", setup, streamed, self.cells(model), dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 7800, 32760])
    parser.add_argument("--block-size", type=int, default=300, help="MiB")
    parser.add_argument("--groups", type=int, default=5, help="measured groups of forwards, of which the median counts")
    parser.add_argument("--limits", type=float, nargs="*", default=[6.0], help="GiB, for adaptive mode")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--only", help="only configurations whose name contains this")
    parser.add_argument("--json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with torch.inference_mode():
        bench = Bench(args)
        bench.resident("resident")
        for name, config in configurations(args.layers, args.block_size * MIB).items():
            if args.only is None or args.only in name:
                bench.ours(name, config)
        for gib in args.limits:
            for mode in MODES:
                bench.limited(mode, gib)
        if not args.skip_peers:
            for kind in PEERS:
                bench.diffusers(kind)
        bench.resident("resident again")
    bench.table()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(args.device), "rows": bench.rows}, file, indent=1)
    ours = [row for row in bench.rows if not str(row["name"]).startswith("diffusers")]
    return 0 if all(row["identical"] and row.get("within_limit", True) for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
