"""Milliseconds from the name of a file of 28 GB to a plan: reading its header, and choosing limit and plan.

    python benchmarks/planning.py [--repeats 9]

The file is a Wan 14B checkpoint of which only the header is real. The card is looked up, so nothing is measured on a device.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from intelligent_vram.cli.wan import WAN_14B, meta_model
from intelligent_vram.tests.engine.test_model_facts import write_sparse
from intelligent_vram.vram import hardware, plan
from intelligent_vram.vram.advise import Wishes, advise
from intelligent_vram.vram.hosts.traits import HOSTS
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.units import GIB, MIB


def once(path: Path, card: hardware.Hardware, host: str, limit: int | None) -> tuple[float, float]:
    """Seconds of reading and of planning, as the first time in a process."""
    for cache in (plan._runs, plan._cut, plan._fitting):
        cache.cache_clear()
    started = time.perf_counter()
    facts = read_model(path)
    read = time.perf_counter()
    advise(facts, card, Wishes(max_vram=limit), 7800, host)
    return read - started, time.perf_counter() - read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in meta_model(WAN_14B).state_dict().items()}
    card = hardware.card("RTX 4090").with_(host_total=64 * GIB)
    with tempfile.TemporaryDirectory() as folder:
        path = write_sparse(Path(folder) / "wan.safetensors", weights)
        for host in HOSTS:
            for limit in (None, 12 * GIB):
                runs = sorted((once(path, card, host, limit) for _ in range(args.repeats)), key=sum)
                read, chosen = runs[len(runs) // 2]
                tracemalloc.start()
                once(path, card, host, limit)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                print(
                    f"{host:16s} {'automatic' if limit is None else '12 GiB':9s}: {1000 * (read + chosen):5.1f} ms (reading "
                    f"{1000 * read:.1f}, planning {1000 * chosen:.1f}; median of {args.repeats}), {peak / MIB:.1f} MiB"
                )


if __name__ == "__main__":
    main()
