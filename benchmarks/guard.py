"""What the contiguity guard costs when there is nothing to do: moving a Wan 14B block with and without it.

python benchmarks/guard.py [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from intelligent_vram.cli.wan import WAN_14B, random_model
from intelligent_vram.vram.contiguity import Guard, mend
from measure import synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    device = torch.device(args.device)
    block = random_model(replace(WAN_14B, num_layers=1), torch.bfloat16).blocks[0].to(device)
    guard = Guard((device.type,))

    def move() -> float:
        block.to("cpu")
        synchronize(device)
        start = time.perf_counter()
        block.to(device)
        synchronize(device)
        return time.perf_counter() - start

    plain, guarded = [], []
    for _ in range(args.repeats):
        plain.append(move())
        guard.add(block)
        guarded.append(move())
        guard.remove()
    look = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        mend(block, (device.type,))
        look.append(time.perf_counter() - start)
    print(
        f"moving a block: {statistics.median(plain) * 1e3:.2f} ms, guarded {statistics.median(guarded) * 1e3:.2f} ms; "
        f"the look alone {statistics.median(look) * 1e6:.0f} us for {len(list(block.parameters()))} parameters, "
        f"{guard.mended} mended"
    )


if __name__ == "__main__":
    main()
