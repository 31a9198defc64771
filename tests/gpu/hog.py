"""Another program that takes VRAM and gives it back, at random."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# takes memory down to a random rest of what is free, and gives it back, until its standard input ends
HOG = """
import random, select, sys, torch
dice, least, most = random.Random(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
torch.zeros(1, device="cuda")
print("ready", flush=True)
while not select.select([sys.stdin], [], [], dice.random() * 0.2)[0]:
    free, _ = torch.cuda.mem_get_info()
    leave = dice.randint(least, most)
    try:
        held = torch.empty(max(0, free - leave), dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        continue
    if select.select([sys.stdin], [], [], dice.random() * 0.4)[0]:
        break
    del held
    torch.cuda.empty_cache()
"""


@contextmanager
def hog(seed: int, least: int, most: int) -> Iterator[None]:
    """Another process leaves between ``least`` and ``most`` bytes of the card free, and changes its mind."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    with subprocess.Popen(
        [sys.executable, "-c", HOG, str(seed), str(least), str(most)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": uuid},
    ) as process:
        assert process.stdout.readline().strip() == "ready"
        try:
            yield
        finally:
            process.stdin.close()
