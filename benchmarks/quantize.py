"""FP8 and INT8: conversion of a 14B file, speed and error against what ComfyUI and torchao have, and streamed.

    python benchmarks/quantize.py convert [--blocks 40]
    python benchmarks/quantize.py compute [--tokens 32760]
    python benchmarks/quantize.py stream [--tokens 1024 7800 32760]

Writes checkpoints of Wan 14B's block size with random weights to a temporary folder (28 GB with 40 blocks) and runs them through
ComfyUI's own loading and sampling in this process (``COMFYUI_PATH``, else ~/comfy/ComfyUI). Errors are those of a forward
against the bf16 model, norm over norm.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from intelligent_vram.cli.wan import WAN_14B, WanConfig, latent_shape_for_tokens, meta_model, random_weights
from intelligent_vram.quant.convert import into_file, into_memory, plan_conversion
from intelligent_vram.quant.write import writing
from intelligent_vram.vram import SwapConfig
from intelligent_vram.vram.device import host_to_device_bandwidth
from intelligent_vram.vram.units import GIB, MIB
from wanvideo_host import default_paths

FORMATS = ("fp8_e4m3fn", "int8")
PIECE = 16 * MIB
READERS = 4


def write_checkpoint(path: Path, config: WanConfig, device: torch.device) -> None:
    """A bf16 checkpoint with seeded weights."""
    names = {name: ("bfloat16", tuple(weight.shape)) for name, weight in meta_model(config).named_parameters()}
    with writing(path, names, {}) as put:
        for name, weight in random_weights(config, torch.bfloat16, 0, device):
            put(name, weight.cpu())


# -- conversion --------------------------------------------------------------------------------------------------------


@contextmanager
def peaks(device: torch.device) -> Iterator[dict[str, int]]:
    """The most that RAM of this process and torch's device memory rise meanwhile, in bytes."""
    process, found, done = psutil.Process(), {"ram": 0, "vram": 0}, threading.Event()
    gc.collect()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.01):
            found["ram"] = max(found["ram"], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_reserved(device)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        if device.type == "cuda":
            found["vram"] = torch.cuda.max_memory_reserved(device) - held


def forget_cached() -> bool:
    """Drop the system's cache of files, so that reading reads the disk; False where that is not allowed."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def read_speed(path: Path) -> float:
    """Bytes per second of reading ``path`` with as many threads as the conversion has, and doing nothing with it."""
    size, taken, lock = path.stat().st_size, iter(range(0, path.stat().st_size, PIECE)), threading.Lock()

    def read() -> None:
        buffer = bytearray(PIECE)
        with path.open("rb", buffering=0) as file:
            while True:
                with lock:
                    start = next(taken, None)
                if start is None:
                    return
                file.seek(start)
                file.readinto(buffer)

    threads = [threading.Thread(target=read) for _ in range(READERS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return size / (time.perf_counter() - started)


def convert(folder: Path, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time, RAM and VRAM of a conversion, beside the speed of reading."""
    path = folder / "bf16.safetensors"
    write_checkpoint(path, wan(args), device)
    rows = []
    for format in args.formats:
        conversion = plan_conversion(path, format)
        for how in ("memory", "file"):
            cold = forget_cached()
            disk = read_speed(path)
            forget_cached()
            with peaks(device) as found:
                started = time.perf_counter()
                if how == "memory":
                    made: Any = into_memory(conversion, device)
                else:
                    made = into_file(conversion, folder / f"{format}.safetensors", device)
                seconds = time.perf_counter() - started
            if how == "file":
                made.unlink()
            del made
            row = {
                "format": format,
                "into": how,
                "source": conversion.source_nbytes,
                "result": conversion.nbytes,
                "seconds": seconds,
                "read": conversion.source_nbytes / seconds,
                "disk": disk,
                "cold": cold,
                **found,
            }
            rows.append(row)
            print(
                f"{format:12s} into {how:6s}: {row['source'] / 1e9:.1f} GB to {row['result'] / 1e9:.1f} GB in {seconds:.1f} s, "
                f"{row['read'] / 1e9:.2f} GB/s (reading alone {disk / 1e9:.2f}{'' if cold else ', cached'}); RAM "
                f"+{found['ram'] / GIB:.2f} GiB, VRAM +{found['vram'] / GIB:.2f} GiB",
                flush=True,
            )
    return rows


# -- forwards ----------------------------------------------------------------------------------------------------------


class Host:
    """ComfyUI in this process."""

    def __init__(self, device: torch.device) -> None:
        sys.path.insert(0, str(default_paths()[0].absolute()))
        if device.type == "cpu":
            importlib.import_module("comfy.cli_args").args.cpu = True
        self.sd = importlib.import_module("comfy.sd")
        self.sample = importlib.import_module("comfy.sample")
        self.management = importlib.import_module("comfy.model_management")
        self.device = device

    def load(self, path: Path, **options: Any) -> Any:
        """The MODEL of a file, without dynamic VRAM."""
        return self.sd.load_diffusion_model(str(path), model_options=options, disable_dynamic=True)

    def run(self, model: Any, tokens: int, forwards: int) -> tuple[torch.Tensor, list[float]]:
        """The output of the first forward, and the seconds of each."""
        outputs: list[torch.Tensor] = []
        marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        def before(*_: Any) -> None:
            marks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            marks[-1][0].record()

        def after(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            marks[-1][1].record()
            if not outputs:
                outputs.append(output.float().cpu())

        transformer = model.model.diffusion_model
        hooks = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
        latent = torch.zeros(1, 16, *latent_shape_for_tokens(tokens))
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        text = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(1)), {}]]
        try:
            self.sample.sample(
                model, noise, forwards, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=0
            )
        finally:
            for hook in hooks:
                hook.remove()
        torch.cuda.synchronize()
        return outputs[0], [begin.elapsed_time(end) / 1000 for begin, end in marks]

    def clear(self) -> None:
        self.management.unload_all_models()
        gc.collect()
        torch.cuda.empty_cache()


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


