"""``intelligent-vram demo``: the main job without ComfyUI, on a small model of Wan's architecture."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..vram import LimitTooSmall, Swap, SwapConfig, attach, snapshot
from ..vram.device import facts, host_to_device_bandwidth, resolve
from ..vram.plan import MODES
from ..vram.units import GIB, MIB, format_bytes
from .timeline import Interval, draw_timeline
from .wan import WAN_14B, WanConfig, WanModel, load_checkpoint, sample_inputs, write_checkpoint

FORWARDS = 4


@dataclass(frozen=True)
class Resident:
    """The model computed with all weights on the device: what a streamed forward is compared with."""

    output: torch.Tensor
    seconds: float
    peak_bytes: int


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="stream a small Wan-architecture model under a VRAM limit and check the result",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--vram", type=float, metavar="GIB", help="the limit; by default one that half the weights fit")
    parser.add_argument("--mode", choices=MODES, default="adaptive")
    parser.add_argument("--block-size", type=float, metavar="MIB", help="how much is moved at once")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; by default the GPU if there is one")
    parser.add_argument("--tokens", type=int, default=1024, help="video tokens of a forward (default 1024)")
    parser.add_argument("--layers", type=int, help="number of blocks")
    parser.add_argument(
        "--size", choices=("small", "14b"), default="small", help="block size: a small model or Wan 14B"
    )
    parser.add_argument("--png", type=Path, default=Path("timeline.png"), help="where to draw the timeline")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Stream, compare, print, draw. Exit code 1 when not identical or over the limit, 2 when the limit cannot do."""
    device = resolve(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = WanConfig.small() if args.size == "small" else WAN_14B
    if args.layers is not None:
        config = replace(config, num_layers=args.layers)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "wan.safetensors"
        write_checkpoint(config, path, torch.bfloat16, seed=0, progress=not args.json)
        inputs = sample_inputs(config, args.tokens, torch.bfloat16, device, seed=1)
        resident = compute_resident(load_checkpoint(path, config), inputs, device)
        model = load_checkpoint(path, config)
        try:
            return _stream(args, model, inputs, resident, device)
        except (LimitTooSmall, torch.OutOfMemoryError) as error:
            print(error, file=sys.stderr)
            return 2


def compute_resident(model: WanModel, inputs: tuple[torch.Tensor, ...], device: torch.device) -> Resident:
    """One forward with all weights on ``device``, and the median time of three more."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = model.to(device)
    output = model(*inputs)
    seconds = []
    for _ in range(3):
        begin, end = Clock(device), Clock(device)
        begin.record()
        model(*inputs)
        end.record()
        seconds.append(begin.seconds_to(end))
    peak = snapshot(device).peak_reserved or sum(p.nbytes for p in model.parameters())
    return Resident(output, statistics.median(seconds), peak)


class Clock:
    """A moment at which the device had done everything before it."""

    def __init__(self, device: torch.device) -> None:
        from ..vram.link import open_link

        self._device = device
        self._event = open_link(device).event()

    def record(self) -> None:
        """Now, once the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._event.record(torch.cuda.current_stream(self._device))
            torch.cuda.synchronize(self._device)
        else:
            self._event.record()

    def seconds_to(self, other: Clock) -> float:
        return self._event.elapsed_time(other._event) / 1000


def default_limit(model: WanModel, resident: Resident, device: torch.device) -> int:
    """A limit under which about half of the weights have to stream: what the resident forward took, less half of them."""
    weights = sum(p.nbytes for p in model.parameters())
    return snapshot(device).outside_torch + max(resident.peak_bytes, weights) - weights // 2


def _stream(
    args: argparse.Namespace,
    model: WanModel,
    inputs: tuple[torch.Tensor, ...],
    resident: Resident,
    device: torch.device,
) -> int:
    limit = round(args.vram * GIB) if args.vram is not None else default_limit(model, resident, device)
    block_size = round(args.block_size * MIB) if args.block_size is not None else _unit_size(args, model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    swap = attach(model, SwapConfig(max_vram=limit, mode=args.mode, block_size=block_size), device)
    peak, identical = 0, True
    for _ in range(FORWARDS):
        identical = torch.equal(model(*inputs), resident.output) and identical
        peak = max(peak, snapshot(device).peak_reserved or swap.telemetry.last(wait=True).peak_bytes)
    result = _result(args, swap, resident, peak, limit, identical)
    _draw(args, swap, resident)
    swap.detach()
    identical = torch.equal(model.to(device)(*inputs), resident.output) and identical
    result["identical"] = identical
    print(json.dumps(result) if args.json else _text(result))
    return 0 if identical and peak <= limit else 1


def _unit_size(args: argparse.Namespace, model: WanModel) -> int:
    """300 MiB, or half a block of a model whose blocks are smaller than that."""
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    return min(300 * MIB, max(1, block // 2)) if args.size == "small" else 300 * MIB


def _result(
    args: argparse.Namespace, swap: Swap, resident: Resident, peak: int, limit: int, identical: bool
) -> dict[str, Any]:
    record = swap.telemetry.last(wait=True)
    bandwidth = host_to_device_bandwidth(swap.device)
    floor = max(resident.seconds, record.streamed_bytes / bandwidth)
    return {
        "device": facts(swap.device).name,
        "mode": args.mode,
        "identical": identical,
        "limit_bytes": limit,
        "peak_bytes": peak,
        "weights_bytes": swap.packed.packed_bytes + swap.rest_bytes,
        "streamed_bytes": record.streamed_bytes,
        "resident_forward_seconds": resident.seconds,
        "floor_seconds": floor,
        "forward_seconds": record.seconds,
        "compute_seconds": record.compute,
        "stall_seconds": record.stall,
        "bandwidth_bytes_per_second": bandwidth,
        "setup_seconds": swap.setup_seconds,
        "plan": swap.plan.describe(),
        "timeline": str(args.png),
    }


def _text(result: dict[str, Any]) -> str:
    over = "within" if result["peak_bytes"] <= result["limit_bytes"] else "OVER"
    counted = "reserved by torch" if result["device"] != "CPU" else "of weights in the compute device's memory"
    return "\n".join(
        [
            f"device    {result['device']}, page-locked copies at {result['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s",
            f"plan      {result['plan']}",
            f"forward   {result['forward_seconds'] * 1000:.1f} ms: compute {result['compute_seconds'] * 1000:.1f} ms, waiting "
            f"for copies {result['stall_seconds'] * 1000:.1f} ms, {format_bytes(result['streamed_bytes'])} streamed",
            f"floor     {result['floor_seconds'] * 1000:.1f} ms (all weights resident: "
            f"{result['resident_forward_seconds'] * 1000:.1f} ms)",
            f"memory    peak {format_bytes(result['peak_bytes'])} {counted}, {over} the limit of "
            f"{format_bytes(result['limit_bytes'])}; the weights are {format_bytes(result['weights_bytes'])}",
            "output    " + ("equal to the resident forward to the bit" if result["identical"] else "DIFFERENT"),
            f"timeline  {result['timeline']}",
        ]
    )


def _draw(args: argparse.Namespace, swap: Swap, resident: Resident) -> None:
    record = swap.telemetry.last(wait=True)
    names = [f"unit {unit}" for unit in range(len(swap.plan.units))]
    copies = [Interval(names[copy.unit], copy.start, copy.end) for copy in record.copies]
    computes = [
        Interval(
            names[span.unit], span.start, record.arrivals[index + 1] if index + 1 < len(record.units) else span.end
        )
        for index, span in enumerate(record.units)
    ]
    if not computes:
        computes = [Interval("all units", 0.0, record.seconds)]
    draw_timeline(
        copies,
        computes,
        args.png,
        title=f"One forward of {type(swap.root).__name__}, {args.mode}, on {facts(swap.device).name}",
        footer=f"{swap.plan.describe()}; forward {record.seconds * 1000:.1f} ms, all weights resident "
        f"{resident.seconds * 1000:.1f} ms",
    )
