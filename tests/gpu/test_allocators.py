"""torch's other allocators, each in a process of its own: the same result to the bit, and the limit holds.

``cudaMallocAsync`` is what ComfyUI chooses by itself on many cards. torch bounds what it hands out of the driver's pool
there, not what the pool reserves, which the engine can only keep small by emptying it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from .conftest import ON_A_CARD

pytestmark = ON_A_CARD

RUN = """
import json, sys
from dataclasses import replace
import torch
from intelligent_vram.cli.wan import WAN_14B, random_model, sample_inputs
from intelligent_vram.vram import LimitTooSmall, SwapConfig, attach, snapshot
from intelligent_vram.vram.units import GIB

mode, device = sys.argv[1:]
torch.cuda.set_device(0)
config = replace(WAN_14B, num_layers=3)
with torch.inference_mode():
    inputs = sample_inputs(config, 1024, torch.bfloat16, device, seed=1)
    model = random_model(config, torch.bfloat16)
    resident = random_model(config, torch.bfloat16).to(device)
    wanted = resident(*inputs)
    del resident
    torch.cuda.empty_cache()
    before = snapshot(device)
    limit = round(2.4 * GIB) + before.outside_torch
    swap = attach(model, SwapConfig(mode=mode, max_vram=limit), device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    equal = [torch.equal(model(*inputs), wanted) for _ in range(6)]
    peak = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    refused = False
    swap.detach()
    try:
        attach(model, SwapConfig(mode=mode, max_vram=before.outside_torch + (256 << 20)), device)
    except LimitTooSmall:
        refused = True
    whole = torch.equal(model.to(device)(*inputs), wanted)
    outside = snapshot(device).outside_torch
print(json.dumps({
    "backend": torch.cuda.get_allocator_backend(), "equal": equal, "limit": limit, "outside": outside,
    "allocated": peak[0], "reserved": peak[1], "refused": refused, "whole": whole, "missing": list(before.missing),
}))
"""
SETTINGS = {
    "cudaMallocAsync": ("backend:cudaMallocAsync", "cudaMallocAsync"),
    "expandable segments": ("expandable_segments:True", "native"),
}


def run(setting: str, *arguments: str) -> dict:
    # torch 2.9 renamed the variable, and still reads the old one
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": setting}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise", "layerwise"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_result_to_the_bit_within_the_limit(name: str, mode: str) -> None:
    setting, backend = SETTINGS[name]
    found = run(setting, mode, "cuda:0")
    assert found["backend"] == backend
    assert all(found["equal"])
    assert found["whole"]
    assert found["refused"], "a limit that cannot hold the weights is refused under this allocator too"
    assert found["allocated"] + found["outside"] <= found["limit"]
    assert found["reserved"] + found["outside"] <= found["limit"], found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_on_a_second_card_while_the_first_is_the_current_one(name: str) -> None:
    found = run(SETTINGS[name][0], "adaptive", "cuda:1")
    assert all(found["equal"])
    assert found["whole"]
    assert found["reserved"] + found["outside"] <= found["limit"], found