def compute(folder: Path, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Resident: seconds, memory and error of each way to hold the weights."""
    host, path = Host(device), folder / "bf16.safetensors"
    write_checkpoint(path, wan(args), device)
    ways: dict[str, Callable[[], Any]] = {"bf16": lambda: host.load(path)}
    layers: set[str] = set()
    for name, format, tensor_cores in (
        ("FP8, tensor cores", "fp8_e4m3fn", True),
        ("FP8, dequantized", "fp8_e4m3fn", False),
        ("INT8", "int8", True),
        ("INT8, ConvRot", "int8_convrot", True),
    ):
        conversion = plan_conversion(path, format, tensor_cores=tensor_cores)
        layers |= {weight.removesuffix(".weight") for weight in conversion.quantized}
        made = into_file(conversion, folder / f"{format}-{tensor_cores}.safetensors", device)
        ways[name] = lambda made=made: host.load(made)
    ways["ComfyUI's fp8_e4m3fn_fast"] = lambda: host.load(path, dtype=torch.float8_e4m3fn, fp8_optimizations=True)
    ways["ComfyUI's fp8_e4m3fn"] = lambda: host.load(path, dtype=torch.float8_e4m3fn)
    for name, config in (
        ("torchao INT8, weights only", "Int8WeightOnlyConfig"),
        ("torchao INT8, dynamic", "Int8DynamicActivationInt8WeightConfig"),
    ):
        ways[name] = lambda config=config: torchao(host, path, config, layers)
    reference, rows = {}, []
    for name, make in ways.items():
        for tokens in args.tokens:
            try:
                rows.append(measure(host, make, name, tokens, reference))
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return rows


def measure(host: Host, make: Callable[[], Any], name: str, tokens: int, reference: dict[int, Any]) -> dict[str, Any]:
    """One way at one size."""
    host.clear()
    torch.cuda.reset_peak_memory_stats()
    model = make()
    output, seconds = host.run(model, tokens, 6)
    peak = torch.cuda.max_memory_reserved()
    median = statistics.median(seconds[2:])
    reference.setdefault(tokens, (output, median))
    row = {
        "name": name,
        "tokens": tokens,
        "seconds": median,
        "speedup": reference[tokens][1] / median,
        "peak": peak,
        "held": torch.cuda.memory_allocated(),
        "error": relative(output, reference[tokens][0]),
    }
    print(
        f"{name:28s} {tokens:6d} tokens: {median:.4f} s ({row['speedup']:.2f} of bf16's speed), error {row['error']:.5f}, "
        f"{row['held'] / GIB:.2f} GiB held, peak {peak / GIB:.2f} GiB",
        flush=True,
    )
    del model
    host.clear()
    return row


def torchao(host: Host, path: Path, config: str, layers: set[str]) -> Any:
    """The bf16 model with the same layers quantized by torchao, on the device."""
    from torchao import quantization

    model = host.load(path)
    host.management.load_models_gpu([model])
    quantization.quantize_(
        model.model.diffusion_model,
        getattr(quantization, config)(),
        filter_fn=lambda module, name: name in layers,
    )
    return model


def stream(folder: Path, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every block streamed, over the floor."""
    host, path = Host(device), folder / "bf16.safetensors"
    engine = importlib.import_module("intelligent_vram.vram.hosts.comfy")  # needs ComfyUI's modules, which Host finds
    config = wan(args)
    write_checkpoint(path, config, device)
    bandwidth, rows = host_to_device_bandwidth(device), []
    files = {
        format: into_file(plan_conversion(path, format), folder / f"{format}.st.safetensors", device)
        for format in args.formats
    }
    for format, file in {"bf16": path, **files}.items():
        for tokens in args.tokens:
            host.clear()
            resident = host.load(file)
            expected, alone = host.run(resident, tokens, 6)
            del resident
            host.clear()
            streamed = engine.wrap(
                host.load(file), SwapConfig(streamed_blocks=config.num_layers, max_vram=40 * GIB, lossless="off")
            )
            output, seconds = host.run(streamed, tokens, 8)
            taken, computed = statistics.median(seconds[3:]), statistics.median(alone[2:])
            nbytes = streamed.swap.plan.streamed_bytes
            floor = max(computed, nbytes / bandwidth)
            rows.append(
                {
                    "format": format,
                    "tokens": tokens,
                    "seconds": taken,
                    "compute": computed,
                    "bytes": nbytes,
                    "floor": floor,
                }
            )
            print(
                f"{format:12s} {tokens:6d} tokens: {taken:.4f} s, {taken / floor:.3f} of the floor {floor:.4f} s (compute {computed:.4f}, "
                f"{nbytes / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s); {'equal' if torch.equal(output, expected) else 'NOT EQUAL'}",
                flush=True,
            )
            streamed.detach()
            del streamed
            host.clear()
    return rows


def wan(args: argparse.Namespace) -> WanConfig:
    return WanConfig(dim=args.dim, ffn_dim=args.ffn_dim, num_heads=args.heads, num_layers=args.blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("convert", "compute", "stream"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=None, help="40 for convert, else 12")
    parser.add_argument("--dim", type=int, default=WAN_14B.dim)
    parser.add_argument("--ffn-dim", type=int, default=WAN_14B.ffn_dim)
    parser.add_argument("--heads", type=int, default=WAN_14B.num_heads)
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--folder", help="where the checkpoints go, instead of the system's temporary folder")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.blocks = args.blocks or (40 if args.what == "convert" else 12)
    args.tokens = args.tokens or ([32760] if args.what == "compute" else [1024, 7800, 32760])
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.inference_mode():
        rows = {"convert": convert, "compute": compute, "stream": stream}[args.what](
            Path(folder), args, torch.device(args.device)
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
