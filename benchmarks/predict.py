"""Predicted against measured: device memory and time of a forward, in ComfyUI and in WanVideoWrapper, bf16 and FP8.

    python benchmarks/predict.py [--blocks 12] [--tokens 1024 7800 32760] [--limits 6.5 8 10] [--json FILE]
    python benchmarks/predict.py --sweep [--limits 6.5] [--tokens 1024 7800]

Writes a Wan model of 14B's block size with random weights (9 GB, and 4.7 GB in FP8) to a temporary folder and runs it
through each host's own loading and sampling in this process. The prediction is made before a model is loaded, from the
file's header and the measured card, at the same limit. With --sweep the automatic plan is compared with every number of
streamed blocks that the limit holds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from intelligent_vram.cli.wan import WAN_14B, WanConfig, latent_shape_for_tokens
from intelligent_vram.tests.host.wanvideo import scaled_fp8
from intelligent_vram.vram import SwapConfig, hardware
from intelligent_vram.vram.advise import Wishes, advise
from intelligent_vram.vram.hosts.traits import COMFY, WANVIDEO
from intelligent_vram.vram.memory import snapshot
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.plan import LimitTooSmall
from intelligent_vram.vram.swap import Swap
from intelligent_vram.vram.units import GIB
from safetensors.torch import load_file, save_file
from wanvideo_host import ATTRIBUTES, NAME, Inputs, Run, Wrapper, default_paths, host_weights


def forwards(tokens: int) -> int:
    """Of a run, the last half of which is measured: many where one takes little."""
    return 24 if tokens < 4096 else 8


@dataclass
class Row:
    """One run. Bytes and seconds; None where it was predicted, or turned out, not to fit."""

    host: str
    dtype: str
    tokens: int
    limit: int
    predicted_peak: int | None
    peak: int | None
    predicted_seconds: float | None
    seconds: float | None


def measured(swap: Swap, device: torch.device) -> tuple[int, float]:
    """Peak of the process' device memory, and seconds of a forward, over the later half of the forwards of a run."""
    records = swap.telemetry.records(wait=True)
    records = records[len(records) // 2 :]
    outside = snapshot(device).outside_torch
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else swap.device_bytes
    return reserved + outside, statistics.median(record.seconds for record in records)


class Hosts:
    """Both hosts in this process, and runs of a model file in them."""

    def __init__(self, folder: Path, config: WanConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        weights = host_weights(config)
        quantized = scaled_fp8(weights)
        self.files = {"bf16": folder / "bf16.safetensors", "fp8": folder / "fp8.safetensors"}
        save_file(weights, self.files["bf16"])
        save_file(quantized, self.files["fp8"])
        self.wrapper = Wrapper(*default_paths(), device)

    def comfyui(self, dtype: str, tokens: int, config: SwapConfig) -> tuple[int, float]:
        """A run of ComfyUI's own sampler."""
        import comfy.model_management
        import comfy.sample
        import comfy.sd
        from intelligent_vram.vram.hosts import comfy as host

        model = comfy.sd.load_diffusion_model(str(self.files[dtype]))
        patcher = host.wrap(model, config)
        latent = torch.zeros(1, 16, *latent_shape_for_tokens(tokens))
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        text = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(1)), {}]]
        try:
            comfy.sample.sample(
                patcher, noise, forwards(tokens), 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=0
            )
            return measured(patcher.swap, self.device)
        finally:
            comfy.model_management.unload_all_models()
            patcher.detach()

    def wanvideo(self, dtype: str, tokens: int, config: SwapConfig) -> tuple[int, float]:
        """A run of WanVideoWrapper's model, as its sampler drives it."""
        from intelligent_vram.vram.hosts import wanvideo as host

        weights = load_file(self.files[dtype])
        transformer = self.wrapper.model(self.config)
        managed, arguments = host.manage(transformer), host.arguments(config)
        try:
            if dtype == "bf16":
                run = Run(self.wrapper, transformer, weights, arguments)
            else:
                run = self._scaled(transformer, weights, arguments)
            inputs = Inputs.sample(self.config, tokens, self.device)
            for _ in range(forwards(tokens)):
                run.forward(inputs)
            figures = measured(managed.swap, self.device)
            run.end()
            return figures
        finally:
            managed.release()

    def _scaled(self, transformer: torch.nn.Module, weights: dict[str, torch.Tensor], arguments: dict[str, Any]) -> Run:
        """A run with scaled FP8 weights: the wrapper's loader puts its own linear layers in first."""
        scales = {key: weights.pop(key).to(self.device) for key in [*weights] if key.endswith("scale_weight")}
        weights.pop("scaled_fp8")
        replace = import_module(f"{NAME}.custom_linear")._replace_linear
        replace(transformer, torch.bfloat16, weights, scale_weights=scales)
        transformer.patched_linear = True
        run = Run.__new__(Run)
        run.wrapper, run.transformer = self.wrapper, transformer
        run.options = copy.deepcopy({"merge_loras": False, "block_swap_args": arguments})
        own = run.options["block_swap_args"]
        for name, default in ATTRIBUTES.items():
            setattr(transformer, name, own.get(name, default))
        self.wrapper._loading.load_weights(
            transformer,
            weights,
            torch.float8_e4m3fn,
            base_dtype=torch.bfloat16,
            transformer_load_device=self.device,
            block_swap_args=own,
        )
        self.wrapper._utils.init_blockswap(transformer, own, {"auto_cpu_offload": False})
        return run


def attempt(run: Callable[..., tuple[int, float]], *arguments: Any) -> tuple[int, float] | None:
    """The figures of a run, None where it does not fit."""
    try:
        return run(*arguments)
    except (LimitTooSmall, torch.OutOfMemoryError) as error:
        logging.getLogger(__name__).info("it does not fit: %s", error)
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def accuracy(hosts: Hosts, args: argparse.Namespace) -> list[Row]:
    """All runs, each predicted before."""
    from intelligent_vram.vram.hosts.planning import measure

    rows = []
    for name, run in ((COMFY, hosts.comfyui), (WANVIDEO, hosts.wanvideo)):
        for dtype, file in hosts.files.items():
            attempt(
                run, dtype, min(args.tokens), SwapConfig(lossless="off")
            )  # loads kernels, which are device memory too
            for tokens in args.tokens:
                for limit in (int(limit * GIB) for limit in args.limits):
                    card, attention = measure(name)
                    try:
                        wishes = Wishes(max_vram=limit)
                        advice = advise(read_model(file), card, wishes, tokens, name, attention)
                        predicted, config = advice.prediction, advice.config
                    except LimitTooSmall:
                        predicted, config = None, SwapConfig(max_vram=limit, lossless="off")
                    figures = attempt(run, dtype, tokens, config)
                    row = Row(
                        name,
                        dtype,
                        tokens,
                        limit,
                        predicted and predicted.peak,
                        figures and figures[0],
                        predicted and predicted.seconds,
                        figures and figures[1],
                    )
                    rows.append(row)
                    print(described(row), flush=True)
    return rows


def described(row: Row) -> str:
    """A line of the table."""
    begin = f"{row.host:16s} {row.dtype} {row.tokens:6d} tokens, limit {row.limit / GIB:5.2f} GiB: "
    if row.peak is None or row.predicted_peak is None:
        return (
            begin + f"predicted {'to fit' if row.predicted_peak else 'not to fit'}, {'did' if row.peak else 'did not'}"
        )
    return begin + (
        f"peak {row.predicted_peak / GIB:.2f} predicted, {row.peak / GIB:.2f} GiB measured "
        f"({row.predicted_peak / row.peak - 1:+.1%}); {row.predicted_seconds:.4f} predicted, {row.seconds:.4f} s "
        f"({row.predicted_seconds / row.seconds - 1:+.1%})"
    )


def sweep(hosts: Hosts, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The automatic plan against every number of streamed blocks, at the first limit."""
    limit = int(args.limits[0] * GIB)
    results = []
    for tokens in args.tokens:
        automatic = attempt(hosts.wanvideo, "bf16", tokens, SwapConfig(max_vram=limit, lossless="off"))
        times: dict[int, float] = {}
        for count in range(hosts.config.num_layers + 1):
            figures = attempt(
                hosts.wanvideo, "bf16", tokens, SwapConfig(max_vram=limit, streamed_blocks=count, lossless="off")
            )
            if figures is not None:
                times[count] = figures[1]
        best = min(times, key=times.__getitem__)
        print(
            f"{tokens:6d} tokens, limit {limit / GIB:.2f} GiB: automatic {automatic[1]:.4f} s, best of a sweep "
            f"{times[best]:.4f} s with {best} blocks streamed ({automatic[1] / times[best]:.3f}); all: "
            + ", ".join(f"{count}: {seconds:.4f}" for count, seconds in times.items()),
            flush=True,
        )
        results.append({"tokens": tokens, "limit": limit, "automatic": automatic[1], "sweep": times})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--dim", type=int, default=WAN_14B.dim)
    parser.add_argument("--ffn-dim", type=int, default=WAN_14B.ffn_dim)
    parser.add_argument("--heads", type=int, default=WAN_14B.num_heads)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 7800, 32760])
    parser.add_argument("--limits", type=float, nargs="+", default=[6.5, 8.0, 10.0], help="GiB")
    parser.add_argument("--json")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    config = WanConfig(dim=args.dim, ffn_dim=args.ffn_dim, num_heads=args.heads, num_layers=args.blocks)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        hosts = Hosts(Path(folder), config, torch.device(args.device))
        print("\n".join(hardware.measure(args.device).describe()), flush=True)
        result = sweep(hosts, args) if args.sweep else [vars(row) for row in accuracy(hosts, args)]
    if args.json:
        Path(args.json).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
